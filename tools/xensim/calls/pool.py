"""pool.*: what does more than store."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..schema import NULL
from . import call

if TYPE_CHECKING:
    from ..context import Context
    from ..schema import Ref


@call("pool.set_default_SR", role="pool-operator")
def set_default_sr(ctx: Context, pool: Ref, value: Ref) -> None:
    """The SR for what names none."""
    if value != NULL:
        ctx.db.check("SR", value)
    ctx.db.set(ctx.db.check("pool", pool), default_SR=value)
