"""export: one disk of a restore point as an image file or stream."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from xbfs.cli import tasks, text
from xbfs.cli.context import catalog_of, disk_of, index_of, point_of, repository_of
from xbfs.cli.points import ID_DIGITS
from xbfs.cli.progress import ProgressLine
from xbfs_engine.core.errors import UsageError
from xbfs_engine.restore.image import ExportProgress, ExportStatistics, export_image, stream_image
from xbfs_engine.restore.layouts import ImageFormat, image_layout

if TYPE_CHECKING:
    import argparse

    from xbfs.cli.output import Output

STREAM = "-"
_SUFFIXES = {ImageFormat.RAW: "raw", ImageFormat.VHD: "vhd", ImageFormat.VHD_FIXED: "vhd"}


def export(arguments: argparse.Namespace, output: Output) -> None:
    """Write an image."""
    to_stdout = arguments.output == STREAM
    if to_stdout:
        _take_stdout(output)
    repository = repository_of(arguments)
    point = point_of(catalog_of(repository, output), arguments.point)
    disk = disk_of(point, arguments.disk)
    image_format = ImageFormat(arguments.format)
    layout = image_layout(point, disk, image_format)
    path = Path(arguments.output or f"{point.id[:ID_DIGITS]}-disk{disk.number}.{_SUFFIXES[image_format]}")
    with ProgressLine(output, repository.runtime.clock) as line:

        def report(now: ExportProgress) -> None:
            line.update(f"disk {disk.number}", now.written_bytes, now.data_bytes)

        index = index_of(repository)

        async def work() -> ExportStatistics:
            if to_stdout:
                return await stream_image(
                    repository, point, disk, layout, sys.stdout.fileno(), locator=index, report=report
                )
            return await export_image(
                repository, point, disk, layout, path, overwrite=arguments.overwrite, locator=index, report=report
            )

        statistics = tasks.run(work)
    output.result(
        {
            "point": point.id,
            "disk": disk.number,
            "format": image_format.value,
            "file": None if to_stdout else str(path),
            **statistics.to_record(),
        }
    )
    output.say(
        f"{'standard output' if to_stdout else path}: disk {disk.number} of {point.vm_name} at "
        f"{text.when(point.time_ns)} as {image_format.value}, {text.size(statistics.image_bytes)}, "
        f"{text.size(statistics.written_bytes)} of data in {text.duration(statistics.elapsed_s)}, "
        f"{text.rate(statistics.written_bytes, statistics.elapsed_s)}"
    )


def _take_stdout(output: Output) -> None:
    """Keep standard output for the image. Raises UsageError where it can not be."""
    if output.json:
        raise UsageError("--json and -o - both need standard output", hint="export to a file with -o FILE")
    if sys.stdout.isatty():
        raise UsageError("an image is not for a terminal", hint="name a file with -o FILE, or pipe -o - somewhere")
    output.give_away_stdout()
