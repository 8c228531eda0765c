"""From what is on a pool to the VMs and disks of a run, and whether their chains are fit for another snapshot. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

from xbfs_engine.ingest.vm.disks import ChosenVm, LeftOut, VmDisk
from xbfs_engine.source.xapi.inventory import CHAIN_MAX
from xbfs_engine.source.xapi.selection import disks_of

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

    from xbfs_engine.source.xapi.inventory import Inventory, Vdi, Vm


def choose(inventory: Inventory, vm: Vm, exclude: Collection[int]) -> ChosenVm:
    """A VM with its disks. ``exclude``: numbers that are not wanted. Raises ObjectNotFound."""
    disks: list[VmDisk] = []
    left_out: list[LeftOut] = []
    backlog: list[str] = []
    for disk in disks_of(inventory, vm, exclude):
        number, vdi = disk.vbd.number, disk.vdi
        if vdi is None or disk.vbd.type == "CD":
            continue
        if disk.left_out is not None or number is None:
            shown = -1 if number is None else number
            left_out.append(LeftOut(shown, vdi.ref, disk.left_out or "it has no number", disk.fails_snapshot))
            continue
        disks.append(VmDisk(number, vdi.name, vdi.ref, vdi.uuid, vdi.sr, vdi.cbt_enabled, _untrackable(inventory, vdi)))
        backlog += _backlog(inventory, vdi, number)
    return ChosenVm(vm.ref, vm.uuid, vm.name, disks, left_out, backlog)


def _untrackable(inventory: Inventory, vdi: Vdi) -> str | None:
    sr = inventory.srs.get(vdi.sr)
    if sr is None or not sr.tracks_changes:
        return f"SR {sr.name if sr else vdi.sr} does not track changed blocks"
    return None


def _backlog(inventory: Inventory, vdi: Vdi, number: int) -> Iterator[str]:
    """What the SR has to do before another snapshot of the disk is healthy: a chain that only grows breaks at 30."""
    chain = inventory.chain(vdi)
    if chain.pending:
        yield f"disk {number}: {len(chain.pending)} VHDs wait to be coalesced"
    elif chain.depth >= CHAIN_MAX:
        yield f"disk {number}: its chain has {chain.depth} VHDs, the most there can be"
