"""VHD images of a disk, dynamic and fixed, laid out as blktap writes them.

Owns where records, tables and data lie in the file; the records' bytes are `formats.vhd_records`. Layouts are
immutable after construction, so any thread may call them.

A dynamic file: footer copy, header, BAT, batmap header, batmap, then for every present VHD block one sector bitmap
(all ones) and its 2 MiB, then the footer. All-zero VHD blocks are left out. Since every present block takes the same
room, a block's place follows from its rank among the present ones; the BAT is computed for the range asked, not kept.

The virtual size is the disk's rounded up to 2 MiB, with zeros behind the disk: SM reads a VHD's size in whole MiB and
would cut a shorter tail off. A disk of 0 bytes becomes 2 MiB of zeros, the least blktap can address.
"""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING, Final

import numpy as np

from xbfs_engine.core.errors import ImageUnsupported
from xbfs_engine.core.limits import GIB
from xbfs_engine.formats.segments import DiskExtent, Literal, Segment, Zero
from xbfs_engine.formats.vhd_records import (
    BATMAP_HEADER_SIZE,
    BLOCK_SIZE,
    FOOTER_SIZE,
    HEADER_SIZE,
    NO_OFFSET,
    SECTOR_SIZE,
    VHD_SIZE_MAX,
    VhdFooter,
    VhdHeader,
    VhdType,
    pack_batmap_header,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray

    from xbfs_engine.core.ids import PointId

_EPOCH_S: Final = 946_684_800
"""2000-01-01 00:00 UTC in Unix seconds, where VHD time starts (specification, "Time Stamp")."""

_UUID_NAMESPACE: Final = uuid.UUID("3f0f0f6e-5a44-5c0e-9f6b-86d3b1a1c7e4")
"""Ours, arbitrary, never to change: children of a VHD find their parent by the uuid made from it."""

_TABLE_OFFSET: Final = FOOTER_SIZE + HEADER_SIZE
_ENTRY_SIZE: Final = 4
_UNUSED: Final = 0xFFFFFFFF
_BITMAP: Final = b"\xff" * SECTOR_SIZE
"""The sector bitmap of one block: 4096 sectors, all present."""

_ALIGNMENT: Final = 4096
"""tapdisk aligns a block's data to this; the bitmap takes the sector before."""

_BLOCK_ROOM: Final = SECTOR_SIZE + BLOCK_SIZE
_PITCH: Final = -(-_BLOCK_ROOM // _ALIGNMENT) * _ALIGNMENT
_PITCH_SECTORS: Final = _PITCH // SECTOR_SIZE
assert _PITCH_SECTORS == 4104


def vhd_uuid(point_id: PointId, disk_number: int) -> bytes:
    """The 16 bytes of the uuid of a restore point's disk: a version 5 uuid (RFC 4122, 4.3), the same at every mount."""
    return uuid.uuid5(_UUID_NAMESPACE, f"{point_id}/{disk_number}").bytes


def vhd_timestamp_s(unix_s: int) -> int:
    """Unix seconds as seconds since 2000-01-01 UTC, clamped to the 32 bits a footer has."""
    return min(max(unix_s - _EPOCH_S, 0), 0xFFFFFFFF)


def vhd_block_count(disk_size: int) -> int:
    """VHD blocks of 2 MiB that ``disk_size`` bytes touch; 0 for an empty disk."""
    return -(-disk_size // BLOCK_SIZE)


def vhd_virtual_size(disk_size: int) -> int:
    """Size in bytes of the virtual disk in the VHD. Raises ImageUnsupported above 2040 GiB."""
    if disk_size > VHD_SIZE_MAX:
        raise ImageUnsupported(f"a VHD holds at most {VHD_SIZE_MAX // GIB} GiB, this disk has {disk_size} bytes")
    return max(vhd_block_count(disk_size), 1) * BLOCK_SIZE


def vhd_dynamic_size(disk_size: int, present_blocks: int) -> int:
    """Size in bytes of the dynamic VHD file of a disk of which so many VHD blocks are present.

    Raises ImageUnsupported above 2040 GiB.
    """
    metadata_end = _metadata_end(vhd_virtual_size(disk_size) // BLOCK_SIZE)
    if not present_blocks:
        return metadata_end + FOOTER_SIZE
    return _first_block(metadata_end) + (present_blocks - 1) * _PITCH + _BLOCK_ROOM + FOOTER_SIZE


class VhdFixedLayout:
    """The disk, rounded up to 2 MiB, and a footer behind it.

    ``uuid16`` is 16 bytes, not null (`vhd_uuid`); ``timestamp_s`` counts from 2000 (`vhd_timestamp_s`). Raises
    ImageUnsupported above 2040 GiB.
    """

    __slots__ = ("_disk_size", "_footer", "_virtual_size")

    def __init__(self, disk_size: int, *, uuid16: bytes, timestamp_s: int) -> None:
        self._disk_size = disk_size
        self._virtual_size = vhd_virtual_size(disk_size)
        self._footer = _footer(VhdType.FIXED, self._virtual_size, uuid16, timestamp_s)

    @property
    def size_bytes(self) -> int:
        """Size of the image file."""
        return self._virtual_size + FOOTER_SIZE

    def segments(self, offset: int, length: int) -> Iterator[Segment]:
        """Segments that cover exactly [offset, offset+length), in order, clipped to the file's end."""
        return _walk(self._segment_at, offset, min(offset + length, self.size_bytes))

    def _segment_at(self, offset: int, limit: int) -> tuple[Segment, int]:
        """The segment that starts at ``offset``, of at most ``limit`` bytes, and its size."""
        if offset < self._virtual_size:
            return _disk_or_zero(offset, min(limit, self._virtual_size - offset), self._disk_size)
        return _cut(self._footer, offset - self._virtual_size, limit)


class VhdDynamicLayout:
    """A dynamic VHD that holds exactly the allocated VHD blocks.

    ``allocated[i]`` tells whether VHD block i, bytes [i * 2 MiB, (i+1) * 2 MiB) of the disk, holds anything but
    zeros: ``vhd_block_count(disk_size)`` entries. ``uuid16`` is 16 bytes, not null (`vhd_uuid`); ``timestamp_s``
    counts from 2000 (`vhd_timestamp_s`). Raises ImageUnsupported above 2040 GiB.

    Keeps 4 bytes per present block (4 MiB for a full disk of 2040 GiB); finding a segment is O(1), a range of the
    BAT O(log n + range).
    """

    __slots__ = ("_batmap", "_blocks_at", "_disk_size", "_entries", "_footer", "_footer_at", "_header", "_present")

    def __init__(self, disk_size: int, allocated: NDArray[np.bool_], *, uuid16: bytes, timestamp_s: int) -> None:
        virtual_size = vhd_virtual_size(disk_size)
        assert allocated.shape == (vhd_block_count(disk_size),)
        self._disk_size = disk_size
        self._entries = virtual_size // BLOCK_SIZE
        self._present = np.flatnonzero(allocated).astype(np.uint32)
        self._header = VhdHeader(_TABLE_OFFSET, self._entries).pack()
        self._batmap = _batmap(allocated, self._entries)
        self._footer = _footer(VhdType.DYNAMIC, virtual_size, uuid16, timestamp_s)
        self._footer_at = vhd_dynamic_size(disk_size, self._present.size) - FOOTER_SIZE
        metadata_end = _metadata_end(self._entries)
        self._blocks_at = _first_block(metadata_end) if self._present.size else metadata_end

    @property
    def size_bytes(self) -> int:
        """Size of the image file."""
        return self._footer_at + FOOTER_SIZE

    def segments(self, offset: int, length: int) -> Iterator[Segment]:
        """Segments that cover exactly [offset, offset+length), in order, clipped to the file's end."""
        return _walk(self._segment_at, offset, min(offset + length, self.size_bytes))

    def _segment_at(self, offset: int, limit: int) -> tuple[Segment, int]:
        """The segment that starts at ``offset``, of at most ``limit`` bytes, and its size."""
        if offset < FOOTER_SIZE:
            return _cut(self._footer, offset, limit)
        if offset < _TABLE_OFFSET:
            return _cut(self._header, offset - FOOTER_SIZE, limit)
        batmap_at = _batmap_offset(self._entries)
        if offset < batmap_at:
            size = min(limit, batmap_at - offset)
            return Literal(self._table(offset - _TABLE_OFFSET, size)), size
        if offset < batmap_at + len(self._batmap):
            return _cut(self._batmap, offset - batmap_at, limit)
        if offset < self._blocks_at:
            return _zero(min(limit, self._blocks_at - offset))
        if offset < self._footer_at:
            rank, within = divmod(offset - self._blocks_at, _PITCH)
            return self._block(rank, within, limit)
        return _cut(self._footer, offset - self._footer_at, limit)

    def _block(self, rank: int, within: int, limit: int) -> tuple[Segment, int]:
        """What lies ``within`` bytes into the room of the rank-th present block."""
        if within < SECTOR_SIZE:
            return _cut(_BITMAP, within, limit)
        if within < _BLOCK_ROOM:
            offset = int(self._present[rank]) * BLOCK_SIZE + within - SECTOR_SIZE
            return _disk_or_zero(offset, min(limit, _BLOCK_ROOM - within), self._disk_size)
        return _zero(min(limit, _PITCH - within))

    def _table(self, start: int, length: int) -> bytes:
        """Bytes [start, start+length) of the BAT: sector numbers of the blocks' bitmaps; zeros pad the last sector."""
        first, last = start // _ENTRY_SIZE, -(-(start + length) // _ENTRY_SIZE)
        table = np.full(last - first, _UNUSED, ">u4")
        table[max(self._entries - first, 0) :] = 0
        # The bounds have the array's own type: otherwise numpy converts the whole array at every call.
        low, high = np.searchsorted(self._present, np.array((first, last), np.uint32))
        places = self._blocks_at // SECTOR_SIZE + np.arange(low, high) * _PITCH_SECTORS
        table[self._present[low:high] - np.uint32(first)] = places
        skip = start - first * _ENTRY_SIZE
        return table.tobytes()[skip : skip + length]


def _walk(segment_at: Callable[[int, int], tuple[Segment, int]], offset: int, end: int) -> Iterator[Segment]:
    while offset < end:
        segment, size = segment_at(offset, end - offset)
        yield segment
        offset += size


def _footer(disk_type: VhdType, virtual_size: int, uuid16: bytes, timestamp_s: int) -> bytes:
    assert len(uuid16) == 16
    assert any(uuid16)
    data_offset = NO_OFFSET if disk_type == VhdType.FIXED else FOOTER_SIZE
    return VhdFooter(disk_type, virtual_size, uuid16, timestamp_s, data_offset).pack()


def _batmap(allocated: NDArray[np.bool_], entries: int) -> bytes:
    """Batmap header and batmap: one bit per VHD block, most significant first, set when all its sectors are present.

    libvhd rounds the map's length down to the size in 16 MiB units before it rounds up to sectors, and reads and sums
    up no more than that. Bits behind stay 0, which is always allowed ("look at the sector bitmap"), so that its
    checksum and that of a reader who takes the whole map are the same.
    """
    summed_bits = _sectors(entries // 8) * SECTOR_SIZE * 8
    bits = np.packbits(allocated[:summed_bits]).tobytes()
    batmap = bits.ljust(_sectors(-(-entries // 8)) * SECTOR_SIZE, b"\0")
    return pack_batmap_header(map_offset=_batmap_offset(entries) + BATMAP_HEADER_SIZE, batmap=batmap) + batmap


def _batmap_offset(entries: int) -> int:
    """Where the batmap header lies: right behind the BAT, padded to sectors."""
    return _TABLE_OFFSET + _sectors(entries * _ENTRY_SIZE) * SECTOR_SIZE


def _metadata_end(entries: int) -> int:
    return _batmap_offset(entries) + BATMAP_HEADER_SIZE + _sectors(-(-entries // 8)) * SECTOR_SIZE


def _first_block(metadata_end: int) -> int:
    """Where the first sector bitmap lies, so that the data behind it is aligned."""
    return -(-(metadata_end + SECTOR_SIZE) // _ALIGNMENT) * _ALIGNMENT - SECTOR_SIZE


def _sectors(size_bytes: int) -> int:
    """Sectors that hold so many bytes, at least one."""
    return max(-(-size_bytes // SECTOR_SIZE), 1)


def _cut(data: bytes, start: int, limit: int) -> tuple[Segment, int]:
    piece = data[start : start + limit]
    return Literal(piece), len(piece)


def _zero(length: int) -> tuple[Segment, int]:
    return Zero(length), length


def _disk_or_zero(offset: int, length: int, disk_size: int) -> tuple[Segment, int]:
    """The disk at ``offset``, cut at its end, or the zeros that round the virtual size up."""
    if offset >= disk_size:
        return _zero(length)
    size = min(length, disk_size - offset)
    return DiskExtent(offset, size), size
