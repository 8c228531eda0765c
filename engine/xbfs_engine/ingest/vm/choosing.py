"""From what is on a pool to the VMs and disks of a run, and whether these can take another snapshot. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

from xbfs_engine.ingest.vm.disks import ChosenVm, LeftOut, VmDisk
from xbfs_engine.source.xapi.fitness import backlog_of, obstacles
from xbfs_engine.source.xapi.selection import disks_of

if TYPE_CHECKING:
    from collections.abc import Collection

    from xbfs_engine.source.xapi.inventory import Inventory, Vdi, Vm


def choose(inventory: Inventory, vm: Vm, exclude: Collection[int]) -> ChosenVm:
    """A VM with its disks. ``exclude``: numbers that are not wanted. Raises ObjectNotFound."""
    disks: list[VmDisk] = []
    left_out: list[LeftOut] = []
    vdis: list[tuple[str, Vdi]] = []
    for disk in disks_of(inventory, vm, exclude):
        number, vdi = disk.vbd.number, disk.vdi
        if vdi is None or disk.vbd.type == "CD":
            continue
        if disk.left_out is not None or number is None:
            shown = -1 if number is None else number
            left_out.append(LeftOut(shown, vdi.ref, disk.left_out or "it has no number", disk.fails_snapshot))
            continue
        disks.append(VmDisk(number, vdi.name, vdi.ref, vdi.uuid, vdi.sr, vdi.cbt_enabled, _untrackable(inventory, vdi)))
        vdis.append((f"disk {number}", vdi))
    backlog = backlog_of(inventory, vdis)
    return ChosenVm(vm.ref, vm.uuid, vm.name, disks, left_out, backlog, obstacles(inventory, vdis))


def _untrackable(inventory: Inventory, vdi: Vdi) -> str | None:
    sr = inventory.srs.get(vdi.sr)
    if sr is None or not sr.tracks_changes:
        return f"SR {sr.name if sr else vdi.sr} does not track changed blocks"
    return None
