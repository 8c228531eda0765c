"""VTPM.*: trusted platform modules of VMs. Their contents are for the local superuser only, and never in a record."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..failures import Failure
from . import call

if TYPE_CHECKING:
    from ..context import Context
    from ..schema import Ref


@call("VTPM.create", role="vm-admin")
def create(ctx: Context, vm: Ref, is_unique: bool) -> Ref:
    """A new, empty module for a halted VM that has none."""
    db = ctx.db
    with db.lock:
        if db.mapping(ctx.world.pool, "restrictions").get("restrict_vtpm", "true") != "false":
            raise Failure("LICENCE_RESTRICTION", "VTPM")
        _require_halted(ctx, db.check("VM", vm))
        if db.refs(vm, "VTPMs"):
            raise Failure("VTPM_MAX_AMOUNT_REACHED", "1")
        return db.create("VTPM", VM=vm, is_unique=is_unique)


@call("VTPM.destroy", role="vm-admin")
def destroy(ctx: Context, vtpm: Ref) -> None:
    """Remove the module of a halted VM."""
    with ctx.db.lock:
        _require_halted(ctx, ctx.db.text(ctx.db.check("VTPM", vtpm), "VM"))
        ctx.world.vtpm_contents.pop(vtpm, None)
        ctx.db.destroy(vtpm)


@call("VTPM.get_contents", role="root")
def get_contents(ctx: Context, vtpm: Ref) -> str:
    """The state, in base64."""
    return ctx.world.vtpm_contents.get(ctx.db.check("VTPM", vtpm), "")


@call("VTPM.set_contents", role="root")
def set_contents(ctx: Context, vtpm: Ref, contents: str) -> None:
    """The state, in base64."""
    ctx.world.vtpm_contents[ctx.db.check("VTPM", vtpm)] = contents


def _require_halted(ctx: Context, vm: Ref) -> None:
    state = ctx.db.text(vm, "power_state")
    if state != "Halted":
        raise Failure("VM_BAD_POWER_STATE", vm, "halted", state.lower())
