"""VDI.enable_cbt, disable_cbt, data_destroy, list_changed_blocks: changed block tracking (xen-api, xapi_vdi.ml)."""

from __future__ import annotations

import base64
from typing import TYPE_CHECKING, Final

from ..failures import Failure
from ..storage.kinds import EXTENT
from ..storage.manager import storage
from ..storage.tracking import backend_failure
from . import call

if TYPE_CHECKING:
    from ..context import Context
    from ..schema import Ref

DATA_DESTROY_S: Final = 4.0
"""How long data_destroy waits for the VBDs of the VDI to vanish (xen-api, xapi_vdi.ml)."""


@call("VDI.enable_cbt", role="vm-admin")
def enable_cbt(ctx: Context, vdi: Ref) -> None:
    """Begin to track; nothing if it is tracked."""
    db, manager = ctx.db, storage(ctx)
    # Only this call is licensed, and the code is spelled this way.
    if db.mapping(ctx.world.pool, "restrictions").get("restrict_cbt") == "true":
        raise Failure("LICENCE_RESTRICTION", "CBT")
    _check_kind(ctx, vdi)
    if db.flag(vdi, "cbt_enabled"):
        return
    sr, node = db.text(vdi, "SR"), manager.store.node(db.text(vdi, "uuid"))
    if node.raw:
        raise backend_failure(66, "VDI type does not support this operation [opterr=raw]")
    if manager.free(sr) < EXTENT:
        raise backend_failure(44, "There is insufficient space [opterr=no room for the CBT log]")
    with db.lock:
        manager.store.tracking.enable(node.uuid, node.size_bytes, attached=bool(manager.writers(vdi)))
        db.set(vdi, cbt_enabled=True)


@call("VDI.disable_cbt", role="vm-admin")
def disable_cbt(ctx: Context, vdi: Ref) -> None:
    """Stop tracking; nothing if it is not tracked."""
    db = ctx.db
    _check_kind(ctx, vdi)
    with db.lock:
        storage(ctx).store.tracking.disable(db.text(vdi, "uuid"))
        db.set(vdi, cbt_enabled=False)


@call("VDI.data_destroy", role="vm-admin")
def data_destroy(ctx: Context, vdi: Ref) -> None:
    """Remove the data of a snapshot and keep its log."""
    db, manager = ctx.db, storage(ctx)
    db.check("VDI", vdi)
    if db.text(vdi, "type") == "cbt_metadata":
        return
    if not db.flag(vdi, "is_a_snapshot"):
        raise Failure("OPERATION_NOT_ALLOWED", f"VDI is not a snapshot: {vdi}")
    if not db.flag(vdi, "cbt_enabled"):
        raise Failure("VDI_NO_CBT_METADATA", vdi)
    _wait_for_vbds(ctx, vdi)
    manager.store.drop_data(db.text(vdi, "uuid"))
    with db.lock:
        config = {key: value for key, value in db.mapping(vdi, "sm_config").items() if key != "vhd-parent"}
        db.set(vdi, type="cbt_metadata", physical_utilisation=0, sm_config=config)
        manager.describe_use(vdi)
    manager.refresh(db.text(vdi, "SR"))


@call("VDI.list_changed_blocks", role="vm-operator")
def list_changed_blocks(ctx: Context, vdi_from: Ref, vdi_to: Ref) -> str:
    """Base64 of a bit per 64 KiB, highest bit first: what was written between the older and the newer VDI."""
    db, manager = ctx.db, storage(ctx)
    for vdi in (vdi_from, vdi_to):
        if not manager.kind(db.text(db.check("VDI", vdi), "SR")).cbt:
            raise Failure("SR_OPERATION_NOT_SUPPORTED", db.text(vdi, "SR"))
        if not db.flag(vdi, "cbt_enabled"):
            raise Failure("VDI_NO_CBT_METADATA", vdi)
    if not db.flag(vdi_to, "is_a_snapshot") and manager.users(vdi_to):
        raise Failure("VDI_IN_USE", vdi_to, "list_changed_blocks")
    bitmap = manager.store.tracking.changes(db.text(vdi_from, "uuid"), db.text(vdi_to, "uuid"))
    return base64.b64encode(bitmap).decode()


def _check_kind(ctx: Context, vdi: Ref) -> None:
    """What enable_cbt and disable_cbt want of a VDI."""
    db = ctx.db
    sr = db.text(db.check("VDI", vdi), "SR")
    if db.flag(vdi, "is_a_snapshot"):
        raise Failure("OPERATION_NOT_ALLOWED", f"VDI is a snapshot: {vdi}")
    if (kind := db.text(vdi, "type")) not in ("user", "system"):
        raise Failure("VDI_INCOMPATIBLE_TYPE", vdi, kind)
    if db.text(vdi, "on_boot") == "reset":
        raise Failure("VDI_ON_BOOT_MODE_INCOMPATIBLE_WITH_OPERATION")
    if not storage(ctx).kind(sr).cbt:
        raise Failure("SR_OPERATION_NOT_SUPPORTED", sr)


def _wait_for_vbds(ctx: Context, vdi: Ref) -> None:
    db, clock = ctx.db, ctx.world.clock
    until = clock.monotonic() + DATA_DESTROY_S
    with db.changed:
        while db.refs(vdi, "VBDs"):
            left = until - clock.monotonic()
            if left <= 0:
                raise Failure("VDI_IN_USE", vdi, "data_destroy")
            db.changed.wait(left * clock.time_scale)
