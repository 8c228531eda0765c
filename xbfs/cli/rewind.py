"""rewind: the disks of a VM go back to a restore point in place, after a safety point; only what differs is written.

Puts together what the engine keeps apart: a rewind, and the backup that is its safety point.
"""

from __future__ import annotations

import os
import shlex
from functools import partial
from typing import TYPE_CHECKING, Final

from xbfs import __version__
from xbfs.cli import tasks, text
from xbfs.cli.context import catalog_of, index_of, point_of, repository_of
from xbfs.cli.points import ID_DIGITS
from xbfs.cli.pool import configured
from xbfs.cli.progress import ProgressLine
from xbfs_engine.core.errors import Cancelled, UsageError, VmNotReady
from xbfs_engine.core.runtime import system_runtime
from xbfs_engine.ingest.vm import job as backup_job
from xbfs_engine.ingest.vm.base import base_of, known_bases
from xbfs_engine.ingest.vm.cycle import Target
from xbfs_engine.ingest.vm.cycle import Wishes as BackupWishes
from xbfs_engine.ingest.vm.reading import PoolAccess, Wanted
from xbfs_engine.ingest.vm.record import PoolRecorder
from xbfs_engine.ingest.vm.run import RunWishes
from xbfs_engine.restore.rewind.rewind import PointSide, PoolSide, Rewind, Wishes, give_up
from xbfs_engine.source.nbd import HostBudget
from xbfs_engine.source.xapi.http import import_raw
from xbfs_engine.source.xapi.ledger import Ledgers
from xbfs_engine.source.xapi.patience import Patience
from xbfs_engine.source.xapi.session import open_pool

if TYPE_CHECKING:
    import argparse
    from contextlib import AbstractAsyncContextManager

    from xbfs.cli.output import Output
    from xbfs_engine.catalog.restore_point import RestorePoint
    from xbfs_engine.core.errors import XbfsError
    from xbfs_engine.ingest.statistics import Progress
    from xbfs_engine.restore.rewind.guard import HalfWritten
    from xbfs_engine.restore.rewind.report import DiskReport, RewindReport
    from xbfs_engine.source.base import DiskSource
    from xbfs_engine.source.xapi.http import RawSink
    from xbfs_engine.source.xapi.session import Pool, Ref

_CONNECTIONS: Final = 4
_WRITE_SILENCE_S: Final = 1200.0
"""The longest silence of a host, which may first have to find its place in a chain of thirty."""


def rewind(arguments: argparse.Namespace, output: Output) -> None:
    """Rewind a VM, or give up a rewind that was interrupted."""
    if arguments.abandon:
        _abandon(arguments, output)
        return
    config, secrets = configured(arguments.pool)
    runtime = system_runtime()
    repository = repository_of(arguments)
    catalog = catalog_of(repository, output)
    point = point_of(catalog, arguments.to)
    index = index_of(repository)
    target = Target(repository, catalog, index, os.uname().nodename, f"xbfs {__version__}")
    points = PointSide(repository, catalog, index, base_of, known_bases(catalog, repository.id))
    with ProgressLine(output, repository.runtime.clock) as progress:
        listener = _Listener(output, progress)

        begun: list[Rewind] = []

        async def work() -> RewindReport:
            async with open_pool(config, secrets, runtime) as pool:
                side = _side(pool, Ledgers.of_pool(config.name, os.environ, runtime))
                wishes = Wishes(
                    safety=None
                    if arguments.no_safety_point
                    else partial(_safety_point, pool, side, target, point.vm_uuid, listener),
                    dry_run=arguments.dry_run,
                    stop=arguments.stop,
                    start=arguments.start,
                    full_compare=arguments.full_compare,
                    stop_timeout_s=arguments.stop_timeout,
                )
                begun.append(Rewind(side, points, arguments.vm, point, wishes))
                return await begun[0].run(listener)

        try:
            report = tasks.run(work)
        except Cancelled as exc:
            if begun and begun[0].half_written:
                raise Cancelled("stopped by a signal while disks were written: they are half-written") from exc
            raise
    _tell(report, output, pool=arguments.pool, dry_run=arguments.dry_run)


def _abandon(arguments: argparse.Namespace, output: Output) -> None:
    if arguments.dry_run or arguments.stop or arguments.start:
        raise UsageError("--abandon only takes the mark off", hint="start the VM afterwards by itself")
    config, secrets = configured(arguments.pool)
    runtime = system_runtime()

    async def work() -> HalfWritten | None:
        async with open_pool(config, secrets, runtime) as pool:
            return await give_up(_side(pool, Ledgers.of_pool(config.name, os.environ, runtime)), arguments.vm)

    left = tasks.run(work)
    output.result({"abandoned": None if left is None else left._asdict()})
    if left is None:
        output.say(f"{arguments.vm}: no rewind was interrupted; nothing was changed")
    else:
        output.say(f"{arguments.vm}: its disks are a mixture of what they were and of restore point {left.point}")
        if left.safety:
            output.say(f"the VM as it was before is restore point {left.safety}")


def _side(pool: Pool, ledgers: Ledgers) -> PoolSide:
    disks = PoolDisks(pool)
    return PoolSide(pool, disks, disks, ledgers, Patience(system_runtime().random), os.uname().nodename)


async def _safety_point(pool: Pool, side: PoolSide, target: Target, vm_uuid: str, listener: _Listener) -> RestorePoint:
    """A backup of the VM as it is. Raises what keeps it from having one."""
    access = PoolAccess(pool, HostBudget(), connections=_CONNECTIONS)
    source = backup_job.PoolSide(pool, access, PoolRecorder(pool), side.ledgers, system_runtime().random)
    report = await backup_job.back_up_vms(source, target, [vm_uuid], RunWishes(BackupWishes()), listener.of_backup)
    for failure in report.outcome.failures.values():
        raise failure
    for skipped in report.skipped:
        raise VmNotReady(
            f"no safety point can be made of {skipped.vm.name!r}: {skipped.reason}",
            hint="to rewind without one pass --no-safety-point",
        )
    return report.outcome.reports[vm_uuid].point


class PoolDisks:
    """DiskReader and DiskWriter of a rewind, on a pool."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._access = PoolAccess(pool, HostBudget(), connections=_CONNECTIONS)

    async def has_nbd(self, vdi_ref: Ref) -> bool:
        """Whether a host offers the disk over NBD."""
        return await self._access.has_nbd(vdi_ref)

    def nbd(self, vdi_ref: Ref, size_bytes: int) -> AbstractAsyncContextManager[DiskSource]:
        """Over NBD."""
        return self._access.nbd(Wanted(vdi_ref, size_bytes, None))

    def stream(self, vdi_ref: Ref, size_bytes: int) -> AbstractAsyncContextManager[DiskSource]:
        """As one stream."""
        return self._access.stream(Wanted(vdi_ref, size_bytes, None))

    def patch(self, vdi_ref: Ref) -> AbstractAsyncContextManager[RawSink]:
        """Pieces, each for its place."""
        return import_raw(self._pool, vdi_ref, format="chunked", length=None, timeout_s=_WRITE_SILENCE_S)

    def fill(self, vdi_ref: Ref, size_bytes: int) -> AbstractAsyncContextManager[RawSink]:
        """All bytes in a row."""
        return import_raw(self._pool, vdi_ref, format="raw", length=size_bytes, timeout_s=_WRITE_SILENCE_S)


class _BackupListener:
    """Shows how the safety point is made."""

    def __init__(self, rewinding: _Listener, progress: ProgressLine) -> None:
        self._rewinding = rewinding
        self._progress = progress

    def step(self, vm_name: str, what: str) -> None:
        """A line each."""
        self._rewinding.step(f"safety point of {vm_name}: {what}")

    def progress(self, vm_name: str, now: Progress) -> None:
        """The line that is redrawn."""
        label = f"safety point of {vm_name}: disk {now.disk}"
        self._progress.update(label, now.read.source_bytes, now.planned_bytes)

    def failed(self, vm_name: str, error: XbfsError) -> None:
        """Nothing: it is the error of the whole command."""


class _Listener:
    """Shows how the rewind goes. ``of_backup`` is the one for its safety point."""

    def __init__(self, output: Output, progress: ProgressLine) -> None:
        self._output = output
        self._progress = progress
        self.of_backup = _BackupListener(self, progress)

    def step(self, what: str) -> None:
        """A line each."""
        if self._output.shows_progress:
            self._output.status(what)

    def plan(self, disks: list[DiskReport]) -> None:
        """What will be written, in any case."""
        self._output.clear_status()
        for disk in disks:
            self._output.say_now(_planned(disk))

    def progress(self, what: str, done_bytes: int, total_bytes: int) -> None:
        """The line that is redrawn."""
        self._progress.update(what, done_bytes, total_bytes)

    def warn(self, what: str, hint: str) -> None:
        """At once."""
        self._output.warn(what, hint)


def _planned(disk: DiskReport) -> str:
    how_much = text.size(disk.differing_bytes)
    if not disk.exact:
        how_much += " or more" if disk.differing_bytes < disk.size_bytes else " or less"
    told = f"disk {disk.number} ({disk.name}): {how_much} of {text.size(disk.size_bytes)} to write"
    if disk.read_bytes:
        told += f", {text.size(disk.read_bytes)} read to know"
    if disk.size_bytes > disk.point_size_bytes:
        told += f"; it had {text.size(disk.point_size_bytes)}, and what was added becomes zero"
    return f"{told} ({disk.reason})"


def _tell(report: RewindReport, output: Output, *, pool: str, dry_run: bool) -> None:
    output.result(
        {
            "vm_uuid": report.vm_uuid,
            "vm_name": report.vm_name,
            "point": report.point.id,
            "safety_point": report.safety_point.id if report.safety_point else None,
            "disks": [disk.to_record() for disk in report.disks],
            "untouched": list(report.untouched),
            "dry_run": dry_run,
            "written": report.written,
            "started": report.started,
        }
    )
    for name in report.untouched:
        output.say(f"{name} is not in the restore point and stays as it is")
    for disk in report.disks:
        if disk.replaced_by is not None:
            output.say(
                f"disk {disk.number} is VDI {disk.replaced_by} now; the old one, {disk.vdi_uuid}, is kept, detached"
            )
    if dry_run:
        output.say("nothing was changed")
        return
    when = text.when(report.point.time_ns)
    written = sum(disk.size_bytes if disk.replaced_by else disk.differing_bytes for disk in report.disks)
    if report.written:
        output.say(f"{report.vm_name} is as at {when}: {text.size(written)} written and verified")
    else:
        output.say(f"{report.vm_name} already was as at {when}: nothing was written")
    if report.safety_point is not None:
        undo = shlex.join(
            ["xbfs", "rewind", report.vm_name, "--to", report.safety_point.id[:ID_DIGITS], "--pool", pool]
        )
        output.say(f"to undo it: {undo}")
