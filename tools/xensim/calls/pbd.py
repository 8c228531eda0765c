"""PBD.*: which host sees which SR."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..failures import Failure
from ..storage.manager import storage
from . import call, wire

if TYPE_CHECKING:
    from ..context import Context
    from ..schema import Record, Ref


@call("PBD.create", role="pool-operator")
def create(ctx: Context, args: Record) -> Ref:
    """How a host would reach an SR; not plugged."""
    fields = wire.constructor("PBD", args)
    db = ctx.db
    with db.lock:
        host, sr = db.check("host", str(fields["host"])), db.check("SR", str(fields["SR"]))
        for other in db.refs(sr, "PBDs"):
            if db.text(other, "host") == host:
                raise Failure("PBD_EXISTS", sr, host, other)
        return db.create("PBD", **fields)


@call("PBD.plug", role="pool-operator")
def plug(ctx: Context, pbd: Ref) -> None:
    """Attach the SR to the host; nothing if it is attached."""
    db = ctx.db
    sr, host = db.text(db.check("PBD", pbd), "SR"), db.text(pbd, "host")
    share = storage(ctx).share(sr)
    if share:
        share.plug(
            host, *(db.mapping(*field) for field in ((pbd, "device_config"), (sr, "sm_config"), (sr, "other_config")))
        )
    db.set(pbd, currently_attached=True)
    if share:
        storage(ctx).refresh(sr)


@call("PBD.unplug", role="pool-operator")
def unplug(ctx: Context, pbd: Ref) -> None:
    """Detach the SR from the host unless one of its disks is in use there; nothing if it is detached."""
    db = ctx.db
    with db.lock:
        host, sr = db.text(db.check("PBD", pbd), "host"), db.text(pbd, "SR")
        busy = [vdi for vdi in db.refs(sr, "VDIs") if host in storage(ctx).user_hosts(vdi)]
        if busy:
            raise Failure("VDI_IN_USE", *busy)
        if share := storage(ctx).share(sr):
            share.unplug(host)
        db.set(pbd, currently_attached=False)


@call("PBD.destroy", role="pool-operator")
def destroy(ctx: Context, pbd: Ref) -> None:
    """Drop the object."""
    with ctx.db.lock:
        if ctx.db.flag(ctx.db.check("PBD", pbd), "currently_attached"):
            raise Failure("OPERATION_NOT_ALLOWED", "PBD still attached")
        ctx.db.destroy(pbd)
