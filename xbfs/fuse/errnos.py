"""The one table from our errors to errno. Whatever it does not name is an input/output error."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Final

from xbfs_engine.core.errors import (
    GuestLocked,
    GuestNotFound,
    GuestWrongKind,
    ImageUnsupported,
    KeyNotHeld,
    PointNotFound,
    SessionBusy,
    StorageFull,
    UsageError,
)

if TYPE_CHECKING:
    from xbfs_engine.core.errors import XbfsError

_ERRNOS: Final[dict[type[XbfsError], int]] = {
    GuestLocked: errno.EACCES,
    GuestNotFound: errno.ENOENT,
    GuestWrongKind: errno.EINVAL,
    ImageUnsupported: errno.EOPNOTSUPP,
    KeyNotHeld: errno.EACCES,
    PointNotFound: errno.ENOENT,
    SessionBusy: errno.EBUSY,
    StorageFull: errno.ENOSPC,
    UsageError: errno.EINVAL,
}


def errno_of(problem: XbfsError) -> int:
    """The errno a client gets. Damage, lost blobs and storage that fails or does not answer in time are EIO."""
    return next((_ERRNOS[base] for base in type(problem).__mro__ if base in _ERRNOS), errno.EIO)
