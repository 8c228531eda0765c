"""Extent maps: where a fork's blocks lie, as a list in the inode or as a tree.

Layout: "XFS Algorithms & Data Structures", chapter Data Extents.
"""

from __future__ import annotations

import struct
from bisect import bisect_right
from typing import TYPE_CHECKING, Final, NamedTuple

from xbfs_engine.core.errors import GuestDamaged
from xbfs_engine.guestfs.xfs.inodes import FORMAT_BTREE, FORMAT_EXTENTS
from xbfs_engine.guestfs.xfs.volume import EXTENT_HEADER

if TYPE_CHECKING:
    from collections.abc import Iterator

    from xbfs_engine.guestfs.xfs.inodes import Fork, Inode
    from xbfs_engine.guestfs.xfs.volume import Run, Volume

_RECORD: Final = struct.Struct(">QQ")
_RECORD_BYTES: Final = 16
_START_MASK: Final = (1 << 54) - 1
_MAGICS: Final = (0x424D_4150, 0x424D_4133)
"""BMAP and, with checksums, BMA3."""
_HEADER: Final = struct.Struct(">IHH")
_HEADER_BYTES: Final = (24, 72)
_ROOT_HEADER: Final = struct.Struct(">HH")
_LEVELS_MAX: Final = 12
"""The kernel's trees have at most 9 levels; each of ours is one frame of recursion."""


class Extent(NamedTuple):
    """``blocks`` blocks of a file from block ``start`` of it, lying at a block number; unwritten ones read as zeros."""

    start: int
    block: int
    blocks: int
    is_unwritten: bool

    @property
    def end(self) -> int:
        """First block of the file after it."""
        return self.start + self.blocks


def extents(volume: Volume, inode: Inode, fork: Fork, first: int = 0) -> Iterator[Extent]:
    """Extents of a fork that end after block ``first`` of the file, in order; what lies between them is a hole.

    Streamed; raises GuestDamaged where the map contradicts itself.
    """
    if fork.format == FORMAT_EXTENTS:
        if fork.extents > len(fork.data) // _RECORD_BYTES:
            raise GuestDamaged(f"inode {inode.number}: {fork.extents} extents of {fork.name} do not fit into it")
        found = _unpack(fork.data, 0, fork.extents, first)
    elif fork.format == FORMAT_BTREE:
        found = _from_root(volume, inode, fork, first)
    else:
        raise GuestDamaged(f"inode {inode.number}: fork format {fork.format} of {fork.name} is no extent map")
    end = 0
    for extent in found:
        if extent.start < end or not extent.blocks:
            raise GuestDamaged(f"inode {inode.number}: extents of {fork.name} overlap at block {extent.start}")
        end = extent.end
        if end > first:
            if not inode.is_realtime or fork is not inode.content:
                volume.geometry.offset_of(extent.block, extent.blocks)
            yield extent


def runs_of(volume: Volume, inode: Inode, fork: Fork, first: int, count: int) -> list[Run]:
    """Where ``count`` blocks of a fork from ``first`` lie; GuestDamaged if there is a hole. For metadata and values."""
    runs: list[Run] = []
    position = first
    end = first + count
    for extent in extents(volume, inode, fork, first):
        if extent.start > position or extent.is_unwritten:
            break
        inside = position - extent.start
        length = min(extent.end, end) - position
        runs.append((extent.block + inside, length))
        position += length
        if position == end:
            return runs
    raise GuestDamaged(f"inode {inode.number}: block {position} of its {fork.name} is missing")


def _unpack(data: bytes, at: int, count: int, first: int) -> Iterator[Extent]:
    """Packed records from the last that starts up to ``first``: 1 bit unwritten, 54 start, 52 block, 21 count."""

    def start_of(index: int) -> int:
        return (
            int.from_bytes(data[at + index * _RECORD_BYTES : at + index * _RECORD_BYTES + 8], "big") >> 9 & _START_MASK
        )

    skipped = max(0, bisect_right(range(count), first, key=start_of) - 1)
    for high, low in _RECORD.iter_unpack(data[at + skipped * _RECORD_BYTES : at + count * _RECORD_BYTES]):
        yield Extent(high >> 9 & _START_MASK, (high & 0x1FF) << 43 | low >> 21, low & 0x1F_FFFF, high >> 63 == 1)


def _from_root(volume: Volume, inode: Inode, fork: Fork, first: int) -> Iterator[Extent]:
    if len(fork.data) < _ROOT_HEADER.size:
        raise GuestDamaged(f"inode {inode.number}: the fork of {fork.name} is too small for a tree")
    level, count = _ROOT_HEADER.unpack_from(fork.data)
    room = (len(fork.data) - _ROOT_HEADER.size) // _RECORD_BYTES
    if not 0 < level <= _LEVELS_MAX or not 0 < count <= room:
        raise GuestDamaged(f"inode {inode.number}: the extent tree of {fork.name} has {level} levels, {count} records")
    return _descend(volume, inode, fork, fork.data, _ROOT_HEADER.size, room, (level, count), first)


def _descend(
    volume: Volume, inode: Inode, fork: Fork, node: bytes, at: int, room: int, size: tuple[int, int], first: int
) -> Iterator[Extent]:
    """Extents below a node whose keys start ``at`` and whose pointers follow after ``room`` keys."""
    level, count = size
    keys = struct.unpack_from(f">{count}Q", node, at)
    children = struct.unpack_from(f">{count}Q", node, at + 8 * room)
    for child in children[max(0, bisect_right(keys, first) - 1) :]:
        block, below = _node(volume, inode, fork, child, level - 1)
        header_bytes = _HEADER_BYTES[volume.geometry.has_checksums]
        if level == 1:
            yield from _unpack(block, header_bytes, below, first)
        else:
            size_below = (level - 1, below)
            room_below = (len(block) - header_bytes) // _RECORD_BYTES
            yield from _descend(volume, inode, fork, block, header_bytes, room_below, size_below, first)


def _node(volume: Volume, inode: Inode, fork: Fork, block: int, level: int) -> tuple[bytes, int]:
    """A checked block of the tree and its number of records."""
    data = volume.metadata([(block, 1)], EXTENT_HEADER, inode.number, "extent tree")
    magic, recorded_level, count = _HEADER.unpack_from(data)
    checksums = volume.geometry.has_checksums
    room = (len(data) - _HEADER_BYTES[checksums]) // _RECORD_BYTES
    if magic != _MAGICS[checksums] or recorded_level != level or not 0 < count <= room:
        raise GuestDamaged(f"extent tree of inode {inode.number}: block {block} is no node of level {level}")
    return data, count
