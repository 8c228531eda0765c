"""VBD.*: disks in VMs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from ..failures import Failure
from ..schema import NULL
from . import call, wire

if TYPE_CHECKING:
    from ..context import Context
    from ..schema import Record, Ref

MOST_VBDS: Final = 255


@call("VBD.create", role="vm-admin")
def create(ctx: Context, args: Record) -> Ref:
    """A disk for a VM; userdevice "autodetect" takes the first free one. Not plugged."""
    fields = wire.constructor("VBD", args, optional={"VDI"})
    db = ctx.db
    with db.lock:
        vm = db.check("VM", str(fields["VM"]))
        vdi = str(fields.get("VDI", NULL))
        empty = bool(fields.get("empty"))
        if not empty:
            db.check("VDI", vdi)
            _check_mode(ctx, vdi, str(fields["mode"]), str(fields["type"]))
        elif fields["type"] != "CD":
            raise Failure("VBD_NOT_REMOVABLE_MEDIA", NULL)
        taken = {db.text(vbd, "userdevice") for vbd in db.refs(vm, "VBDs")}
        device = str(fields["userdevice"])
        if device == "autodetect":
            device = next((str(n) for n in range(MOST_VBDS) if str(n) not in taken), "")
            if not device:
                raise Failure("DEVICE_ALREADY_EXISTS", "autodetect")
        if device in taken:
            raise Failure("DEVICE_ALREADY_EXISTS", device)
        if not device.isdigit():
            raise Failure("INVALID_DEVICE", device)
        fields |= {"VDI": NULL if empty else vdi, "userdevice": device, "currently_attached": False, "device": ""}
        return db.create("VBD", **fields)


@call("VBD.destroy", role="vm-admin")
def destroy(ctx: Context, vbd: Ref) -> None:
    """Remove a disk from a VM; the VDI stays."""
    with ctx.db.lock:
        if ctx.db.flag(ctx.db.check("VBD", vbd), "currently_attached"):
            raise Failure("OPERATION_NOT_ALLOWED", f"VBD '{ctx.db.text(vbd, 'uuid')}' still attached")
        ctx.db.destroy(vbd)


@call("VBD.plug", role="vm-admin")
def plug(ctx: Context, vbd: Ref) -> None:
    """Attach to the running VM."""
    db = ctx.db
    vm = db.text(db.check("VBD", vbd), "VM")
    if db.text(vm, "power_state") != "Running":
        raise Failure("VM_BAD_POWER_STATE", vm, "running", db.text(vm, "power_state").lower())
    if db.flag(vbd, "currently_attached"):
        raise Failure("DEVICE_ALREADY_ATTACHED", vbd)
    attach(ctx, vbd)


@call("VBD.unplug", role="vm-admin")
def unplug(ctx: Context, vbd: Ref) -> None:
    """Detach from the running VM."""
    db = ctx.db
    if not db.flag(db.check("VBD", vbd), "currently_attached"):
        raise Failure("DEVICE_ALREADY_DETACHED", vbd)
    if not db.flag(vbd, "unpluggable"):
        raise Failure("DEVICE_DETACH_REJECTED", "VBD", vbd, "VBD is not unpluggable")
    detach(ctx, vbd)


@call("VBD.unplug_force", role="vm-admin")
def unplug_force(ctx: Context, vbd: Ref) -> None:
    """Detach, whatever the guest says; nothing if it is not attached."""
    if ctx.db.flag(ctx.db.check("VBD", vbd), "currently_attached"):
        detach(ctx, vbd)


@call("VBD.assert_attachable", role="vm-admin")
def assert_attachable(ctx: Context, vbd: Ref) -> None:
    """Whether the VM could be given the disk now. Raises Failure VDI_IN_USE."""
    db = ctx.db
    vdi = db.text(db.check("VBD", vbd), "VDI")
    if vdi == NULL or db.flag(vdi, "sharable") or db.flag(db.text(vbd, "VM"), "is_control_domain"):
        return
    for other in db.refs(vdi, "VBDs"):
        foreign = other != vbd and not db.flag(db.text(other, "VM"), "is_control_domain")
        if foreign and db.flag(other, "currently_attached") and "RW" in (db.text(other, "mode"), db.text(vbd, "mode")):
            raise Failure("VDI_IN_USE", vdi)


@call("VBD.set_mode", role="vm-admin")
def set_mode(ctx: Context, vbd: Ref, value: str) -> None:
    """Read only or not, for a VM that is halted."""
    vm = ctx.db.text(ctx.db.check("VBD", vbd), "VM")
    if ctx.db.text(vm, "power_state") != "Halted":
        raise Failure("VM_BAD_POWER_STATE", vm, "halted", ctx.db.text(vm, "power_state").lower())
    ctx.db.set(vbd, mode=value)


@call("VBD.eject", role="vm-operator")
def eject(ctx: Context, vbd: Ref) -> None:
    """Take out a CD."""
    if ctx.db.text(ctx.db.check("VBD", vbd), "type") != "CD":
        raise Failure("VBD_NOT_REMOVABLE_MEDIA", vbd)
    if ctx.db.flag(vbd, "empty"):
        raise Failure("VBD_IS_EMPTY", vbd)
    ctx.db.set(vbd, empty=True, VDI=NULL)


@call("VBD.insert", role="vm-operator")
def insert(ctx: Context, vbd: Ref, vdi: Ref) -> None:
    """Put in a CD."""
    if not ctx.db.flag(ctx.db.check("VBD", vbd), "empty"):
        raise Failure("VBD_NOT_EMPTY", vbd)
    ctx.db.set(vbd, empty=False, VDI=ctx.db.check("VDI", vdi))


def attach(ctx: Context, vbd: Ref) -> None:
    """Attach, with what storage has to do for it. Raises Failure."""
    db = ctx.db
    if not db.flag(vbd, "empty"):
        ctx.world.storage.plug_vbd(vbd)
    db.set(vbd, currently_attached=True, device=_device(int(db.text(vbd, "userdevice"))))


def detach(ctx: Context, vbd: Ref) -> None:
    """The reverse. Raises Failure."""
    if not ctx.db.flag(vbd, "empty"):
        ctx.world.storage.unplug_vbd(vbd)
    ctx.db.set(vbd, currently_attached=False, device="")


def _device(number: int) -> str:
    """xvda … xvdz, xvdaa …"""
    first, second = divmod(number, 26)
    return "xvd" + (chr(ord("a") + first - 1) if first else "") + chr(ord("a") + second)


def _check_mode(ctx: Context, vdi: Ref, mode: str, kind: str) -> None:
    if kind == "CD" and mode == "RW":
        raise Failure("VBD_CDS_MUST_BE_READONLY")
    if ctx.db.text(vdi, "type") == "cbt_metadata":
        raise Failure("VDI_INCOMPATIBLE_TYPE", vdi, "cbt_metadata")
    if mode == "RW" and ctx.db.flag(vdi, "read_only"):
        raise Failure("VDI_READONLY", vdi)
