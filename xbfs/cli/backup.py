"""backup image: local images become one restore point, and the user learns what that cost."""

from __future__ import annotations

import os
import re
import uuid
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from xbfs import __version__
from xbfs.cli import tasks, text
from xbfs.cli.context import catalog_of, index_of, point_of, repository_of
from xbfs.cli.describe import disk_lines, source_bytes
from xbfs.cli.file_indexes import index_new
from xbfs.cli.points import ID_DIGITS
from xbfs.cli.progress import ProgressLine
from xbfs.vfs.records import point_record
from xbfs_engine.core.errors import BitmapInvalid, PointAmbiguous, SourceUnreadable, UsageError
from xbfs_engine.core.limits import CBT_BLOCK_SIZE, MIB
from xbfs_engine.ingest.backup import BackupRequest, BackupRun, DiskJob
from xbfs_engine.ingest.statistics import Progress, Stage
from xbfs_engine.source.cbt import parse_changed
from xbfs_engine.source.image import ImageSource

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from xbfs.cli.output import Output
    from xbfs_engine.catalog.catalog import Catalog
    from xbfs_engine.catalog.restore_point import RestorePoint
    from xbfs_engine.source.base import Extent

_CHANGED_TEXT_MIN: Final = 64 * MIB
"""A --changed file may always have this size: JSON extents of a small disk."""


@dataclass(frozen=True, slots=True)
class Vm:
    """The VM a point is made of, and the point the run continues, if any."""

    name: str
    uuid: str
    base: RestorePoint | None


def image(arguments: argparse.Namespace, output: Output) -> None:
    """Back up local images."""
    paths = [Path(path) for path in arguments.paths]
    numbers = _disk_numbers(len(paths), arguments.disk)
    changed_files = _changed_files(arguments.changed, numbers)
    name = _vm_name(arguments.vm)
    if changed_files and arguments.new_chain:
        raise UsageError("--changed needs an earlier point, and --new-chain continues none", hint="leave one out")
    repository = repository_of(arguments)
    catalog = catalog_of(repository, output)
    vm = _find_vm(catalog, uuid.UUID(hex=repository.id), name, arguments)
    last: dict[int, Progress] = {}
    with ExitStack() as stack:
        jobs = []
        for number, path in zip(numbers, paths, strict=True):
            source = stack.enter_context(closing(ImageSource(path)))
            file = changed_files.get(number)
            changed = None if file is None else _read_changed(file, source.size_bytes)
            vdi_uuid = _vdi_uuid(uuid.UUID(hex=repository.id), vm, number)
            reason = _reason(vm, number, file, new_chain=arguments.new_chain)
            jobs.append(DiskJob(number, _display_name(path), vdi_uuid, source, changed, reason))
        request = BackupRequest(
            vm_name=vm.name,
            vm_uuid=vm.uuid,
            disks=jobs,
            node=os.uname().nodename,
            program=f"xbfs {__version__}",
            vm={},
            base=vm.base.id if vm.base else None,
            new_chain=arguments.new_chain,
        )
        progress = stack.enter_context(ProgressLine(output, repository.runtime.clock))

        def report(now: Progress) -> None:
            last[now.disk] = now
            note = f"bottleneck {now.bottleneck}" if now.bottleneck else ""
            progress.update(f"disk {now.disk}", now.read.source_bytes, now.planned_bytes, note=note)

        index = index_of(repository)
        point = tasks.run(BackupRun(repository, catalog, index, request, report).run)
    if index.lost:
        output.warn(
            f"the repository has lost {text.count(len(index.lost), 'pack')}: nothing was deduplicated against them",
            "run `xbfs verify` to see which points are hit; a backup without --changed stores again what it reads",
        )
    _tell(point, last, output)
    if arguments.index:
        index_new(repository, catalog, [point], output)


def _tell(point: RestorePoint, last: dict[int, Progress], output: Output) -> None:
    seconds = {stage: sum(progress.seconds[stage] for progress in last.values()) for stage in Stage}
    stage = next(iter(last.values()))._replace(seconds=seconds).bottleneck
    bottleneck = stage.value if stage else None
    wall_s, read = point.run.elapsed_ms / 1000, source_bytes(point)
    output.result(
        {
            "point": point_record(point),
            "read_bytes": read,
            "wall_s": wall_s,
            "bytes_per_s": round(read / wall_s) if wall_s else None,
            "bottleneck": bottleneck,
            "stage_seconds": {stage.value: round(spent, 3) for stage, spent in seconds.items()},
        }
    )
    output.say(f"restore point {point.id[:ID_DIGITS]} of {point.vm_name} at {text.when(point.time_ns)}")
    for disk in point.disks:
        for line in disk_lines(disk):
            output.say(line)
    run = point.run
    output.say(
        f"stored {text.size(run.stored_bytes)} and {text.size(run.metadata_bytes)} of metadata "
        f"in {text.count(run.packs, 'pack')}"
    )
    output.say(f"took {text.duration(wall_s)}, {text.rate(read, wall_s)}, bottleneck: {bottleneck or 'none'}")
    output.say(f"to look at it: xbfs mount DIR; ls DIR/by-id/{point.id}/disks")


def _disk_numbers(count: int, chosen: Sequence[int] | None) -> list[int]:
    """A number for every path. Raises UsageError."""
    if chosen is None:
        return list(range(count))
    if len(chosen) != count:
        raise UsageError(
            f"{text.count(count, 'PATH')} but {len(chosen)} --disk",
            hint="give --disk once for every PATH, in their order",
        )
    if len(set(chosen)) != count:
        raise UsageError(f"two disks have one number: --disk {' --disk '.join(map(str, chosen))}")
    return list(chosen)


def _changed_files(options: Sequence[str], numbers: Sequence[int]) -> dict[int, Path]:
    """The --changed file of each disk that has one. Raises UsageError."""
    files: dict[int, Path] = {}
    for option in options:
        numbered = re.fullmatch(r"([0-9]{1,3})=(.+)", option, re.DOTALL)
        if numbered is None and len(numbers) > 1:
            raise UsageError(f"--changed {option} does not say of which disk", hint=f"write {numbers[0]}={option}")
        number, file = (int(numbered[1]), numbered[2]) if numbered else (numbers[0], option)
        if number not in numbers:
            raise UsageError(f"--changed {option}: there is no disk {number}", hint=f"disks: {numbers}")
        if number in files:
            raise UsageError(f"two --changed files for disk {number}", hint="a disk has one: merge them")
        files[number] = Path(file)
    return files


def _vm_name(name: str) -> str:
    try:
        size = len(name.encode())
    except UnicodeEncodeError:
        raise UsageError("the VM's name is not valid UTF-8 text") from None
    if not 0 < size <= 1024:
        raise UsageError("the VM's name is empty or longer than 1024 bytes", hint="give it with --vm NAME")
    return name


def _find_vm(catalog: Catalog, repository_id: uuid.UUID, name: str, arguments: argparse.Namespace) -> Vm:
    """The VM by its uuid, or by its name among those that have points, or a new one."""
    known = list(dict.fromkeys(point.vm_uuid for point in catalog.points() if point.vm_name == name))
    if arguments.vm_uuid is not None:
        try:
            vm_uuid = str(uuid.UUID(arguments.vm_uuid))
        except ValueError:
            raise UsageError(f"--vm-uuid {arguments.vm_uuid} is not a uuid") from None
    elif len(known) > 1:
        raise PointAmbiguous(f"several VMs are called {name!r}: {', '.join(known)}", hint="choose one with --vm-uuid")
    else:
        vm_uuid = known[0] if known else str(uuid.uuid5(repository_id, f"vm {name}"))
    if arguments.new_chain:
        return Vm(name, vm_uuid, None)
    base = catalog.latest(vm_uuid) if arguments.base is None else point_of(catalog, arguments.base)
    return Vm(name, vm_uuid, base)


def _vdi_uuid(repository_id: uuid.UUID, vm: Vm, number: int) -> str:
    disk = vm.base.disk(number) if vm.base else None
    return disk.vdi_uuid if disk else str(uuid.uuid5(repository_id, f"vdi {vm.uuid} {number}"))


def _reason(vm: Vm, number: int, changed: Path | None, *, new_chain: bool) -> str:
    if new_chain:
        return "a new chain was asked for"
    if vm.base is None:
        return "first point of this VM"
    if vm.base.disk(number) is None:
        return "first point of this disk"
    if changed is None:
        return "no changed blocks were given"
    return f"changed blocks from {_display_name(changed)}, since {vm.base.id[:ID_DIGITS]}"


def _display_name(path: Path) -> str:
    """A file's name as valid text."""
    return os.fsencode(path.name).decode(errors="replace")


def _read_changed(path: Path, disk_size_bytes: int) -> list[Extent]:
    """The extents of a --changed file. Raises SourceUnreadable, BitmapInvalid."""
    # Base64 of a bit a block is a sixth of a byte a block; twice that leaves room for any line breaks.
    limit = _CHANGED_TEXT_MIN + disk_size_bytes // CBT_BLOCK_SIZE // 3
    try:
        with path.open("rb") as file:
            content = file.read(limit + 1)
    except OSError as exc:
        raise SourceUnreadable(f"{path} can not be read: {exc.strerror}", hint="check the path of --changed") from exc
    if len(content) > limit:
        raise BitmapInvalid(f"{path} has more than {limit} bytes: too much for a disk of {disk_size_bytes} bytes")
    try:
        return parse_changed(content, disk_size_bytes)
    except BitmapInvalid as exc:
        raise BitmapInvalid(f"{path}: {exc.message}") from exc
