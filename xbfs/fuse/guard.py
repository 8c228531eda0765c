"""Nothing but an errno leaves a handler: libfuse's loop ends the whole mount at any other exception."""

from __future__ import annotations

import errno
import functools
from typing import TYPE_CHECKING, Concatenate, ParamSpec, TypeVar

from pyfuse3 import FUSEError

from xbfs.fuse.errnos import errno_of
from xbfs_engine.core.errors import XbfsError
from xbfs_engine.core.log import Logger

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine

P = ParamSpec("P")
R = TypeVar("R")
S = TypeVar("S")

_log = Logger("xbfs.mount")


def guarded(
    handler: Callable[Concatenate[S, P], Awaitable[R]],
) -> Callable[Concatenate[S, P], Coroutine[None, None, R]]:
    """A handler whose exceptions become FUSEError: ours by table, anything else EIO with a traceback in the log."""

    @functools.wraps(handler)
    async def guard(self: S, /, *args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return await handler(self, *args, **kwargs)
        except FUSEError:
            raise
        except XbfsError as exc:
            raise FUSEError(errno_of(exc)) from exc
        except Exception as exc:
            _log.error("a request failed for a reason of our own", request=handler.__name__, exc_info=exc)
            raise FUSEError(errno.EIO) from exc

    return guard
