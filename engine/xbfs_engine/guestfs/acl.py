"""POSIX ACLs as Linux shows them in extended attributes: version 2, little-endian (uapi/linux/posix_acl_xattr.h).

Every filesystem stores them its own way; readers decode that and encode this.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable

ACCESS_NAME: Final = b"system.posix_acl_access"
DEFAULT_NAME: Final = b"system.posix_acl_default"

TAG_USER: Final = 0x02
TAG_GROUP: Final = 0x08
TAGS: Final = frozenset({0x01, TAG_USER, 0x04, TAG_GROUP, 0x10, 0x20})
"""user_obj, user, group_obj, group, mask, other (uapi/linux/posix_acl.h)."""

UNDEFINED_ID: Final = 0xFFFF_FFFF
"""Of entries that name no user or group."""

_VERSION: Final = 2
_ENTRY: Final = struct.Struct("<HHI")


class AclEntry(NamedTuple):
    """Who (tag and numeric id, if the tag takes one) may do what (rwx as 4, 2, 1)."""

    tag: int
    permissions: int
    id: int


def encode(entries: Iterable[AclEntry]) -> bytes:
    """The attribute's value; ids of tags that take none are written as undefined."""
    parts = [_VERSION.to_bytes(4, "little")]
    for entry in entries:
        named = entry.tag in (TAG_USER, TAG_GROUP)
        parts.append(_ENTRY.pack(entry.tag, entry.permissions, entry.id if named else UNDEFINED_ID))
    return b"".join(parts)
