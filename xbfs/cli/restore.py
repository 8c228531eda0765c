"""restore: a restore point becomes a VM, or VDIs, on a pool; the user learns what came back, and what did not."""

from __future__ import annotations

import os
from functools import partial
from typing import TYPE_CHECKING

from xbfs.cli import tasks, text
from xbfs.cli.context import catalog_of, index_of, point_of, repository_of
from xbfs.cli.points import ID_DIGITS
from xbfs.cli.pool import configured
from xbfs.cli.progress import ProgressLine
from xbfs_engine.core.errors import UsageError
from xbfs_engine.core.runtime import system_runtime
from xbfs_engine.restore.vm.disks import Stored
from xbfs_engine.restore.vm.job import RestoredDisks, RestoredVm, restore_disks, restore_vm
from xbfs_engine.restore.vm.plan import DisksPlan, VmPlan, VmWishes, plan_disks, plan_vm
from xbfs_engine.restore.vm.target import look_at
from xbfs_engine.source.xapi.ledger import Ledgers
from xbfs_engine.source.xapi.session import open_pool
from xbfs_engine.source.xapi.sweep import sweep

if TYPE_CHECKING:
    import argparse

    from xbfs.cli.output import Output
    from xbfs_engine.catalog.restore_point import RestorePoint
    from xbfs_engine.restore.image import ExportProgress
    from xbfs_engine.restore.vm.disks import FilledDisk
    from xbfs_engine.restore.vm.plan import DiskPlan
    from xbfs_engine.restore.vm.target import Target
    from xbfs_engine.source.xapi.config import Credentials, PoolConfig
    from xbfs_engine.source.xapi.sweep import SweepReport


def restore(arguments: argparse.Namespace, output: Output) -> None:
    """Restore a VM or disks."""
    _check(arguments)
    config, secrets = configured(arguments.pool)
    repository = repository_of(arguments)
    point = point_of(catalog_of(repository, output), arguments.point)
    stored = Stored(repository, point, index_of(repository))
    with ProgressLine(output, repository.runtime.clock) as line:
        plan, done = tasks.run(partial(_restore, arguments, config, secrets, stored, _Listener(output, line)))
    match plan, done:
        case VmPlan(), RestoredVm():
            _tell_vm(plan, done, output)
        case DisksPlan(), RestoredDisks():
            _tell_disks(plan, done, output)
        case _:
            _tell_plan(plan, output)


def _check(arguments: argparse.Namespace) -> None:
    """Raises UsageError for wishes that contradict each other."""
    if arguments.attach is not None and not arguments.disks:
        raise UsageError("--attach needs the disks to attach", hint="name them with --disk N")
    if not _is_vm(arguments) and (arguments.networks or arguments.keep_identity or arguments.start):
        raise UsageError(
            "--network, --keep-identity and --start are about a VM, and --disk makes none",
            hint="name a VM to make with --as NAME, or leave them out",
        )
    if arguments.attach is not None and arguments.name is not None:
        raise UsageError("--attach and --as contradict each other", hint="give one or the other")
    sources = [source for source, _ in arguments.networks]
    if len(set(sources)) != len(sources):
        raise UsageError("--network says twice where one network goes", hint="give it once")


def _is_vm(arguments: argparse.Namespace) -> bool:
    return not arguments.disks or arguments.name is not None


def _plan(arguments: argparse.Namespace, point: RestorePoint, target: Target) -> VmPlan | DisksPlan:
    disks = frozenset(arguments.disks)
    if not _is_vm(arguments):
        return plan_disks(point, target, sr=arguments.sr, disks=disks, attach=arguments.attach)
    wishes = VmWishes(arguments.sr, arguments.name, disks, dict(arguments.networks), arguments.keep_identity)
    return plan_vm(point, target, wishes)


async def _restore(
    arguments: argparse.Namespace, config: PoolConfig, secrets: Credentials, stored: Stored, listener: _Listener
) -> tuple[VmPlan | DisksPlan, RestoredVm | RestoredDisks | None]:
    runtime, node = system_runtime(), os.uname().nodename
    async with open_pool(config, secrets, runtime) as pool:
        ledgers = Ledgers.of_pool(config.name, os.environ, runtime)
        if not arguments.dry_run:
            # Before the plan: what a restore of the same VM left half-made is in the way of its identity.
            listener.swept(await sweep(pool, ledgers, node=node, dry_run=False))
        plan = _plan(arguments, stored.point, await look_at(pool))
        if arguments.dry_run:
            return plan, None
        async with ledgers.begin(node) as ledger:
            if isinstance(plan, VmPlan):
                return plan, await restore_vm(pool, ledger, stored, plan, listener, start=arguments.start)
            return plan, await restore_disks(pool, ledger, stored, plan, listener)


class _Listener:
    """Shows how the restore goes."""

    def __init__(self, output: Output, line: ProgressLine) -> None:
        self._output = output
        self._line = line

    def swept(self, report: SweepReport) -> None:
        """What runs that died had left."""
        for step in report.done:
            self._output.say(f"removed what a run that died had left: {step.deed.value} {step.name or step.uuid}")
        for failed in report.failed:
            self._output.warn(f"a leftover stays: {failed.step.deed.value} {failed.step.uuid}: {failed.reason}")

    def step(self, what: str) -> None:
        """A line each."""
        if self._output.shows_progress:
            self._output.status(what)

    def progress(self, disk: int, now: ExportProgress) -> None:
        """The line that is redrawn."""
        self._line.update(f"disk {disk}", now.written_bytes, now.data_bytes)


def _tell_plan(plan: VmPlan | DisksPlan, output: Output) -> None:
    disks = [_planned(disk) for disk in plan.disks]
    head = {"dry_run": True, "point": plan.point.id, "sr": plan.sr.uuid, "disks": disks}
    if isinstance(plan, VmPlan):
        vifs = [{"device": vif.device, "network": vif.network.uuid} for vif in plan.vifs]
        output.result(
            head
            | {
                "vm": {"name": plan.name, "vifs": vifs, "keeps_identity": plan.keep_identity},
                "not_restored": list(plan.left_out),
            }
        )
        output.say(f"would make VM {plan.name!r} on SR {plan.sr.name}, from {_point(plan.point)}")
    else:
        output.result(head | {"attach": plan.attach.uuid if plan.attach else None})
        output.say(
            f"would make {text.count(len(plan.disks), 'VDI')} on SR {plan.sr.name}, from {_point(plan.point)}"
            + (f", attached to {plan.attach.name}" if plan.attach else "")
        )
    for disk in plan.disks:
        size, data = text.size(disk.disk.size_bytes), text.size(disk.disk.data_bytes)
        output.say(f"  disk {disk.number}: {size}, {data} of data, as {disk.name!r}")
    if isinstance(plan, VmPlan):
        for vif in plan.vifs:
            output.say(f"  network interface {vif.device}: in {vif.network.name}")
        _tell_lost(plan.left_out, output)


def _tell_vm(plan: VmPlan, done: RestoredVm, output: Output) -> None:
    made = done.made
    output.result(
        {
            "point": plan.point.id,
            "vm": {
                "uuid": made.uuid,
                "name": plan.name,
                "way": made.way,
                "reason": made.reason,
                "started": done.started,
                "keeps_identity": plan.keep_identity,
            },
            "sr": plan.sr.uuid,
            "disks": [_filled(disk) for disk in done.disks],
            "not_restored": list(done.lost),
        }
    )
    output.say(f"VM {plan.name!r} {made.uuid} from {_point(plan.point)}")
    if made.way == "records":
        output.say(f"  made out of its records, because: {made.reason}")
    _say_disks(done.disks, output)
    _tell_lost(done.lost, output)
    output.say("it is running" if done.started else f"it is halted; start it with `xe vm-start uuid={made.uuid}`")
    for warning in done.warnings:
        output.warn(warning)


def _tell_disks(plan: DisksPlan, done: RestoredDisks, output: Output) -> None:
    output.result(
        {
            "point": plan.point.id,
            "sr": plan.sr.uuid,
            "attached_to": plan.attach.uuid if plan.attach else None,
            "disks": [_filled(disk) for disk in done.disks],
        }
    )
    output.say(f"{text.count(len(done.disks), 'VDI')} from {_point(plan.point)}")
    _say_disks(done.disks, output)
    if plan.attach:
        output.say(f"attached to VM {plan.attach.name}")
    for warning in done.warnings:
        output.warn(warning)


def _say_disks(disks: tuple[FilledDisk, ...], output: Output) -> None:
    for disk in disks:
        sent, seconds = disk.statistics.written_bytes, disk.statistics.elapsed_s
        output.say(
            f"  disk {disk.made.plan.number}: VDI {disk.made.uuid}, {text.size(disk.made.size_bytes)}, "
            f"{text.size(sent)} sent as {disk.format} in {text.duration(seconds)}, {text.rate(sent, seconds)}"
        )


def _tell_lost(lost: tuple[str, ...], output: Output) -> None:
    if lost:
        output.say("what does not come back:")
    for one in lost:
        output.say(f"  {one}")


def _planned(disk: DiskPlan) -> dict[str, object]:
    return {
        "number": disk.number,
        "name": disk.name,
        "size_bytes": disk.disk.size_bytes,
        "data_bytes": disk.disk.data_bytes,
    }


def _filled(disk: FilledDisk) -> dict[str, object]:
    return {
        "number": disk.made.plan.number,
        "name": disk.made.plan.name,
        "vdi_uuid": disk.made.uuid,
        "size_bytes": disk.made.size_bytes,
        "format": disk.format,
        "format_reason": disk.reason,
        **disk.statistics.to_record(),
    }


def _point(point: RestorePoint) -> str:
    return f"restore point {point.id[:ID_DIGITS]} of {point.vm_name} at {text.when(point.time_ns)}"
