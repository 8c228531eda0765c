"""VM.snapshot, clone, copy and revert: VMs made of other VMs, disk after disk."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final
from uuid import uuid4

from ..failures import Failure
from ..schema import NULL
from . import call, vif
from .vm import operation, update

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..context import Context
    from ..schema import Record, Ref

# Fields of a VM that a VM made of it does not take over, and fields of its parts that are the database's own affair.
_OWN: Final = frozenset(
    {
        *("uuid", "power_state", "resident_on", "scheduled_to_be_resident_on", "domid", "current_operations"),
        *("allowed_operations", "VBDs", "VIFs", "VTPMs", "VUSBs", "VGPUs", "consoles", "crash_dumps", "attached_PCIs"),
        *("metrics", "guest_metrics", "snapshots", "children", "parent", "snapshot_of", "is_a_snapshot"),
        *("is_a_template", "is_default_template", "is_control_domain", "snapshot_time", "snapshot_info"),
        *("snapshot_metadata", "blocked_operations", "appliance", "suspend_VDI", "blobs", "groups"),
    }
)
_PART_OWN: Final = frozenset(
    {"uuid", "VM", "VDI", "currently_attached", "metrics", "current_operations", "runtime_properties"}
)


@call("VM.snapshot", role="vm-power-admin")
def snapshot(ctx: Context, vm: Ref, new_name: str, ignore_vdis: list[Ref] | None = None) -> Ref:
    """A snapshot of a VM in any state; disks one after another, all or none. CDs keep their medium."""
    db = ctx.db
    if db.flag(db.check("VM", vm), "is_a_snapshot"):
        raise Failure("VM_IS_SNAPSHOT", vm, "snapshot")
    with operation(ctx, vm, "snapshot"):
        disks = _disks(ctx, vm, ignore_vdis or [])
        for vdi in disks.values():
            if db.flag(vdi, "sharable"):
                raise Failure("VDI_IS_SHARABLE", vdi)
            if db.text(vdi, "on_boot") == "reset":
                raise Failure("VDI_ON_BOOT_MODE_INCOMPATIBLE_WITH_OPERATION")
        state = db.text(vm, "power_state")
        made = _copy_disks(ctx, disks, lambda vdi: ctx.ref("VDI.snapshot", vdi, {}))
        with db.lock:
            copy = _copy_record(ctx, vm, new_name, made)
            db.set(
                copy,
                is_a_template=True,
                is_a_snapshot=True,
                snapshot_of=vm,
                snapshot_time=ctx.world.clock.now(),
                snapshot_info={"power-state-at-snapshot": state, "disk-snapshot-type": "crash_consistent"},
                parent=db.text(vm, "parent"),
            )
            db.set(vm, parent=copy)
        return copy


@call("VM.clone", role="vm-admin")
def clone(ctx: Context, vm: Ref, new_name: str) -> Ref:
    """A halted VM again, its disks cloned."""
    with operation(ctx, vm, "clone", states=("Halted",)):
        return _another(ctx, vm, new_name, lambda vdi: ctx.ref("VDI.clone", vdi, {}))


@call("VM.copy", role="vm-admin")
def copy(ctx: Context, vm: Ref, new_name: str, sr: Ref) -> Ref:
    """A halted VM again, its disks copied (to ``sr`` unless null)."""
    with operation(ctx, vm, "copy", states=("Halted",)):
        return _another(
            ctx, vm, new_name, lambda vdi: ctx.ref("VDI.copy", vdi, sr if sr != NULL else ctx.db.text(vdi, "SR"))
        )


@call("VM.revert", role="vm-power-admin")
def revert(ctx: Context, snapshot_vm: Ref) -> None:
    """Put a VM back to a snapshot: it keeps its uuid, its disks are new VDIs with new uuids."""
    db = ctx.db
    if not db.flag(db.check("VM", snapshot_vm), "is_a_snapshot"):
        raise Failure("VM_IS_NOT_SNAPSHOT", snapshot_vm)
    vm = db.text(snapshot_vm, "snapshot_of")
    if not db.exists(vm):
        raise Failure("VM_REVERT_FAILED", snapshot_vm, "the VM is gone")
    if db.text(vm, "power_state") != "Halted":
        ctx.invoke("VM.hard_shutdown", vm)
    with operation(ctx, vm, "revert"):
        disks = _disks(ctx, snapshot_vm, [])
        made = _copy_disks(ctx, disks, lambda vdi: ctx.ref("VDI.clone", vdi, {}))
        old = _disks(ctx, vm, [])
        with db.lock:
            for part in (*db.refs(vm, "VBDs"), *db.refs(vm, "VIFs")):
                db.destroy(part)
            _copy_parts(ctx, snapshot_vm, vm, made, fresh_macs=False)
            record = {name: value for name, value in db.get(snapshot_vm).items() if name not in _OWN}
            db.set(vm, **(record | {"name_label": db.text(vm, "name_label"), "parent": snapshot_vm}))
        replaced = {db.text(vdi, "snapshot_of"): made[vbd] for vbd, vdi in disks.items()}
        for vdi in old.values():
            for sibling in db.refs(vdi, "snapshots"):
                db.set(sibling, snapshot_of=replaced.get(vdi, NULL))
            ctx.invoke("VDI.destroy", vdi)
    update(ctx, vm)


def _another(ctx: Context, vm: Ref, new_name: str, copy_disk: Callable[[Ref], Ref]) -> Ref:
    made = _copy_disks(ctx, _disks(ctx, vm, []), copy_disk)
    with ctx.db.lock:
        new = _copy_record(ctx, vm, new_name, made, fresh_macs=True)
        ctx.db.set(new, is_a_template=ctx.db.flag(vm, "is_a_template"))
        return new


def _disks(ctx: Context, vm: Ref, ignored: list[Ref]) -> dict[Ref, Ref]:
    """VDI by VBD of the disks that count: no CDs, nothing empty, nothing ignored."""
    db = ctx.db
    with db.lock:
        vbds = [ref for ref in db.refs(vm, "VBDs") if db.text(ref, "type") != "CD" and not db.flag(ref, "empty")]
        return {ref: db.text(ref, "VDI") for ref in vbds if db.text(ref, "VDI") not in ignored}


def _copy_disks(ctx: Context, disks: dict[Ref, Ref], copy_disk: Callable[[Ref], Ref]) -> dict[Ref, Ref]:
    """New VDI by VBD; what was made goes again if one fails."""
    made: dict[Ref, Ref] = {}
    try:
        for done, (vbd, vdi) in enumerate(disks.items()):
            if ctx.task:
                ctx.task.check()
                ctx.task.progress(done / len(disks))
            made[vbd] = copy_disk(vdi)
    except Failure:
        for vdi in made.values():
            ctx.invoke("VDI.destroy", vdi)
        raise
    return made


def _copy_record(ctx: Context, vm: Ref, new_name: str, disks: dict[Ref, Ref], *, fresh_macs: bool = False) -> Ref:
    db = ctx.db
    record: Record = {name: value for name, value in db.get(vm).items() if name not in _OWN}
    if fresh_macs:
        record["other_config"] = db.mapping(vm, "other_config") | {"mac_seed": str(uuid4())}
    record |= {"name_label": new_name, "domid": -1, "power_state": "Halted", "metrics": db.create("VM_metrics")}
    copy = db.create("VM", **record)
    _copy_parts(ctx, vm, copy, disks, fresh_macs=fresh_macs)
    update(ctx, copy)
    return copy


def _copy_parts(ctx: Context, source: Ref, target: Ref, disks: dict[Ref, Ref], *, fresh_macs: bool) -> None:
    """VBDs (with the new disks; those of ignored disks are left out), VIFs and VTPMs."""
    db = ctx.db
    for vbd in db.refs(source, "VBDs"):
        whole = db.text(vbd, "type") == "CD" or db.flag(vbd, "empty")
        if whole or vbd in disks:
            vdi = db.text(vbd, "VDI") if whole else disks[vbd]
            db.create("VBD", **(_part(ctx, vbd) | {"VM": target, "VDI": vdi}))
    for ref in db.refs(source, "VIFs"):
        mac = {"MAC": vif.random_mac()} if fresh_macs else {}
        db.create("VIF", **(_part(ctx, ref) | {"VM": target} | mac))
    if not db.refs(target, "VTPMs"):
        for vtpm in db.refs(source, "VTPMs"):
            new = db.create("VTPM", **(_part(ctx, vtpm) | {"VM": target}))
            ctx.world.vtpm_contents[new] = ctx.world.vtpm_contents.get(vtpm, "")


def _part(ctx: Context, ref: Ref) -> Record:
    # A VBD's device is where the guest sees it; a VIF's is its position.
    own = _PART_OWN | {"device"} if ctx.db.cls(ref) == "VBD" else _PART_OWN
    return {name: value for name, value in ctx.db.get(ref).items() if name not in own}
