"""VDI.*: disks, their snapshots and copies, and how to read them over NBD. CBT has its own module, cbt.py."""

from __future__ import annotations

import uuid as uuids
from typing import TYPE_CHECKING

from ..failures import Failure
from ..schema import EPOCH, NULL
from ..storage.kinds import EXTENT, SIZE_MOST, SIZE_STEP
from ..storage.manager import MIGRATIONS_MOST, storage
from ..storage.tracking import backend_failure
from . import call, wire

if TYPE_CHECKING:
    from ..context import Context
    from ..schema import Record, Ref, Value

# What a snapshot, clone or copy takes over from its VDI (xen-api, xapi_vdi.ml).
_INHERITED = ("name_label", "name_description", "type", "sharable", "other_config", "xenstore_data", "tags", "on_boot")


@call("VDI.create", role="vm-admin")
def create(ctx: Context, args: Record) -> Ref:
    """An empty disk; VHDs are rounded up to 2 MiB."""
    fields = wire.constructor("VDI", args)
    db, manager = ctx.db, storage(ctx)
    sr = db.check("SR", str(fields["SR"]))
    _check_attached(ctx, sr)
    kind = manager.kind(sr)
    if not kind.writable:
        raise Failure("SR_OPERATION_NOT_SUPPORTED", sr)
    config = {key: value for key, value in _mapping(fields, "sm_config").items() if key == "type"}
    raw = config.get("type") == "raw" or not kind.cbt
    size_bytes = _rounded(int(str(fields["virtual_size"])), raw=raw, thick=kind.thick)
    with db.lock:
        if manager.free(sr) < (needed := manager.full_size(sr, size_bytes)):
            raise Failure("SR_FULL", str(needed), str(manager.free(sr)))
        uuid = str(uuids.uuid4())
        manager.store.create(uuid, db.text(sr, "uuid"), size_bytes, raw=raw)
        fields |= {"virtual_size": size_bytes, "sm_config": config, "managed": True}
        return _publish(ctx, fields | {"uuid": uuid, "location": uuid})


@call("VDI.destroy", role="vm-admin")
def destroy(ctx: Context, vdi: Ref) -> None:
    """Remove a disk; its changes, if tracked, go on in the log of its child."""
    db, manager = ctx.db, storage(ctx)
    _check_managed(ctx, vdi)
    with db.lock:
        if manager.users(vdi):
            raise Failure("VDI_IN_USE", vdi, "destroy")
        sr, uuid = db.text(vdi, "SR"), db.text(vdi, "uuid")
        manager.store.destroy(uuid)
        for vbd in db.refs(vdi, "VBDs"):
            db.destroy(vbd)
        db.destroy(vdi)
    manager.refresh(sr)


@call("VDI.snapshot", role="vm-admin")
def snapshot(ctx: Context, vdi: Ref, driver_params: dict[str, str] | None = None) -> Ref:
    """A read-only copy of this moment; the log of changes goes with it."""
    _ = driver_params
    own: Record = {"is_a_snapshot": True, "snapshot_of": vdi, "snapshot_time": ctx.world.clock.now()}
    return _split(ctx, vdi, own, "cbt_enabled")


@call("VDI.clone", role="vm-admin")
def clone(ctx: Context, vdi: Ref, driver_params: dict[str, str] | None = None) -> Ref:
    """A writable disk that shares what is there; not tracked."""
    _ = driver_params
    return _split(ctx, vdi, {"snapshot_time": EPOCH})


@call("VDI.copy", role="vm-admin")
def copy(ctx: Context, vdi: Ref, sr: Ref = NULL, base_vdi: Ref = NULL, into_vdi: Ref = NULL) -> Ref:
    """All bytes again, in a new disk of an SR or in one that is there; not tracked."""
    _ = base_vdi
    db, manager = ctx.db, storage(ctx)
    _check_managed(ctx, vdi)
    manager.refuse_metadata(vdi)
    if manager.writers(vdi):
        raise Failure("VDI_IN_USE", vdi, "copy")
    target, fresh = into_vdi, into_vdi == NULL
    if fresh:
        target = ctx.ref("VDI.create", _inherited(ctx, vdi, "virtual_size", "read_only") | {"SR": sr})
    elif db.number(target, "virtual_size") < (size_bytes := db.number(vdi, "virtual_size")):
        raise Failure("VDI_TOO_SMALL", target, str(size_bytes))
    _fill(ctx, vdi, target, fresh=fresh)
    manager.refresh(db.text(target, "SR"), target)
    return target


@call("VDI.pool_migrate", role="vm-power-admin")
def pool_migrate(ctx: Context, vdi: Ref, sr: Ref, options: dict[str, str]) -> Ref:
    """Move the disk of a running VM to another SR: a new VDI takes its place."""
    _ = options
    db, manager = ctx.db, storage(ctx)
    _check_managed(ctx, vdi)
    if db.flag(vdi, "cbt_enabled"):
        raise Failure("VDI_CBT_ENABLED", vdi)
    vbds = manager.users(vdi)
    if not vbds:
        raise Failure("VDI_NEEDS_VM_FOR_MIGRATE", vdi)
    if not manager.migrations.acquire(blocking=False):
        raise Failure("TOO_MANY_STORAGE_MIGRATES", str(MIGRATIONS_MOST))
    try:
        target = ctx.ref("VDI.create", _inherited(ctx, vdi, "virtual_size", "read_only") | {"SR": sr})
        with manager.store.mirror(db.text(vdi, "uuid"), db.text(target, "uuid")):
            _fill(ctx, vdi, target, fresh=True)
            for vbd in vbds:
                manager.unplug_vbd(vbd)
                db.set(vbd, VDI=target)
                manager.plug_vbd(vbd)
        ctx.invoke("VDI.destroy", vdi)
    finally:
        manager.migrations.release()
    manager.refresh(sr, target)
    return target


def _fill(ctx: Context, vdi: Ref, target: Ref, *, fresh: bool) -> None:
    """Copy the bytes, with progress; a target made for it goes again if that fails or is cancelled. Raises Failure."""
    db, task = ctx.db, ctx.task

    def progress(fraction: float) -> None:
        if fault := ctx.world.faults.take("storage.copy", vdi):
            fault.before(ctx.world.clock)
        if task:
            task.check()
            task.progress(fraction)

    try:
        storage(ctx).store.copy(db.text(vdi, "uuid"), db.text(target, "uuid"), progress)
    except Failure:
        if fresh:
            ctx.invoke("VDI.destroy", target)
        raise


@call("VDI.resize", role="vm-admin")
def resize(ctx: Context, vdi: Ref, size: int) -> None:
    """Grow a disk that is not attached; SM refuses to shrink."""
    db, manager = ctx.db, storage(ctx)
    _check_managed(ctx, vdi)
    manager.refuse_metadata(vdi)
    if manager.users(vdi):
        raise Failure("VDI_IN_USE", vdi, "resize")
    sr, old = db.text(vdi, "SR"), db.number(vdi, "virtual_size")
    node = manager.store.node(db.text(vdi, "uuid"))
    if manager.share(sr):
        raise Failure("SR_OPERATION_NOT_SUPPORTED", sr)
    size_bytes = _rounded(size, raw=node.raw, thick=manager.kind(sr).thick)
    if size_bytes < old:
        raise backend_failure(79, "VDI Invalid size [opterr=shrinking not allowed]")
    needed = manager.full_size(sr, size_bytes) - manager.full_size(sr, old)
    if manager.free(sr) < needed:
        raise backend_failure(44, f"There is insufficient space [opterr=need {needed} bytes]")
    manager.check_tracking(vdi, "resize")
    manager.store.resize(node.uuid, size_bytes)
    manager.refresh(sr, vdi)


@call("VDI.resize_online", role="vm-admin")
def resize_online(ctx: Context, vdi: Ref, size: int) -> None:
    """No driver of ours can."""
    _ = size
    raise Failure("SR_OPERATION_NOT_SUPPORTED", ctx.db.text(ctx.db.check("VDI", vdi), "SR"))


@call("VDI.forget", role="vm-admin")
def forget(ctx: Context, vdi: Ref) -> None:
    """Drop the object, not the disk."""
    with ctx.db.lock:
        ctx.db.check("VDI", vdi)
        for vbd in ctx.db.refs(vdi, "VBDs"):
            ctx.db.destroy(vbd)
        ctx.db.destroy(vdi)


@call("VDI.update", role="vm-admin")
def update(ctx: Context, vdi: Ref) -> None:
    """Ask the driver for the present figures."""
    sr = ctx.db.text(ctx.db.check("VDI", vdi), "SR")
    storage(ctx).refresh(sr, vdi)


@call("VDI.get_nbd_info", role="vm-admin")
def get_nbd_info(ctx: Context, vdi: Ref) -> Value:
    """Where to read a VDI: each address on a network with an NBD purpose of each host that sees its SR."""
    db, manager, world = ctx.db, storage(ctx), ctx.world
    db.check("VDI", vdi)
    manager.refuse_metadata(vdi)
    session = ctx.session.ref if ctx.session else NULL
    found: list[Record] = []
    for host in manager.hosts(db.text(vdi, "SR")):
        node = world.nodes[host]
        for pif in db.refs(host, "PIFs"):
            purposes = set(db.refs(db.text(pif, "network"), "purpose"))
            if not db.flag(pif, "currently_attached") or not purposes & {"nbd", "insecure_nbd"}:
                continue
            addresses = [db.text(pif, "IP"), *(text.partition("/")[0] for text in db.refs(pif, "IPv6"))]
            found += [
                {
                    "exportname": f"/{db.text(vdi, 'uuid')}?session_id={session}",
                    "address": address,
                    "port": manager.nbd.port,
                    "cert": node.certificate_pem,
                    "subject": node.subject,
                }
                for address in addresses
                if address
            ]
    return found


def _split(ctx: Context, vdi: Ref, own: Record, *inherited: str) -> Ref:
    """A snapshot or clone: a second disk on the same base, and its object."""
    db, manager = ctx.db, storage(ctx)
    _check_managed(ctx, vdi)
    manager.refuse_metadata(vdi)
    sr = db.text(vdi, "SR")
    _check_attached(ctx, sr)
    if "vdi_snapshot" not in manager.kind(sr).operations:
        raise Failure("SR_OPERATION_NOT_SUPPORTED", sr)
    if db.flag(vdi, "sharable"):
        raise Failure("VDI_IS_SHARABLE", vdi)
    if db.text(vdi, "on_boot") == "reset":
        raise Failure("VDI_ON_BOOT_MODE_INCOMPATIBLE_WITH_OPERATION")
    with db.lock:
        # On a thick SR the disk gets a new leaf of full size, while its old one is deflated to what is written.
        if manager.free(sr) < max(EXTENT, manager.full_size(sr, db.number(vdi, "virtual_size"))):
            raise backend_failure(44, "There is insufficient space [opterr=LVMNoVolume]")
        uuid = str(uuids.uuid4())
        tracked = "cbt_enabled" in inherited and manager.check_tracking(vdi, "snapshot")
        manager.store.snapshot(db.text(vdi, "uuid"), uuid, tracked=tracked)
        fields = _inherited(ctx, vdi, "SR", "virtual_size", *inherited)
        return _publish(ctx, fields | own | {"uuid": uuid, "location": uuid, "managed": True})


def _inherited(ctx: Context, vdi: Ref, *more: str) -> Record:
    record = ctx.db.get(vdi)
    return {name: record[name] for name in (*_INHERITED, *more)}


def _publish(ctx: Context, fields: Record) -> Ref:
    manager = storage(ctx)
    vdi = ctx.db.create("VDI", **fields)
    manager.describe_use(vdi)
    manager.refresh(str(fields["SR"]), vdi, str(fields.get("snapshot_of", NULL)))
    return vdi


def _rounded(size_bytes: int, *, raw: bool, thick: bool) -> int:
    if size_bytes < 0:
        raise Failure("VDI_TOO_SMALL", NULL, str(SIZE_STEP))
    step = EXTENT if raw and thick else SIZE_STEP
    rounded = max(step, -(-size_bytes // step) * step)
    if not raw and rounded > SIZE_MOST:
        raise Failure("VDI_TOO_LARGE", str(size_bytes), str(SIZE_MOST))
    return rounded


def _check_attached(ctx: Context, sr: Ref) -> None:
    if not ctx.db.refs(sr, "PBDs"):
        raise Failure("SR_HAS_NO_PBDS", sr)
    if not storage(ctx).hosts(sr):
        raise Failure("SR_NOT_ATTACHED", sr)


def _check_managed(ctx: Context, vdi: Ref) -> None:
    if not ctx.db.flag(ctx.db.check("VDI", vdi), "managed"):
        raise Failure("VDI_NOT_MANAGED", vdi)


def _mapping(fields: Record, name: str) -> dict[str, str]:
    value = fields.get(name) or {}
    assert isinstance(value, dict)
    return value
