"""What follows the commit: the snapshot becomes the base of the next delta, and everything older goes.

The point is durable by now, so nothing here can fail the backup: what does not work is told as a warning, stays in the
ledger, and is done by a later sweep. The order is the one in which data can be lost least: the new base is confirmed
first, the old one destroyed last.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from xbfs_engine.core.errors import XbfsError
from xbfs_engine.core.log import Logger
from xbfs_engine.source.xapi.removal import destroy_data, destroy_vdi, destroy_vm

if TYPE_CHECKING:
    from collections.abc import Awaitable, Mapping, Sequence

    from xbfs_engine.ingest.vm.delta import Delta
    from xbfs_engine.ingest.vm.disks import Bases, Snapshot, TakenDisk
    from xbfs_engine.ingest.vm.older import OlderBases
    from xbfs_engine.source.xapi.ledger import RunLedger
    from xbfs_engine.source.xapi.patience import Patience
    from xbfs_engine.source.xapi.session import Xapi

_log = Logger("xbfs.vm")


class LettingGo:
    """Ends one VM's snapshot after its point was committed. ``warnings`` tells what did not work."""

    def __init__(
        self, xapi: Xapi, patience: Patience, ledger: RunLedger, bases: Bases, older: OlderBases, *, keep_data: bool
    ) -> None:
        self._xapi = xapi
        self._patience = patience
        self._ledger = ledger
        self._bases = bases
        self._older = older
        self._keep_data = keep_data
        self.warnings: list[str] = []

    async def run(self, snapshot: Snapshot, deltas: Mapping[int, Delta]) -> None:
        """Do all of it. Never raises an XbfsError."""
        kept = [disk for disk in snapshot.disks if is_base(disk, deltas[disk.number])]
        for disk in kept:
            await self._attempt("note the new base", self._confirm(disk))
        if await self._attempt("destroy the snapshot", self._end_vm(snapshot)):
            for disk in snapshot.disks:
                if disk in kept:
                    if not self._keep_data:
                        what = f"destroy the data of the snapshot of disk {disk.number}"
                        await self._attempt(what, destroy_data(self._xapi, self._patience, disk.snapshot_ref))
                else:
                    await self._attempt(f"destroy the snapshot of disk {disk.number}", self._end_vdi(disk))
            for needless in snapshot.needless:
                await self._attempt("destroy a snapshot", destroy_vdi(self._xapi, self._patience, needless.ref))
                await self._attempt("note that", self._ledger.gone(needless.item))
        for disk in snapshot.disks:
            if deltas[disk.number].reset:
                # The next run switches it on again, and begins with a full read.
                off = self._xapi.call("VDI.disable_cbt", disk.disk.vdi_ref)
                await self._attempt(f"switch tracking of disk {disk.number} off", off)
        await self._end_older({disk.number: disk.snapshot_uuid for disk in kept}, snapshot.disks)

    async def _confirm(self, disk: TakenDisk) -> None:
        await self._ledger.confirm(disk.item)

    async def _end_vm(self, snapshot: Snapshot) -> None:
        await destroy_vm(self._xapi, self._patience, snapshot.vm_ref)
        await self._ledger.gone(snapshot.item)

    async def _end_vdi(self, disk: TakenDisk) -> None:
        await destroy_vdi(self._xapi, self._patience, disk.snapshot_ref)
        await self._ledger.gone(disk.item)

    async def _end_older(self, kept: Mapping[int, str], disks: Sequence[TakenDisk]) -> None:
        """Destroy the base of the last point, and whatever base of ours a fall-back left behind on the same disks."""
        new = set(kept.values())
        for number, uuid in self._bases.previous.items():
            if uuid not in new:
                await self._attempt(f"destroy the last base of disk {number}", self._older.end_base(number, uuid))
        for disk in disks:
            what = f"destroy old snapshots of disk {disk.number}"
            await self._attempt(what, self._older.end_others(disk.disk.vdi_ref, disk.number, new))

    async def _attempt(self, what: str, work: Awaitable[object]) -> bool:
        try:
            await work
        except XbfsError as exc:
            _log.warning("could not tidy up", what=what, error=exc.message)
            self.warnings.append(f"could not {what}: {exc.message}; the next sweep does")
            return False
        return True


def is_base(disk: TakenDisk, delta: Delta) -> bool:
    """Whether the next delta can begin at this snapshot."""
    return disk.untracked is None and not delta.reset
