"""session.*: log in and out, who am I."""

from __future__ import annotations

from typing import TYPE_CHECKING

from . import call

if TYPE_CHECKING:
    from ..context import Context
    from ..schema import Ref


@call("session.login_with_password", role="read-only", session=False)
def login_with_password(ctx: Context, uname: str, pwd: str, version: str = "", originator: str = "") -> Ref:
    """A new session; ``version`` is ignored, as XAPI does."""
    return ctx.world.sessions.login(uname, pwd, originator)


@call("session.logout", role="read-only")
def logout(ctx: Context) -> None:
    """End the caller's session."""
    assert ctx.session
    ctx.world.sessions.end(ctx.session.ref)
