"""Extended attributes: in the inode, or in a tree of leaves with long values in blocks of their own.

Layout: "XFS Algorithms & Data Structures", chapter Extended Attributes; parent pointers and ACLs as in the kernel's
xfs_da_format.h and xfs_format.h.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final

from xbfs_engine.core.errors import GuestDamaged
from xbfs_engine.guestfs import acl
from xbfs_engine.guestfs.base import XATTR_BYTES_MAX, Xattr
from xbfs_engine.guestfs.xfs.extents import runs_of
from xbfs_engine.guestfs.xfs.inodes import FORMAT_LOCAL
from xbfs_engine.guestfs.xfs.names import block_magic, find_leaf, forward
from xbfs_engine.guestfs.xfs.volume import REMOTE_HEADER, TREE_HEADER

if TYPE_CHECKING:
    from collections.abc import Iterator

    from xbfs_engine.guestfs.xfs.inodes import Fork, Inode
    from xbfs_engine.guestfs.xfs.volume import Volume

_LEAF_MAGICS: Final = (0xFBEE, 0x3BEE)
_LEAF_COUNT_AT: Final = (12, 56)
_LEAF_HEADER_BYTES: Final = (32, 80)
_LEAF_ENTRY: Final = struct.Struct(">IHBx")
_LOCAL: Final = struct.Struct(">HB")
_REMOTE: Final = struct.Struct(">IIB")
_REMOTE_MAGIC: Final = b"XARM"
_REMOTE_HEADER_BYTES: Final = 56
_REMOTE_PLACE: Final = struct.Struct(">II")

_FLAG_LOCAL: Final = 1 << 0
_FLAG_ROOT: Final = 1 << 1
_FLAG_SECURE: Final = 1 << 2
_FLAG_PARENT: Final = 1 << 3
_FLAG_INCOMPLETE: Final = 1 << 7
"""Its value was still being written."""

_ACLS: Final = {b"SGI_ACL_FILE": acl.ACCESS_NAME, b"SGI_ACL_DEFAULT": acl.DEFAULT_NAME}
_ACL_ENTRY: Final = struct.Struct(">IIHxx")


def attributes(volume: Volume, inode: Inode) -> Iterator[Xattr]:
    """Attributes of an inode under the names Linux gives them; values are read as they come."""
    fork = inode.attributes
    if fork is None or (fork.format != FORMAT_LOCAL and not fork.extents):
        return
    found = _short(inode, fork) if fork.format == FORMAT_LOCAL else _long(volume, inode, fork)
    for flags, name, value in found:
        if not name or b"\0" in name:
            raise GuestDamaged(f"inode {inode.number}: the attribute name {name!r} is not possible")
        if flags & _FLAG_SECURE:
            yield Xattr(b"security." + name, value)
        elif not flags & _FLAG_ROOT:
            yield Xattr(b"user." + name, value)
        elif name in _ACLS:
            yield Xattr(_ACLS[name], _convert_acl(inode, value))
        else:
            yield Xattr(b"trusted." + name, value)


def _convert_acl(inode: Inode, value: bytes) -> bytes:
    count = int.from_bytes(value[:4], "big")
    if len(value) != 4 + count * _ACL_ENTRY.size:
        raise GuestDamaged(f"inode {inode.number}: its ACL of {count} entries has {len(value)} bytes")
    entries = [acl.AclEntry(tag, perm, owner) for tag, owner, perm in _ACL_ENTRY.iter_unpack(value[4:])]
    if not all(entry.tag in acl.TAGS and entry.permissions <= 7 for entry in entries):
        raise GuestDamaged(f"inode {inode.number}: its ACL has an entry that is none")
    return acl.encode(entries)


def _short(inode: Inode, fork: Fork) -> Iterator[tuple[int, bytes, bytes]]:
    data = fork.data
    at = 4
    for index in range(data[2] if len(data) > at else 0):
        name_at = at + 3
        if name_at > len(data):
            raise GuestDamaged(f"inode {inode.number}: attribute {index} is outside of it")
        value_at = name_at + data[at]
        end = value_at + data[at + 1]
        if end > len(data):
            raise GuestDamaged(f"inode {inode.number}: attribute {index} is outside of it")
        if not data[at + 2] & (_FLAG_INCOMPLETE | _FLAG_PARENT):
            yield data[at + 2], data[name_at:value_at], data[value_at:end]
        at = end


def _long(volume: Volume, inode: Inode, fork: Fork) -> Iterator[tuple[int, bytes, bytes]]:
    def read(block: int) -> bytes:
        runs = runs_of(volume, inode, fork, block, 1)
        return volume.metadata(runs, TREE_HEADER, inode.number, "attribute block")

    checksums = volume.geometry.has_checksums
    block, data = find_leaf(read, 0, 0, checksums, f"attributes of inode {inode.number}")
    seen = {block}
    while True:
        if block_magic(data) != _LEAF_MAGICS[checksums]:
            raise GuestDamaged(f"inode {inode.number}: block {block} of its attributes is no leaf")
        yield from _leaf(volume, inode, fork, data)
        block = forward(data)
        if not block:
            return
        if block in seen:
            raise GuestDamaged(f"inode {inode.number}: block {block} of its attributes comes twice")
        seen.add(block)
        data = read(block)


def _leaf(volume: Volume, inode: Inode, fork: Fork, data: bytes) -> Iterator[tuple[int, bytes, bytes]]:
    checksums = volume.geometry.has_checksums
    count_at, header_bytes = _LEAF_COUNT_AT[checksums], _LEAF_HEADER_BYTES[checksums]
    count = int.from_bytes(data[count_at : count_at + 2], "big")
    entries_end = header_bytes + count * _LEAF_ENTRY.size
    outside = GuestDamaged(f"inode {inode.number}: attributes reach out of their block")
    if entries_end > len(data):
        raise outside
    for _, at, flags in _LEAF_ENTRY.iter_unpack(data[header_bytes:entries_end]):
        if flags & (_FLAG_INCOMPLETE | _FLAG_PARENT):
            continue
        form = _LOCAL if flags & _FLAG_LOCAL else _REMOTE
        name_at = at + form.size
        if at < entries_end or name_at > len(data):
            raise outside
        *value, name_bytes = form.unpack_from(data, at)
        name_end = name_at + name_bytes
        value_end = name_end + (value[0] if flags & _FLAG_LOCAL else 0)
        if value_end > len(data):
            raise outside
        content = data[name_end:value_end] if flags & _FLAG_LOCAL else _remote(volume, inode, fork, *value)
        yield flags, data[name_at:name_end], content


def _remote(volume: Volume, inode: Inode, fork: Fork, first: int, length: int) -> bytes:
    """A value in blocks of its own; with checksums each has a header that says which part it is."""
    if not 0 < length <= XATTR_BYTES_MAX:
        raise GuestDamaged(f"inode {inode.number}: an attribute of {length} bytes is not possible")
    geometry = volume.geometry
    room = geometry.block_bytes - (_REMOTE_HEADER_BYTES if geometry.has_checksums else 0)
    blocks = -(-length // room)
    runs = runs_of(volume, inode, fork, first, blocks)
    if not geometry.has_checksums:
        return b"".join(volume.read_blocks(*run) for run in runs)[:length]
    parts: list[bytes] = []
    for block in (block + index for block, count in runs for index in range(count)):
        data = volume.metadata([(block, 1)], REMOTE_HEADER, inode.number, "attribute value")
        offset, size = _REMOTE_PLACE.unpack_from(data, 4)
        if not data.startswith(_REMOTE_MAGIC) or (offset, size) != (len(parts) * room, min(room, length - offset)):
            raise GuestDamaged(f"inode {inode.number}: block {block} is no part of its attribute's value")
        parts.append(data[_REMOTE_HEADER_BYTES : _REMOTE_HEADER_BYTES + size])
    return b"".join(parts)
