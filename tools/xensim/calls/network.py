"""network.*: networks and what they may be used for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from ..failures import Failure
from . import call, wire

if TYPE_CHECKING:
    from ..context import Context
    from ..schema import Record, Ref

# xen-api: the two ways of NBD exclude each other in a pool.
_CONFLICTS: Final = {"nbd": "insecure_nbd", "insecure_nbd": "nbd"}


@call("network.create", role="vm-admin")
def create(ctx: Context, args: Record) -> Ref:
    """A new network inside the pool."""
    fields = wire.constructor("network", args)
    with ctx.db.lock:
        fields["bridge"] = fields.get("bridge") or f"xapi{len(ctx.db.all('network'))}"
        return ctx.db.create("network", **fields)


@call("network.destroy", role="vm-admin")
def destroy(ctx: Context, network: Ref) -> None:
    """Remove a network nobody is plugged into."""
    with ctx.db.lock:
        attached = [vif for vif in ctx.db.refs(network, "VIFs") if ctx.db.flag(vif, "currently_attached")]
        if attached:
            raise Failure("NETWORK_CONTAINS_VIF", *attached)
        pifs = ctx.db.refs(network, "PIFs")
        if pifs:
            raise Failure("NETWORK_CONTAINS_PIF", *pifs)
        ctx.db.destroy(network)


@call("network.add_purpose", role="pool-admin")
def add_purpose(ctx: Context, network: Ref, value: str) -> None:
    """Allow NBD connections over a network."""
    with ctx.db.lock:
        held = ctx.db.refs(network, "purpose")
        conflict = _CONFLICTS.get(value, "")
        if any(conflict in ctx.db.refs(other, "purpose") for other in ctx.db.all("network")):
            raise Failure("NETWORK_INCOMPATIBLE_PURPOSES", value, conflict)
        if value not in held:
            ctx.db.set(network, purpose=[*held, value])


@call("network.remove_purpose", role="pool-admin")
def remove_purpose(ctx: Context, network: Ref, value: str) -> None:
    """The reverse."""
    with ctx.db.lock:
        ctx.db.set(network, purpose=[held for held in ctx.db.refs(network, "purpose") if held != value])
