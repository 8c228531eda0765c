"""points and show."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from xbfs.cli import text
from xbfs.cli.context import catalog_of, point_of, repository_of
from xbfs.cli.describe import disk_lines, methods, source_bytes
from xbfs.vfs.records import point_record, test_record, vm_record
from xbfs_engine.catalog.boottests import boot_tests_of
from xbfs_engine.catalog.catalog import points_of
from xbfs_engine.core.errors import TargetUnwritable, UsageError

if TYPE_CHECKING:
    import argparse

    from xbfs.cli.output import Output

ID_DIGITS = 12
"""Digits of an id that lists show."""


def points(arguments: argparse.Namespace, output: Output) -> None:
    """List the restore points, oldest first."""
    found = catalog_of(repository_of(arguments), output).points()
    if arguments.vm is not None:
        found = points_of(found, arguments.vm)
    output.result({"points": [point_record(point) for point in found]})
    if not found:
        output.say("no restore points yet")
        return
    rows = [("POINT", "VM", "TIME", "DISKS", "SIZE", "METHOD", "READ", "STORED")]
    rows += [
        (
            point.id[:ID_DIGITS],
            point.vm_name,
            text.when(point.time_ns),
            str(len(point.disks)),
            text.size(sum(disk.size_bytes for disk in point.disks)),
            methods(point),
            text.size(source_bytes(point)),
            text.size(point.run.stored_bytes + point.run.metadata_bytes),
        )
        for point in found
    ]
    for line in text.table(rows, right=frozenset({3, 4, 6, 7})):
        output.say(line)


def write_screenshot(file: str, png: bytes) -> None:
    """Put a screen of a boot test where it is wanted. Raises TargetUnwritable."""
    try:
        Path(file).write_bytes(png)
    except OSError as exc:
        raise TargetUnwritable(f"{file} can not be written: {exc.strerror}") from exc


def show(arguments: argparse.Namespace, output: Output) -> None:
    """Tell all that is known of a restore point."""
    repository = repository_of(arguments)
    point = point_of(catalog_of(repository, output), arguments.point)
    run = point.run
    tests = boot_tests_of(repository, point.id)
    if arguments.screenshot is not None:
        newest = next((test.screenshot for test in reversed(tests) if test.screenshot), None)
        if newest is None:
            raise UsageError(
                f"no boot test of restore point {point.id[:ID_DIGITS]} has a screenshot",
                hint=f"`xbfs test {point.id[:ID_DIGITS]}` makes one",
            )
        write_screenshot(arguments.screenshot, newest)
    record = point_record(point) | {"vm": vm_record(point)["vm"]}
    output.result(record | {"tests": [test_record(test) for test in tests]})
    output.say(f"restore point {point.id}")
    output.say(f"VM {point.vm_name} ({point.vm_uuid})")
    output.say(f"time {text.when(point.time_ns)}, parent {point.parent[:ID_DIGITS] if point.parent else 'none'}")
    for disk in point.disks:
        for line in disk_lines(disk):
            output.say(line)
    output.say(
        f"stored {text.size(run.stored_bytes)}, metadata {text.size(run.metadata_bytes)}, "
        f"{text.count(run.packs, 'pack')}, in {text.duration(run.elapsed_ms / 1000)} by {run.program} on {run.node}"
    )
    for test in tests:
        output.say(f"boot test {text.when(test.made_ns)}: {test.verdict}, {test.reason}")
