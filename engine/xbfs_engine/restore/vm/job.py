"""A whole restore: disks made, filled, then the VM around them; or taken back as if nothing had been.

The ledger is the run's own. What fails or is cancelled before the end leaves nothing on the pool; what is complete is
the user's, and no sweep touches it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Final, Protocol

import trio

from xbfs_engine.core.errors import PoolError, StorageError
from xbfs_engine.core.log import Logger
from xbfs_engine.restore.vm.calls import make
from xbfs_engine.restore.vm.disks import DiskMaker
from xbfs_engine.restore.vm.machine import VmMaker
from xbfs_engine.restore.vm.shapes import vbd_fields
from xbfs_engine.restore.vm.undo import undo

if TYPE_CHECKING:
    from collections.abc import Sequence

    from xbfs_engine.restore.image import ExportProgress
    from xbfs_engine.restore.vm.disks import FilledDisk, MadeDisk, Stored
    from xbfs_engine.restore.vm.machine import MadeVm
    from xbfs_engine.restore.vm.plan import DiskPlan, DisksPlan, VmPlan
    from xbfs_engine.source.xapi.inventory import Vm
    from xbfs_engine.source.xapi.ledger import RunLedger
    from xbfs_engine.source.xapi.session import Pool, Ref

START_S: Final = 600.0
PLUG_S: Final = 120.0
"""A guest without drivers never takes a disk; hosts give up before."""

_log = Logger("xbfs.restore")


class Listener(Protocol):
    """Hears how a restore goes. Called in the event loop; must not block."""

    def step(self, what: str) -> None:
        """The next step, in words."""
        ...

    def progress(self, disk: int, now: ExportProgress) -> None:
        """About five times a second while a disk is written."""
        ...


@dataclass(frozen=True, slots=True)
class RestoredVm:
    """A VM that is there. ``lost``: what it had and has no more. ``warnings``: what did not work at the end."""

    made: MadeVm
    disks: tuple[FilledDisk, ...]
    lost: tuple[str, ...]
    warnings: tuple[str, ...]
    started: bool


@dataclass(frozen=True, slots=True)
class RestoredDisks:
    """VDIs that are there. ``warnings``: what did not work at the end."""

    disks: tuple[FilledDisk, ...]
    warnings: tuple[str, ...]


async def restore_vm(
    pool: Pool, ledger: RunLedger, stored: Stored, plan: VmPlan, listener: Listener, *, start: bool
) -> RestoredVm:
    """Make the VM that was planned.

    Raises VmNotReady, PoolError, IntegrityError, StorageError; then nothing is left on the pool.
    """
    disk_maker, vm_maker = DiskMaker(pool, ledger, stored, plan.sr), VmMaker(pool, ledger, plan)
    try:
        filled = await _disks(disk_maker, plan.disks, listener)
        disks = [disk.made for disk in filled]
        listener.step("making the VM")
        made = await vm_maker.make(disks)
        await trio.lowlevel.checkpoint_if_cancelled()
        with trio.CancelScope(shield=True):
            await disk_maker.release(disks)
            await vm_maker.finish(made)
    except BaseException as exc:
        await undo(pool, ledger, why=exc)
        raise
    warnings = await _close(ledger)
    started = False
    if start:
        listener.step("starting the VM")
        try:
            await pool.run_task("VM.start", made.ref, False, False, timeout_s=START_S)
            started = True
        except PoolError as exc:
            warnings.append(f"the VM is restored, but it was not started: {exc.message}")
    return RestoredVm(made, tuple(filled), (*plan.left_out, *made.lost), tuple(warnings), started)


async def restore_disks(
    pool: Pool, ledger: RunLedger, stored: Stored, plan: DisksPlan, listener: Listener
) -> RestoredDisks:
    """Make the VDIs that were planned, and attach them where that was asked for. Raises as ``restore_vm``.

    A process that dies while it attaches them leaves them to the VM: a sweep takes no disk that a VM uses.
    """
    maker = DiskMaker(pool, ledger, stored, plan.sr)
    attached: list[Ref] = []
    try:
        filled = await _disks(maker, plan.disks, listener)
        disks = [disk.made for disk in filled]
        with trio.CancelScope(shield=True):
            if plan.attach is not None:
                listener.step(f"attaching to {plan.attach.name}")
                attached = [await _attach(pool, plan.attach, disk) for disk in disks]
            await maker.release(disks)
    except BaseException as exc:
        # Their VBDs, which are not plugged yet, go with the VDIs.
        await undo(pool, ledger, why=exc)
        raise
    warnings = await _close(ledger)
    if plan.attach is not None and plan.attach.power_state == "Running":
        warnings += [warning for vbd in attached if (warning := await _plug(pool, plan.attach, vbd))]
    return RestoredDisks(tuple(filled), tuple(warnings))


async def _disks(maker: DiskMaker, plans: Sequence[DiskPlan], listener: Listener) -> list[FilledDisk]:
    """All VDIs are made first: an SR that is full says so before an hour of writing."""
    listener.step("making disks")
    made = await maker.make(plans)
    filled = []
    for disk in made:
        listener.step(f"writing disk {disk.plan.number}")
        filled.append(await maker.fill(disk, partial(listener.progress, disk.plan.number)))
    return filled


async def _attach(pool: Pool, vm: Vm, disk: MadeDisk) -> Ref:
    return await make(pool, "VBD.create", vbd_fields({"bootable": False}, vm.ref, disk.ref, "autodetect"))


async def _plug(pool: Pool, vm: Vm, vbd: Ref) -> str | None:
    try:
        await pool.call("VBD.plug", vbd, timeout_s=PLUG_S)
    except PoolError as exc:
        # Also when only the answer was lost: whoever wants to know looks at the VM.
        return f"the disk is attached to {vm.name}, but the running VM may not see it yet: {exc.message}"
    return None


async def _close(ledger: RunLedger) -> list[str]:
    """Nothing that was noted is ours any more."""
    try:
        with trio.CancelScope(shield=True):
            for item in ledger.items:
                await ledger.gone(item)
    except StorageError as exc:
        _log.warning("a finished restore stays in the ledger", error=exc.message)
        return [f"the run's notes could not be closed ({exc.message}); the next sweep does"]
    return []
