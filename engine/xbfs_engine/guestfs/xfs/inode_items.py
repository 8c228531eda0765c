"""Inodes in the log: logged in the kernel's own form, put back into that of the disk.

Rules: the kernel's xfs_inode_item_recover.c; the core's fields are those on the disk in little-endian order.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final

from xbfs_engine.core.errors import GuestDamaged, GuestUnsupported
from xbfs_engine.guestfs.xfs.geometry import SECTOR

if TYPE_CHECKING:
    from collections.abc import Callable

    from xbfs_engine.guestfs.xfs.geometry import Geometry
    from xbfs_engine.guestfs.xfs.overlay import Overlay
    from xbfs_engine.guestfs.xfs.transactions import Item

_FORMAT: Final = struct.Struct("<HHIHH4xQ16sqii")
_DATA: Final = 0x002
_DATA_EXTENTS: Final = 0x004
_DATA_ROOT: Final = 0x008
_DEVICE: Final = 0x010
_ATTRIBUTES: Final = 0x040
_ATTRIBUTES_EXTENTS: Final = 0x080
_ATTRIBUTES_ROOT: Final = 0x100
_OWNER: Final = 0x200 | 0x400
_DATA_FORK: Final = _DATA | _DATA_EXTENTS | _DATA_ROOT
_ATTRIBUTES_FORK: Final = _ATTRIBUTES | _ATTRIBUTES_EXTENTS | _ATTRIBUTES_ROOT

_CORE_BYTES: Final = 176
_LSN_AT: Final = 112
_FLAGS2_AT: Final = 120
_FORK_AT: Final = 82
_BIGTIME: Final = 1 << 3
_NREXT64: Final = 1 << 4
_NEVER: Final = 0xFFFF_FFFF_FFFF_FFFF

# The core up to di_gen in three parts: what lies between depends on the flags, as do the times.
_HEAD: Final = "2sHBB2sIIIHH"
_COUNTERS: Final = "IH"
_TAIL: Final = "BBIHHI"
_MIDDLE: Final = "QQI"
_CHANGECOUNT_AT: Final = 104
_EXTENDED: Final = "QI12s"

_ROOT_HEADER_BYTES: Final = 72
"""An extent tree's root in memory has the header of a block; on the disk only level and count are left of it."""


def replay_inode(overlay: Overlay, geometry: Geometry, item: Item, is_cancelled: Callable[[int, int], bool]) -> None:
    """Applies one inode item, unless its block is freed later or the inode on the disk is newer."""
    if len(item.regions[0]) < _FORMAT.size or len(item.regions) < 2:
        raise GuestDamaged("log: an inode has no description")
    _, size, fields, _, _, number, special, sector, sectors, place = _FORMAT.unpack_from(item.regions[0])
    if is_cancelled(sector, sectors):
        return
    block, slot = geometry.inode_place(number)
    offset = geometry.offset_of(block, 1) + slot * geometry.inode_bytes
    if sector * SECTOR + place != offset:
        raise GuestDamaged(f"log: inode {number} is logged at sector {sector}, where it is not")
    if fields & _OWNER:
        raise GuestUnsupported("the log exchanges the content of two files")
    old = overlay.read_at(offset, geometry.inode_bytes)
    core = item.regions[1]
    if old[:2] != b"IN" or len(core) < _CORE_BYTES or core[:2] != b"NI":
        raise GuestDamaged(f"log: there is no inode {number} to be changed")
    lsn = int.from_bytes(old[_LSN_AT : _LSN_AT + 8], "big")
    if lsn != _NEVER and lsn > item.lsn:
        return
    new = bytearray(_disk_core(core, old) + old[_CORE_BYTES:])
    split = new[_FORK_AT] << 3
    content_room = split or geometry.inode_bytes - _CORE_BYTES
    if split > geometry.inode_bytes - _CORE_BYTES:
        raise GuestDamaged(f"log: inode {number} has its attributes outside of it")
    if fields & _DEVICE:
        new[_CORE_BYTES : _CORE_BYTES + 4] = special[3::-1]
    at = 2
    for logged, root, start, room in (
        (fields & _DATA_FORK, _DATA_ROOT, _CORE_BYTES, content_room),
        (fields & _ATTRIBUTES_FORK, _ATTRIBUTES_ROOT, _CORE_BYTES + split, geometry.inode_bytes - _CORE_BYTES - split),
    ):
        if not logged:
            continue
        if at >= min(size, len(item.regions)):
            raise GuestDamaged(f"log: inode {number} lacks a fork")
        fork = _disk_root(item.regions[at], room, number) if logged & root else item.regions[at]
        if len(fork) > room:
            raise GuestDamaged(f"log: a fork of inode {number} does not fit into it")
        new[start : start + len(fork)] = fork
        at += 1
    overlay.write_at(offset, bytes(new))


def _swap(layout: str, data: bytes, at: int) -> bytes:
    return struct.pack(">" + layout, *struct.unpack_from("<" + layout, data, at))


def _disk_core(core: bytes, old: bytes) -> bytes:
    """The core as it is on the disk; what the log does not carry (unlinked list, checksum, sequence) stays."""
    flags2 = int.from_bytes(core[_FLAGS2_AT : _FLAGS2_AT + 8], "little")
    time = "Q" if flags2 & _BIGTIME else "ii"
    return b"".join(
        (
            b"IN",
            _swap(_HEAD, core, 0)[2:],
            _swap("Q", core, 24) if flags2 & _NREXT64 else bytes(8),
            _swap(time * 3, core, 32),
            _swap(_MIDDLE, core, 56),
            _swap(_COUNTERS, core, 76),
            _swap(_TAIL, core, _FORK_AT),
            old[96:104],
            _swap("Q", core, _CHANGECOUNT_AT),
            old[_LSN_AT:_FLAGS2_AT],
            _swap(_EXTENDED, core, _FLAGS2_AT),
            _swap(time, core, 144),
            _swap("Q", core, 152),
            old[160:_CORE_BYTES],
        )
    )


def _disk_root(root: bytes, room: int, number: int) -> bytes:
    """The root of an extent tree in the form it has inside an inode: keys, then pointers after room for all keys."""
    slots = (len(root) - _ROOT_HEADER_BYTES) // 16
    disk_slots = (room - 4) // 16
    count = int.from_bytes(root[6:8], "big")
    if slots < 0 or count > min(slots, disk_slots):
        raise GuestDamaged(f"log: the extent tree of inode {number} does not fit into it")
    keys = root[_ROOT_HEADER_BYTES : _ROOT_HEADER_BYTES + 8 * count]
    pointers_at = _ROOT_HEADER_BYTES + 8 * slots
    pointers = root[pointers_at : pointers_at + 8 * count]
    return root[4:8] + keys.ljust(8 * disk_slots, b"\0") + pointers.ljust(8 * disk_slots, b"\0")
