"""VM.*: life cycle, and the setters that do more than store. Snapshots and clones are in vm_snapshot.py."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Final
from uuid import uuid4

from ..failures import Failure
from ..schema import NULL
from . import call, vbd, wire

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ..context import Context
    from ..schema import Record, Ref

BOOT_S: Final = 2.0  # how long a start or a shutdown takes; of our own choosing
# What VM.create must be given though the published model has a default for it (xen-api: create_from_record).
_ALSO_REQUIRED: Final = ("name_label", "name_description")
_ALLOWED: Final = {
    "Halted": (
        "snapshot",
        "clone",
        "copy",
        "create_template",
        "start",
        "start_on",
        "export",
        "metadata_export",
        "destroy",
    ),
    "Running": ("snapshot", "checkpoint", "clean_shutdown", "hard_shutdown", "pool_migrate", "migrate_send", "pause"),
    "Suspended": ("snapshot", "resume", "export", "hard_shutdown", "copy"),
    "Paused": ("snapshot", "unpause", "hard_shutdown"),
}


@call("VM.create", role="vm-admin")
def create(ctx: Context, args: Record) -> Ref:
    """A new halted VM from a record. Raises Failure FIELD_TYPE_ERROR, MEMORY_CONSTRAINT_VIOLATION."""
    for name in _ALSO_REQUIRED:
        if name not in args:
            raise Failure("FIELD_TYPE_ERROR", name)
    fields = wire.constructor("VM", args)
    _check_memory(
        *(int(str(fields[f"memory_{name}"])) for name in ("static_min", "dynamic_min", "dynamic_max", "static_max"))
    )
    if not 0 < int(str(fields["VCPUs_at_startup"])) <= int(str(fields["VCPUs_max"])):
        raise Failure("INVALID_VALUE", "VCPUs_at_startup", str(fields["VCPUs_at_startup"]))
    fields["power_state"] = fields.get("power_state", "Halted")
    other_config = fields["other_config"]
    assert isinstance(other_config, dict)
    fields["other_config"] = {"mac_seed": str(uuid4()), **other_config}
    vm = ctx.db.create("VM", **fields)
    ctx.db.set(vm, domid=-1, metrics=ctx.db.create("VM_metrics"))
    update(ctx, vm)
    return vm


@call("VM.destroy", role="vm-admin")
def destroy(ctx: Context, vm: Ref) -> None:
    """Remove a VM or a snapshot of one; its VDIs stay."""
    with operation(ctx, vm, "destroy", states=("Halted",)):
        remove(ctx, vm)


def remove(ctx: Context, vm: Ref) -> None:
    """The record of a VM and of its parts, unasked."""
    db = ctx.db
    with db.lock:
        for cls, field in (("VBD", "VBDs"), ("VIF", "VIFs"), ("VTPM", "VTPMs"), ("console", "consoles")):
            for ref in db.refs(vm, field):
                ctx.world.vtpm_contents.pop(ref, None)
                db.destroy(db.check(cls, ref))
        for child in db.refs(vm, "children"):
            db.set(child, parent=db.text(vm, "parent"))
        for metrics in (db.text(vm, "metrics"), db.text(vm, "guest_metrics")):
            if db.exists(metrics):
                db.destroy(metrics)
        db.destroy(vm)


@call("VM.start", role="vm-operator")
def start(ctx: Context, vm: Ref, start_paused: bool, force: bool) -> None:
    """Start on a host that sees all its SRs: where it wants to be, or the first."""
    affinity = ctx.db.text(ctx.db.check("VM", vm), "affinity")
    hosts = [affinity] if ctx.db.exists(affinity) else []
    hosts += [host for host in ctx.world.nodes if host not in hosts]
    for host in hosts:
        if all(_visible(ctx, ref, host) for ref in ctx.db.refs(vm, "VBDs")):
            start_on(ctx, vm, host, start_paused, force)
            return
    raise Failure("NO_HOSTS_AVAILABLE")


@call("VM.start_on", role="vm-power-admin")
def start_on(ctx: Context, vm: Ref, host: Ref, start_paused: bool, force: bool) -> None:
    """Start on a given host."""
    db = ctx.db
    if db.flag(db.check("VM", vm), "is_a_template"):
        raise Failure("VM_IS_TEMPLATE", vm)
    if db.flag(vm, "is_a_snapshot"):
        raise Failure("VM_IS_SNAPSHOT", vm, "start")
    with operation(ctx, vm, "start", states=("Halted",)):
        db.set(vm, resident_on=host)  # storage attaches on that host
        try:
            for ref in db.refs(vm, "VBDs"):
                vbd.attach(ctx, ref)
        except Failure:
            _stop(ctx, vm)
            raise
        ctx.world.clock.sleep(BOOT_S)
        for ref in db.refs(vm, "VIFs"):
            db.set(ref, currently_attached=True)
        db.set(vm, power_state="Paused" if start_paused else "Running", domid=db.generation % 65536)
        _renew_guest_metrics(ctx, vm)
        console = db.create("console", VM=vm, protocol="rfb")
        db.set(console, location=f"https://{db.text(host, 'address')}/console?uuid={db.text(console, 'uuid')}")
    update(ctx, vm)


@call("VM.clean_shutdown", role="vm-operator")
def clean_shutdown(ctx: Context, vm: Ref) -> None:
    """The guest stops by itself."""
    with operation(ctx, vm, "clean_shutdown", states=("Running",)):
        ctx.world.clock.sleep(BOOT_S)
        _stop(ctx, vm)


@call("VM.hard_shutdown", role="vm-operator")
def hard_shutdown(ctx: Context, vm: Ref) -> None:
    """Power off."""
    with operation(ctx, vm, "hard_shutdown", states=("Running", "Paused", "Suspended")):
        _stop(ctx, vm)


@call("VM.shutdown", role="vm-operator")
def shutdown(ctx: Context, vm: Ref) -> None:
    """Cleanly if it can."""
    clean_shutdown(ctx, vm)


@call("VM.pause", role="vm-operator")
def pause(ctx: Context, vm: Ref) -> None:
    """Stop the CPUs."""
    with operation(ctx, vm, "pause", states=("Running",)):
        ctx.db.set(vm, power_state="Paused")


@call("VM.unpause", role="vm-operator")
def unpause(ctx: Context, vm: Ref) -> None:
    """Let the CPUs go on."""
    with operation(ctx, vm, "unpause", states=("Paused",)):
        ctx.db.set(vm, power_state="Running")


@call("VM.pool_migrate", role="vm-power-admin")
def pool_migrate(ctx: Context, vm: Ref, host: Ref, options: dict[str, str]) -> None:
    """To another host that sees the same SRs; no disk moves, so CBT does not forbid it."""
    db = ctx.db
    with operation(ctx, vm, "pool_migrate", states=("Running",)):
        for ref in db.refs(vm, "VBDs"):
            if not _visible(ctx, ref, db.check("host", host)):
                raise Failure("VM_REQUIRES_SR", vm, db.text(db.text(ref, "VDI"), "SR"))
        ctx.world.clock.sleep(BOOT_S)
        db.set(vm, resident_on=host)


@call("VM.migrate_send", role="vm-power-admin")
def migrate_send(
    ctx: Context, vm: Ref, dest: dict[str, str], live: bool, vdi_map: dict[str, str], *more: object
) -> Ref:
    """With its disks; refused as long as one of them is tracked. The move itself is not simulated."""
    with operation(ctx, vm, "migrate_send", states=("Running", "Halted", "Suspended")):
        for ref in ctx.db.refs(vm, "VBDs"):
            vdi = ctx.db.text(ref, "VDI")
            if vdi != NULL and ctx.db.flag(vdi, "cbt_enabled"):
                raise Failure("VDI_CBT_ENABLED", vdi)
    raise Failure("NOT_IMPLEMENTED", "VM.migrate_send")


@call("VM.set_bios_strings", role="vm-admin")
def set_bios_strings(ctx: Context, vm: Ref, value: dict[str, str]) -> None:
    """Once in the life of a VM."""
    if ctx.db.mapping(ctx.db.check("VM", vm), "bios_strings"):
        raise Failure("VM_BIOS_STRINGS_ALREADY_SET")
    ctx.db.set(vm, bios_strings=value)


@call("VM.set_memory_limits", role="vm-power-admin")
def set_memory_limits(
    ctx: Context, vm: Ref, static_min: int, static_max: int, dynamic_min: int, dynamic_max: int
) -> None:
    """All four at once, for a halted VM."""
    _check_memory(static_min, dynamic_min, dynamic_max, static_max)
    with operation(ctx, vm, "changing_memory_limits", states=("Halted",)):
        ctx.db.set(
            vm,
            memory_static_min=static_min,
            memory_static_max=static_max,
            memory_dynamic_min=dynamic_min,
            memory_dynamic_max=dynamic_max,
        )


@call("VM.update_allowed_operations", role="pool-admin")
def update_allowed_operations(ctx: Context, vm: Ref) -> None:
    """Work out anew what may be done now."""
    update(ctx, ctx.db.check("VM", vm))


@call("VM.get_allowed_VBD_devices", role="read-only")
def get_allowed_vbd_devices(ctx: Context, vm: Ref) -> list[str]:
    """Free positions for disks."""
    taken = {ctx.db.text(ref, "userdevice") for ref in ctx.db.refs(ctx.db.check("VM", vm), "VBDs")}
    return [str(number) for number in range(vbd.MOST_VBDS) if str(number) not in taken]


@contextmanager
def operation(ctx: Context, vm: Ref, name: str, *, states: tuple[str, ...] = ()) -> Iterator[None]:
    """Do ``name`` to a VM: refused if blocked, in a wrong state, or while something else is done to it."""
    db = ctx.db
    with db.lock:
        state = db.text(db.check("VM", vm), "power_state")
        blocked = db.mapping(vm, "blocked_operations")
        if name in blocked:
            raise Failure("OPERATION_BLOCKED", vm, blocked[name])
        if db.flag(vm, "is_control_domain"):
            raise Failure("OPERATION_NOT_ALLOWED", "This operation is not allowed on dom0")
        if states and state not in states:
            raise Failure("VM_BAD_POWER_STATE", vm, states[0].lower(), state.lower())
        current = db.mapping(vm, "current_operations")
        if current:
            key, running = next(iter(current.items()))
            raise Failure("OTHER_OPERATION_IN_PROGRESS", "VM", vm, running, key)
        key = ctx.task.ref if ctx.task else f"OpaqueRef:{uuid4()}"
        db.set(vm, current_operations={key: name})
    try:
        yield
    finally:
        with db.lock:
            if db.exists(vm):
                left = {other: value for other, value in db.mapping(vm, "current_operations").items() if other != key}
                db.set(vm, current_operations=left)


def update(ctx: Context, vm: Ref) -> None:
    """Set allowed_operations: what the state allows and nobody blocked."""
    blocked = ctx.db.mapping(vm, "blocked_operations")
    allowed = _ALLOWED[ctx.db.text(vm, "power_state")]
    ctx.db.set(vm, allowed_operations=[name for name in allowed if name not in blocked])


def _renew_guest_metrics(ctx: Context, vm: Ref) -> None:
    """XAPI throws the old ones away and makes new ones, live, also of guests without an agent: what is in them are
    keys that xenopsd gives every domain (xen-api: xapi_vm.ml start, xapi_xenops.ml, xenopsd domain.ml)."""
    db = ctx.db
    with db.lock:
        old = db.text(vm, "guest_metrics")
        other = {"platform-feature-multiprocessor-suspend": "1", "has-vendor-device": "0"}
        new = db.create("VM_guest_metrics", live=True, last_updated=ctx.world.clock.now(), other=other)
        db.set(vm, guest_metrics=new)
        if db.exists(old):
            db.destroy(old)


def _stop(ctx: Context, vm: Ref) -> None:
    db = ctx.db
    for ref in db.refs(vm, "VBDs"):
        if db.flag(ref, "currently_attached"):
            vbd.detach(ctx, ref)
    for ref in db.refs(vm, "VIFs"):
        db.set(ref, currently_attached=False)
    for ref in db.refs(vm, "consoles"):
        db.destroy(ref)
    db.set(vm, power_state="Halted", resident_on=NULL, domid=-1)
    update(ctx, vm)


def _visible(ctx: Context, vbd_ref: Ref, host: Ref) -> bool:
    """Whether the host has the SR of a VBD's VDI."""
    db = ctx.db
    vdi = db.text(vbd_ref, "VDI")
    if vdi == NULL:
        return True
    pbds = db.refs(db.text(vdi, "SR"), "PBDs")
    return any(db.text(pbd, "host") == host and db.flag(pbd, "currently_attached") for pbd in pbds)


def _check_memory(static_min: int, dynamic_min: int, dynamic_max: int, static_max: int) -> None:
    if not static_min <= dynamic_min <= dynamic_max <= static_max:
        raise Failure("MEMORY_CONSTRAINT_VIOLATION", "static_min <= dynamic_min <= dynamic_max <= static_max")
