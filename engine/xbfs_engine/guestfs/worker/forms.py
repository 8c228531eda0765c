"""What both sides of a worker, and of the zygote, know: words, fixed records, bounds, and what a name may be."""

from __future__ import annotations

import re
import struct
from typing import Final

from xbfs_engine.core.errors import (
    GuestDamaged,
    GuestError,
    GuestLocked,
    GuestNotFound,
    GuestUnsupported,
    GuestWrongKind,
)
from xbfs_engine.guestfs.base import NAME_BYTES_MAX, XATTR_BYTES_MAX, Kind

READY: Final = b"ready"
FORK: Final = b"fork"
END: Final = b"end "
ORDER_BYTES_MAX: Final = 64
"""What goes between a zygote and its caller."""

DONE: Final = 0
REFUSED: Final = 1
"""The guest's fault: class, message and hint follow."""
STORAGE_FAILED: Final = 2
"""The number of an error that `BlockService` has follows."""
CONTENT: Final = 3
"""So many bytes of a file follow, behind the message: they are not copied into one."""

ERRORS: Final[dict[str, type[GuestError]]] = {
    error.__name__: error for error in (GuestDamaged, GuestLocked, GuestNotFound, GuestUnsupported, GuestWrongKind)
}
"""What a worker may raise in its caller."""

ROWS_MAX: Final = 8192
"""The search lists at most 4096 volumes, and each may bring a note."""
TEXT_MAX: Final = 4096
LINK_BYTES_MAX: Final = 64 << 10
"""An NTFS reparse point has at most 16 KiB, of UTF-16."""
SIZE_MAX: Final = (1 << 63) - 1

CONTROL: Final = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")
"""What a terminal would act upon, and what is no character."""

ENTRY: Final = struct.Struct("<QB")
"""Cookie, kind."""
STAT: Final = struct.Struct("<QBHIIIQQqIqIqIqIII")
"""Inode, kind, mode, uid, gid, nlink, size, allocated; each time as seconds and nanoseconds; device."""
NO_TIME: Final = (0, 0xFFFFFFFF)
NS: Final = 1_000_000_000

KINDS: Final = tuple(Kind)
assert KINDS[-1] is Kind.UNKNOWN

_DOTS: Final = (b".", b"..")


def is_name(name: bytes) -> bool:
    """If it can be one component of a path."""
    return 0 < len(name) <= NAME_BYTES_MAX and b"/" not in name and b"\0" not in name and name not in _DOTS


def is_xattr(name: bytes, value: bytes) -> bool:
    """If Linux could have such an attribute."""
    return 0 < len(name) <= NAME_BYTES_MAX and b"\0" not in name and len(value) <= XATTR_BYTES_MAX
