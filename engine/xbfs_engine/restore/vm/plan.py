"""What a restore is going to make, decided before anything is made: disks, networks, identity, and what is left out.

Pure: from a restore point, a pool as it was read, and wishes. Everything that can be refused ahead is refused here.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final, NamedTuple

from xbfs_engine.codec.wire import Record
from xbfs_engine.core.errors import ObjectNotFound, UsageError, VmNotReady
from xbfs_engine.core.limits import GIB
from xbfs_engine.restore.vm.target import names_of, network_called, sr_called
from xbfs_engine.source.xapi.selection import one_vm
from xbfs_engine.source.xapi.vm_record import RECORD_KEY, vm_record_of

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from xbfs_engine.catalog.restore_point import DiskRecord, RestorePoint
    from xbfs_engine.restore.vm.target import Network, Target
    from xbfs_engine.source.xapi.inventory import Sr, Vm
    from xbfs_engine.source.xapi.vm_record import DiskShape, Plain, VifShape, VmRecord

_NAME_MAX: Final = 200
"""Characters of a VM's name in the names of its disks."""

_CD: Final = "CD"


@dataclass(frozen=True, slots=True)
class VmWishes:
    """``sr``, values of ``networks``: names or uuids of the pool's; keys of ``networks``: of the VM's at its backup.

    ``name``: None for the name it had. ``disks``: numbers, none for all. ``keep_identity``: its uuid and MACs too.
    """

    sr: str
    name: str | None
    disks: frozenset[int]
    networks: Mapping[str, str]
    keep_identity: bool


class DiskPlan(NamedTuple):
    """A VDI to make: ``name`` is its name on the pool, ``vbd`` the VBD that the VM had for it."""

    disk: DiskRecord
    name: str
    description: str
    vbd: Plain

    @property
    def number(self) -> int:
        """Its number in the restore point: the VBD's userdevice."""
        return self.disk.number


class VifPlan(NamedTuple):
    """A VIF to make, in the pool's network. ``mac``: that it had."""

    device: str
    mac: str
    vif: Plain
    network: Network


@dataclass(frozen=True, slots=True)
class VmPlan:
    """A VM to make. ``drives``: VBDs of CD drives, which come back empty. ``left_out``: what does not come back."""

    point: RestorePoint
    record: VmRecord
    name: str
    sr: Sr
    disks: tuple[DiskPlan, ...]
    drives: tuple[Plain, ...]
    vifs: tuple[VifPlan, ...]
    keep_identity: bool
    vtpm_allowed: bool
    left_out: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class DisksPlan:
    """VDIs to make without a VM of their own. ``attach``: the VM that gets them."""

    point: RestorePoint
    sr: Sr
    disks: tuple[DiskPlan, ...]
    attach: Vm | None


def plan_vm(point: RestorePoint, target: Target, wishes: VmWishes) -> VmPlan:
    """How the VM of a point comes back.

    Raises VmNotReady: no record of the VM, no room, or it is there already and its identity is wanted. ObjectNotFound:
    SR or networks. UsageError: no such disk or network in the point. WireError, FormatTooNew: of the point.
    """
    if RECORD_KEY not in point.vm:
        raise VmNotReady(
            f"restore point {point.id[:12]} knows the disks of {point.vm_name!r}, but nothing else of the VM",
            hint="restore disks with --disk, and attach them to a VM that you make",
        )
    record = vm_record_of(point.vm)
    chosen = _chosen(point, wishes.disks)
    sr = sr_called(target, wishes.sr)
    _check_room(sr, chosen)
    left_out = [*record.notes]
    shapes: dict[int, DiskShape] = {}
    drives: list[Plain] = []
    for shape in record.disks:
        vbd = Record(shape.vbd, "VBD of the restore point")
        position, kind = vbd.text("userdevice", 64), vbd.text("type", 64)
        if kind == _CD:
            drives.append(shape.vbd)
            if shape.vdi is not None:
                left_out.append(f"CD {_vdi_name(shape) or 'without a name'}: its drive {position} comes back empty")
        elif position.isascii() and position.isdigit() and len(position) < 4 and point.disk(int(position)):
            shapes[int(position)] = shape
            if all(disk.number != int(position) for disk in chosen):
                left_out.append(f"disk {position}: it was not asked for")
        else:
            left_out.append(f"disk {position} ({_vdi_name(shape)}): it is not in the restore point")
    vtpm_allowed = target.inventory.restrictions.get("restrict_vtpm") == "false"
    if record.vtpms and not vtpm_allowed:
        left_out.append("vTPM: the pool's licence does not include it")
    if wishes.keep_identity:
        _check_absent(point, target)
    return VmPlan(
        point=point,
        record=record,
        name=wishes.name if wishes.name is not None else point.vm_name,
        sr=sr,
        disks=tuple(_disk_plan(disk, shapes.get(disk.number)) for disk in chosen),
        drives=tuple(drives),
        vifs=_vif_plans(record.vifs, target, wishes.networks),
        keep_identity=wishes.keep_identity,
        vtpm_allowed=vtpm_allowed,
        left_out=tuple(left_out),
    )


def plan_disks(point: RestorePoint, target: Target, *, sr: str, disks: frozenset[int], attach: str | None) -> DisksPlan:
    """How disks of a point come back by themselves, named after VM, number and time. Raises as ``plan_vm``."""
    chosen = _chosen(point, disks)
    found = sr_called(target, sr)
    _check_room(found, chosen)
    time = _time(point)
    plans = [
        DiskPlan(disk, f"{point.vm_name[:_NAME_MAX]} disk {disk.number} {time}", f"restored from {point.id}", {})
        for disk in chosen
    ]
    return DisksPlan(point, found, tuple(plans), None if attach is None else one_vm(target.inventory, attach))


def _chosen(point: RestorePoint, numbers: Collection[int]) -> list[DiskRecord]:
    unknown = set(numbers) - {disk.number for disk in point.disks}
    if unknown:
        have = ", ".join(str(disk.number) for disk in point.disks) or "none"
        raise UsageError(f"restore point {point.id[:12]} has no disk {min(unknown)}", hint=f"its disks: {have}")
    return [disk for disk in point.disks if not numbers or disk.number in numbers]


def _check_room(sr: Sr, disks: Sequence[DiskRecord]) -> None:
    """Refuse what can not fit; thin SRs need at least what the disks hold."""
    if sr.size_bytes <= 0:
        return  # SM does not know
    needed = sum(disk.size_bytes if sr.thick else disk.data_bytes for disk in disks)
    free = sr.size_bytes - sr.used_bytes
    if needed > free:
        raise VmNotReady(
            f"SR {sr.name} has {free / GIB:.1f} GiB free, the disks need {needed / GIB:.1f} GiB",
            hint="free space on the SR, choose another with --sr, or fewer disks with --disk",
        )


def _check_absent(point: RestorePoint, target: Target) -> None:
    there = target.inventory.vm_by_uuid(point.vm_uuid)
    if there is not None:
        raise VmNotReady(
            f"the pool holds a VM with the uuid {point.vm_uuid} already: {there.name!r}",
            hint="restore a copy without --keep-identity, go back in place with `xbfs rewind`, or delete the VM first",
        )


def _disk_plan(disk: DiskRecord, shape: DiskShape | None) -> DiskPlan:
    vdi = Record(shape.vdi if shape and shape.vdi else {}, "VDI of the restore point")
    name = vdi.text("name_label") if vdi.optional("name_label") else disk.name
    description = vdi.text("name_description") if vdi.optional("name_description") else ""
    return DiskPlan(disk, name, description, shape.vbd if shape else {})


def _vif_plans(shapes: Sequence[VifShape], target: Target, wanted: Mapping[str, str]) -> tuple[VifPlan, ...]:
    """Each VIF with its network: as wished, else the one of the same uuid, else of the same name.

    A network is never made: a VM whose network came up empty would look restored.
    """
    mapped = {source: network_called(target, name) for source, name in wanted.items()}
    used: set[str] = set()
    missing: dict[str, str] = {}
    plans = []
    for shape in shapes:
        network = Record(shape.network, "network of the restore point")
        uuid = network.text("uuid", 64) if network.optional("uuid") else ""
        name = network.text("name_label") if network.optional("name_label") else ""
        keys = [key for key in (uuid, name) if key in mapped]
        used.update(keys)
        found = [mapped[key] for key in keys] or [one for one in target.networks if one.uuid == uuid]
        found = found[:1] or [one for one in target.networks if one.name == name and name]
        if len(found) == 1:
            vif = Record(shape.vif, "VIF of the restore point")
            plans.append(VifPlan(vif.text("device", 64), vif.text("MAC", 64).lower(), shape.vif, found[0]))
        else:
            missing[name or uuid or "without a name"] = "several have this name" if found else "there is none"
    unknown = sorted(set(wanted) - used)
    if unknown:
        names = sorted({str(shape.network.get("name_label", "")) for shape in shapes}) or ["none"]
        raise UsageError(
            f"--network {unknown[0]}=…: the VM was in no such network", hint=f"its networks: {', '.join(names)}"
        )
    if missing:
        told = ", ".join(f"{name!r} ({reason})" for name, reason in missing.items())
        first = next(iter(missing))
        raise ObjectNotFound(
            f"the VM's networks are not on the pool: {told}",
            hint=f"say which to take with --network {first!r}=NETWORK; the pool has: {names_of(target.networks)}",
        )
    return tuple(plans)


def _vdi_name(shape: DiskShape) -> str:
    return str((shape.vdi or {}).get("name_label", ""))


def _time(point: RestorePoint) -> str:
    return datetime.fromtimestamp(point.time_ns // 1_000_000_000, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
