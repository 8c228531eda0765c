"""Which disk of a VM is which disk of a restore point, and whether it can be written. Pure, on an inventory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from xbfs_engine.core.errors import UsageError, VmNotReady

if TYPE_CHECKING:
    from collections.abc import Sequence

    from xbfs_engine.catalog.restore_point import DiskRecord, RestorePoint
    from xbfs_engine.source.xapi.inventory import Inventory, Vbd, Vdi, Vm

_ID_DIGITS = 12


@dataclass(frozen=True, slots=True)
class MatchedDisk:
    """A disk of the VM and what it shall become. ``by_position``: another VDI at the same place of the VM."""

    record: DiskRecord
    vbd: Vbd
    vdi: Vdi
    by_position: bool

    @property
    def number(self) -> int:
        """In the point."""
        return self.record.number


@dataclass(frozen=True, slots=True)
class Matched:
    """``untouched``: disks of the VM that the point does not have, in words."""

    disks: Sequence[MatchedDisk]
    untouched: Sequence[str]


def match(inventory: Inventory, vm: Vm, point: RestorePoint, *, by_position: bool) -> Matched:
    """Find each disk of ``point`` in the VM: the same VDI, or else, with ``by_position``, one of its size in its place.

    Raises UsageError for a point of another VM, VmNotReady where a disk is missing, too small or used elsewhere.
    """
    short = point.id[:_ID_DIGITS]
    if point.vm_uuid != vm.uuid:
        raise UsageError(
            f"restore point {short} is of VM {point.vm_name!r} ({point.vm_uuid}), not of {vm.name!r}",
            hint="choose a point of this VM (`xbfs points`), or make a new VM of it with `xbfs restore`",
        )
    vbds = [vbd for vbd in inventory.disks(vm) if vbd.type != "CD" and vbd.vdi]
    found = [_find(inventory, vbds, record, by_position=by_position) for record in point.disks]
    missing = [record for record, disk in zip(point.disks, found, strict=True) if disk is None]
    if missing:
        told = ", ".join(f"{record.number} ({record.name or record.vdi_uuid})" for record in missing)
        replaced = [r for r in missing if any(_is_like(inventory, vbd, r) for vbd in vbds)]
        hint = f"bring a disk back with `xbfs restore {short} --disk {missing[0].number}`"
        if replaced:
            hint += f"; disk {replaced[0].number} has another VDI of its size: --full-compare rewinds that one"
        raise VmNotReady(f"{vm.name!r} no longer has these disks of restore point {short}: {told}", hint=hint)
    disks = [disk for disk in found if disk is not None]
    for disk in disks:
        _check(inventory, vm, disk)
    taken = {disk.vbd.ref for disk in disks}
    untouched = [_told(inventory, vbd) for vbd in vbds if vbd.ref not in taken]
    return Matched(disks, untouched)


def _find(inventory: Inventory, vbds: Sequence[Vbd], record: DiskRecord, *, by_position: bool) -> MatchedDisk | None:
    for vbd in vbds:
        vdi = inventory.vdi_of(vbd)
        if vdi is not None and vdi.uuid == record.vdi_uuid:
            return MatchedDisk(record, vbd, vdi, by_position=False)
    for vbd in vbds if by_position else ():
        vdi = inventory.vdi_of(vbd)
        if vdi is not None and _is_like(inventory, vbd, record):
            return MatchedDisk(record, vbd, vdi, by_position=True)
    return None


def _is_like(inventory: Inventory, vbd: Vbd, record: DiskRecord) -> bool:
    vdi = inventory.vdi_of(vbd)
    return vdi is not None and vbd.number == record.number and vdi.size_bytes == record.size_bytes


def _check(inventory: Inventory, vm: Vm, disk: MatchedDisk) -> None:
    vdi = disk.vdi
    if vdi.size_bytes < disk.record.size_bytes:
        raise VmNotReady(
            f"disk {disk.number} of {vm.name!r} has {vdi.size_bytes} bytes, fewer than the {disk.record.size_bytes} "
            "of the restore point",
            hint=f"bring it back as a new disk with `xbfs restore --disk {disk.number}`",
        )
    for vbd in inventory.vbds_of_vdi.get(vdi.ref, ()):
        user = inventory.vms.get(vbd.vm)
        if vbd.attached and user is not None and not user.is_control_domain and user.ref != vm.ref:
            raise VmNotReady(
                f"disk {disk.number} of {vm.name!r} is attached to {user.name!r}", hint="detach it there first"
            )


def _told(inventory: Inventory, vbd: Vbd) -> str:
    vdi = inventory.vdi_of(vbd)
    return f"disk {vbd.position}" + (f" ({vdi.name or vdi.uuid})" if vdi else "")
