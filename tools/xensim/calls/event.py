"""event.*: the calls of the present interface; register and next, which lose events, are not simulated."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from .. import events, schema
from . import call

if TYPE_CHECKING:
    from ..context import Context
    from ..schema import Ref, Value

_NAMES: Final = {name.lower(): name for name in schema.classes()}


@call("event.from", role="read-only")
def from_(ctx: Context, classes: list[str], token: str, timeout: float) -> Value:
    """What changed since ``token``, waiting up to ``timeout`` simulated seconds."""
    return events.events_from(ctx.world, classes, token, timeout)


@call("event.inject", role="read-only")
def inject(ctx: Context, cls: str, ref: Ref) -> str:
    """Pretend an object changed; the token that event.from then passes."""
    with ctx.db.lock:
        ctx.db.touch(ctx.db.check(_NAMES.get(cls.lower(), "VM"), ref))
        return events.token(ctx.db.generation)


@call("event.get_current_id", role="read-only")
def get_current_id(ctx: Context) -> int:
    """The number of the latest event."""
    return ctx.db.generation
