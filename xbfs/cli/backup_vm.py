"""backup vm: VMs of a pool become restore points, and the user learns of each how it was read and why."""

from __future__ import annotations

import os
from functools import partial
from typing import TYPE_CHECKING, Final

from xbfs import __version__
from xbfs.cli import tasks, text
from xbfs.cli.context import catalog_of, index_of, repository_of
from xbfs.cli.describe import source_bytes
from xbfs.cli.file_indexes import index_new
from xbfs.cli.points import ID_DIGITS
from xbfs.cli.pool import configured
from xbfs.cli.progress import ProgressLine
from xbfs.vfs.records import point_record
from xbfs_engine.core.errors import RunIncomplete, UsageError
from xbfs_engine.core.runtime import system_runtime
from xbfs_engine.ingest.vm.cycle import Target, Wishes
from xbfs_engine.ingest.vm.job import JobReport, PoolSide, back_up_vms
from xbfs_engine.ingest.vm.reading import PoolAccess
from xbfs_engine.ingest.vm.record import PoolRecorder
from xbfs_engine.ingest.vm.run import RunWishes
from xbfs_engine.source.nbd import HostBudget
from xbfs_engine.source.xapi.ledger import Ledgers
from xbfs_engine.source.xapi.selection import TAG
from xbfs_engine.source.xapi.session import open_pool

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from xbfs.cli.output import Output
    from xbfs_engine.catalog.restore_point import DiskRecord
    from xbfs_engine.core.errors import XbfsError
    from xbfs_engine.ingest.statistics import Progress
    from xbfs_engine.ingest.vm.cycle import VmReport
    from xbfs_engine.source.xapi.config import Credentials, PoolConfig

_ALL: Final = "*"


def vm(arguments: argparse.Namespace, output: Output) -> None:
    """Back up VMs of a pool."""
    patterns = _patterns(arguments)
    config, secrets = configured(arguments.pool)
    repository = repository_of(arguments)
    index = index_of(repository)
    target = Target(repository, catalog_of(repository, output), index, os.uname().nodename, f"xbfs {__version__}")
    with ProgressLine(output, repository.runtime.clock) as progress:
        listener = _Listener(output, progress)
        report = tasks.run(partial(_back_up, arguments, config, secrets, target, patterns, listener))
    if index.lost:
        output.warn(
            f"the repository has lost {text.count(len(index.lost), 'pack')}: nothing was deduplicated against them",
            "run `xbfs verify` to see which points are hit; a backup with --full stores again what it reads",
        )
    _tell(report, output)
    if arguments.index:
        index_new(repository, target.catalog, [done.point for done in report.outcome.reports.values()], output)
    _fail_if_any(report)


def _patterns(arguments: argparse.Namespace) -> list[str]:
    """What ``selection.select_vms`` takes. Raises UsageError."""
    patterns = [*arguments.names, *(TAG + tag for tag in arguments.tag)]
    if arguments.all:
        if patterns:
            raise UsageError("--all leaves nothing for NAME and --tag to add", hint="give one or the other")
        return [_ALL]
    if not patterns:
        raise UsageError("no VM is named", hint="give a NAME, --tag TAG or --all")
    if arguments.exclude and (len(patterns) > 1 or arguments.tag):
        raise UsageError("--exclude says nothing of which VM", hint="back up this VM in a run of its own")
    return patterns


async def _back_up(
    arguments: argparse.Namespace,
    config: PoolConfig,
    secrets: Credentials,
    target: Target,
    patterns: Sequence[str],
    listener: _Listener,
) -> JobReport:
    runtime = system_runtime()
    wishes = RunWishes(
        Wishes(full=arguments.full, keep_data=arguments.keep_data), frozenset(arguments.exclude), arguments.wait
    )
    async with open_pool(config, secrets, runtime) as pool:
        access = PoolAccess(pool, HostBudget(), connections=arguments.connections)
        ledgers = Ledgers.of_pool(config.name, os.environ, runtime)
        side = PoolSide(pool, access, PoolRecorder(pool), ledgers, runtime.random)
        return await back_up_vms(side, target, patterns, wishes, listener)


class _Listener:
    """Shows how the run goes."""

    def __init__(self, output: Output, progress: ProgressLine) -> None:
        self._output = output
        self._progress = progress

    def step(self, vm_name: str, what: str) -> None:
        """A line each."""
        if self._output.shows_progress:
            self._output.status(f"{vm_name}: {what}")

    def progress(self, vm_name: str, now: Progress) -> None:
        """The line that is redrawn."""
        note = f"bottleneck {now.bottleneck}" if now.bottleneck else ""
        self._progress.update(f"{vm_name}: disk {now.disk}", now.read.source_bytes, now.planned_bytes, note=note)

    def failed(self, vm_name: str, error: XbfsError) -> None:
        """At once: the run may last for hours."""
        if self._output.shows_progress:
            self._output.status(f"{vm_name}: no restore point: {error.message}")


def _tell(report: JobReport, output: Output) -> None:
    outcome = report.outcome
    output.result(
        {
            "vms": [
                {"point": point_record(done.point), "warnings": list(done.warnings)}
                for done in outcome.reports.values()
            ],
            "failed": [
                {"vm_uuid": uuid, "class": type(error).__name__, "message": error.message, "hint": error.hint}
                for uuid, error in outcome.failures.items()
            ],
            "skipped": [
                {"vm_uuid": one.vm.uuid, "vm_name": one.vm.name, "reason": one.reason} for one in report.skipped
            ],
            "swept": [{"deed": step.deed.value, "uuid": step.uuid, "name": step.name} for step in report.swept.done],
        }
    )
    for step in report.swept.done:
        output.say(f"removed what a run that died had left: {step.deed.value} {step.name or step.uuid}")
    for failed in report.swept.failed:
        output.warn(f"a leftover stays: {failed.step.deed.value} {failed.step.uuid}: {failed.reason}", failed.hint)
    for one in report.skipped:
        output.say(f"{one.vm.name}: left out: {one.reason}")
    for done in outcome.reports.values():
        _tell_vm(done, output)


def _tell_vm(done: VmReport, output: Output) -> None:
    point = done.point
    output.say(f"{point.vm_name}: restore point {point.id[:ID_DIGITS]} at {text.when(point.time_ns)}")
    for disk in point.disks:
        output.say(f"  disk {disk.number}: {_how(disk)}")
    wall_s = point.run.elapsed_ms / 1000
    output.say(
        f"  stored {text.size(point.run.stored_bytes)} new in {text.duration(wall_s)}, "
        f"{text.rate(source_bytes(point), wall_s)}"
    )
    for warning in done.warnings:
        output.warn(f"{point.vm_name}: {warning}")


def _how(disk: DiskRecord) -> str:
    """ "cbt 1.2 GiB of 40.0 GiB", or "full 9.0 GiB of 40.0 GiB, because …"."""
    read = f"{disk.method} {text.size(disk.statistics.source_bytes)} of {text.size(disk.size_bytes)}"
    told = f", {text.size(disk.statistics.new_bytes)} new"
    return read + told + (f", because: {disk.reason}" if disk.method == "full" else f" ({disk.reason})")


def _fail_if_any(report: JobReport) -> None:
    """Raises the failure of the only VM, or RunIncomplete with all reasons."""
    failures, done = report.outcome.failures, report.outcome.reports
    if len(failures) == 1 and not done:
        raise next(iter(failures.values()))
    if failures:
        reasons = "\n".join(f"  {error.message}" for error in failures.values())
        raise RunIncomplete(f"{len(failures)} of {len(failures) + len(done)} VMs have no new restore point:\n{reasons}")
