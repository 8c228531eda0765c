"""SR.*: storage repositories."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from ..failures import Failure
from ..storage.kinds import KINDS
from ..storage.manager import storage
from . import call

if TYPE_CHECKING:
    from ..context import Context
    from ..schema import Ref, Value

_UNLIMITED: Final = 16 << 40
"""Bytes of an SR that was made without a size."""


@call("SR.create", role="pool-operator")
def create(
    ctx: Context,
    host: Ref,
    device_config: dict[str, str],
    physical_size: int,
    name_label: str,
    name_description: str,
    type_: str,
    content_type: str,
    shared: bool,
    sm_config: dict[str, str] | None = None,
) -> Ref:
    """A new, empty SR, plugged into ``host``, or into every host if shared."""
    ctx.db.check("host", host)
    sr = _record(ctx, "", name_label, name_description, type_, content_type, shared, sm_config)
    ctx.db.set(sr, physical_size=physical_size or _UNLIMITED)
    for one in ctx.db.all("host") if shared else [host]:
        pbd = ctx.ref("PBD.create", {"host": one, "SR": sr, "device_config": device_config})
        ctx.invoke("PBD.plug", pbd)
    return sr


@call("SR.introduce", role="pool-operator")
def introduce(
    ctx: Context,
    uuid: str,
    name_label: str,
    name_description: str,
    type_: str,
    content_type: str,
    shared: bool,
    sm_config: dict[str, str] | None = None,
) -> Ref:
    """The object of an SR that exists; PBDs are made by the caller, and SR.scan finds its disks."""
    sr = _record(ctx, uuid, name_label, name_description, type_, content_type, shared, sm_config)
    ctx.db.set(sr, physical_size=_UNLIMITED)
    if type_ == "nfs":
        storage(ctx).store.introduce(ctx.db.text(sr, "uuid"))
    return sr


@call("SR.forget", role="pool-operator")
def forget(ctx: Context, sr: Ref) -> None:
    """Drop the objects and leave the disks alone."""
    db = ctx.db
    with db.lock:
        _check_unplugged(ctx, sr)
        storage(ctx).store.forget(db.text(sr, "uuid"))
        for ref in [*db.refs(sr, "VDIs"), *db.refs(sr, "PBDs"), sr]:
            db.destroy(ref)


@call("SR.destroy", role="pool-operator")
def destroy(ctx: Context, sr: Ref) -> None:
    """Drop the objects and delete the disks."""
    uuid = ctx.db.text(ctx.db.check("SR", sr), "uuid")
    if any(ctx.db.flag(vdi, "managed") for vdi in ctx.db.refs(sr, "VDIs")):
        raise Failure("SR_NOT_EMPTY")
    forget(ctx, sr)
    storage(ctx).store.drop_sr(uuid)


@call("SR.scan", role="vm-power-admin")
def scan(ctx: Context, sr: Ref) -> None:
    """Bring objects and figures in line with what is there."""
    manager = storage(ctx)
    if not manager.hosts(ctx.db.check("SR", sr)):
        raise Failure("SR_NOT_ATTACHED" if ctx.db.refs(sr, "PBDs") else "SR_HAS_NO_PBDS", sr)
    if share := manager.share(sr):
        manager.store.scan(share)
    manager.refresh(sr, *ctx.db.refs(sr, "VDIs"), scan=True)


@call("SR.update", role="pool-operator")
def update(ctx: Context, sr: Ref) -> None:
    """Bring the figures up to date."""
    manager = storage(ctx)
    if share := manager.share(ctx.db.check("SR", sr)):
        share.measure()
    manager.refresh(sr)


@call("SR.get_supported_types", role="read-only")
def get_supported_types(ctx: Context) -> Value:
    """The types a pool can have."""
    _ = ctx
    return list(KINDS)


def _record(
    ctx: Context,
    uuid: str,
    name_label: str,
    name_description: str,
    type_: str,
    content_type: str,
    shared: bool,
    sm_config: dict[str, str] | None,
) -> Ref:
    kind = KINDS.get(type_)
    if kind is None:
        raise Failure("SR_UNKNOWN_DRIVER", type_)
    if type_.startswith("lvm"):
        sm_config = {"use_vhd": "true", "allocation": "thick"} | (sm_config or {})
    return ctx.db.create(
        "SR",
        uuid=uuid,
        name_label=name_label,
        name_description=name_description,
        type=type_,
        content_type=content_type or "user",
        shared=shared,
        sm_config=sm_config or {},
        allowed_operations=list(kind.operations),
    )


def _check_unplugged(ctx: Context, sr: Ref) -> None:
    if storage(ctx).hosts(ctx.db.check("SR", sr)):
        raise Failure("SR_HAS_PBD", sr)
