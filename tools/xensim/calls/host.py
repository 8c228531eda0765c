"""host.*: certificates, time, plug-ins (there are none)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..failures import Failure
from . import call

if TYPE_CHECKING:
    from datetime import datetime

    from ..context import Context
    from ..schema import Ref


@call("host.get_server_certificate", role="read-only")
def get_server_certificate(ctx: Context, host: Ref) -> str:
    """The certificate the host presents, in PEM."""
    return ctx.world.nodes[ctx.db.check("host", host)].certificate_pem


@call("host.get_servertime", role="read-only")
def get_servertime(ctx: Context, host: Ref) -> datetime:
    """The host's clock."""
    ctx.db.check("host", host)
    return ctx.world.clock.now()


@call("host.call_plugin", role="pool-admin")
def call_plugin(ctx: Context, host: Ref, plugin: str, fn: str, args: dict[str, str]) -> str:
    """No plug-in is installed."""
    ctx.db.check("host", host)
    raise Failure("XENAPI_MISSING_PLUGIN", plugin)
