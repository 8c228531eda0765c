"""The log replayed in memory, as the kernel does at the next mount: what it holds is laid over the source.

Buffers are pieces of blocks copied as they are; inodes are turned from the kernel's own form into that on the disk.
An item is left out when what is on the disk is newer (by its log sequence number), or when its blocks are freed later
in the log. What only concerns free space, quotas or back references is not needed for reading. Changes of several
transactions ("intents") that were under way are not finished: the files concerned are told, so that they are refused.
Rules: the kernel's xfs_buf_item_recover.c, xfs_inode_item_recover.c, xfs_icreate_item.c.
"""

from __future__ import annotations

import struct
from collections import Counter
from typing import TYPE_CHECKING, Final, NamedTuple

from xbfs_engine.core.errors import GuestDamaged, GuestUnsupported
from xbfs_engine.guestfs.xfs.geometry import SECTOR
from xbfs_engine.guestfs.xfs.inode_items import replay_inode
from xbfs_engine.guestfs.xfs.overlay import Overlay
from xbfs_engine.guestfs.xfs.transactions import (
    BUFFER_CANCELLED,
    BUFFER_INODES,
    ITEM_BUFFER,
    ITEM_ICREATE,
    ITEM_INODE,
    Item,
    committed_items,
)

if TYPE_CHECKING:
    from xbfs_engine.formats.source import BlockSource
    from xbfs_engine.guestfs.xfs.geometry import Geometry
    from xbfs_engine.guestfs.xfs.log import Log

PENDING_BYTES_MAX: Final = 128 << 20
"""Of the log that is replayed: its items are held in memory meanwhile."""

_BUFFER: Final = struct.Struct("<4HqI")
_CHUNK: Final = 128
"""Bytes per bit of a buffer's map."""
_BUFFER_SECTORS_MAX: Final = 128
"""64 KiB; the kernel's largest metadata block."""
_KIND_SHIFT: Final = 11
_KINDS_LEFT_OUT: Final = frozenset({1, 2, 3, 5, 6, 7, 19, 20})
"""Buffers that are not read here: quotas, free space and inode headers, realtime maps."""

_ICREATE: Final = struct.Struct(">4x6I")
_ICREATE_INODES_MAX: Final = 4096

_CLUSTER_SECTORS: Final = tuple(1 << log for log in range(8))
"""Inodes are written in buffers of some power of two."""

_LSN_AT_BY_START: Final = {
    b"BMA3": (32, 40),
    b"XDB3": (16, 24),
    b"XDD3": (16, 24),
    b"XDF3": (16, 24),
    b"XSLM": (48, 16),
    b"XARM": (48, 16),
    b"AB3B": (24, 32),
    b"AB3C": (24, 32),
    b"IAB3": (24, 32),
    b"FIB3": (24, 32),
    b"RMB3": (24, 32),
    b"R3FC": (24, 32),
    b"XFSB": (240, 32),
}
"""Where a block's log sequence number and filesystem are, by its magic number; the superblock's is its own uuid."""
_LSN_AT_BY_INFO: Final = dict.fromkeys((b"\x3e\xbe", b"\x3b\xee", b"\x3d\xf1", b"\x3d\xff"), (24, 32))

_INTENT: Final = struct.Struct("<HH4xQ")
_INTENTS_IGNORED: Final = {0x1236, 0x1240, 0x1242, 0x124A, 0x124C, 0x124E}
"""Extents to free, back references and reference counts to change (and their realtime kinds)."""
_ITEMS_IGNORED: Final = {0x1237, 0x1238, 0x1241, 0x1243, 0x124B, 0x124D, 0x124F, 0x123D, 0x123E}
"""That those are done; unlinked inodes; quotas."""
_REMAP: Final = 0x1244
_REMAP_EXTENTS_AT: Final = 16
_REMAP_EXTENT_BYTES: Final = 32
_ATTRIBUTE: Final = 0x1246
_ATTRIBUTE_INODE: Final = struct.Struct("<QI")
_ATTRIBUTE_INODE_AT: Final = 16
_ATTRIBUTE_OPERATIONS: Final = (1, 2, 3)
"""Set, remove, replace; the others concern back references (parent pointers)."""
_EXCHANGE: Final = 0x1248
_EXCHANGE_INODES: Final = struct.Struct("<QQ")
_EXCHANGE_INODES_AT: Final = 16
_DONE: Final = {0x1245: _REMAP, 0x1247: _ATTRIBUTE, 0x1249: _EXCHANGE}


class Replayed(NamedTuple):
    """What came of it. ``unfinished`` are inodes whose change was under way: they can not be shown rightly."""

    source: Overlay
    transactions: int
    unfinished: frozenset[int]


def replay(source: BlockSource, geometry: Geometry, log: Log) -> Replayed:
    """The source with the log laid over it; nothing is written.

    Raises GuestDamaged or GuestUnsupported if the log can not be replayed as a whole.
    """
    if not geometry.has_checksums:
        raise GuestUnsupported("logs of XFS version 4 are not replayed")
    if log.pending_bytes > PENDING_BYTES_MAX:
        raise GuestUnsupported(f"the log holds {log.pending_bytes >> 20} MiB that are not yet in place")
    transactions = list(committed_items(log))
    replayer = _Replayer(source, geometry, transactions)
    for items in transactions:
        for item in items:
            replayer.apply(item)
    return Replayed(replayer.overlay, len(transactions), replayer.unfinished())


class _Replayer:
    def __init__(self, source: BlockSource, geometry: Geometry, transactions: list[list[Item]]) -> None:
        self.overlay = Overlay(source)
        self._geometry = geometry
        self._size = geometry.size_bytes
        self._cancelled = Counter(
            _place(item)
            for items in transactions
            for item in items
            if item.type == ITEM_BUFFER and item.flags & BUFFER_CANCELLED
        )
        self._intents: dict[tuple[int, int], Item] = {}

    def apply(self, item: Item) -> None:
        if item.type == ITEM_BUFFER:
            self._buffer(item)
        elif item.type == ITEM_INODE:
            replay_inode(self.overlay, self._geometry, item, self._is_cancelled)
        elif item.type == ITEM_ICREATE:
            self._create_inodes(item)
        elif item.type in (_REMAP, _ATTRIBUTE, _EXCHANGE):
            self._intents[item.type, _intent_id(item)] = item
        elif item.type in _DONE:
            self._intents.pop((_DONE[item.type], _intent_id(item)), None)
        elif item.type not in _INTENTS_IGNORED and item.type not in _ITEMS_IGNORED:
            raise GuestUnsupported(f"the log has items of type {item.type:#x}, which are not known")

    def unfinished(self) -> frozenset[int]:
        """Inodes that changes under way concern."""
        return frozenset(inode for item in self._intents.values() for inode in _inodes_of(item))

    def _is_cancelled(self, sector: int, sectors: int) -> bool:
        return self._cancelled[sector, sectors] > 0

    def _buffer(self, item: Item) -> None:
        place = sector, sectors = _place(item)
        if self._cancelled[place]:
            self._cancelled[place] -= bool(item.flags & BUFFER_CANCELLED)
            return
        # Of buffers full of inodes only the list of unlinked ones was changed.
        if item.flags & (BUFFER_CANCELLED | BUFFER_INODES) or item.flags >> _KIND_SHIFT in _KINDS_LEFT_OUT:
            return
        if not 0 <= sector * SECTOR <= self._size - sectors * SECTOR or sectors > _BUFFER_SECTORS_MAX:
            raise GuestDamaged(f"log: a buffer of {sectors} sectors at {sector} is outside of the filesystem")
        old = self.overlay.read_at(sector * SECTOR, sectors * SECTOR)
        if self._lsn_of(old) >= item.lsn:
            return
        self.overlay.write_at(sector * SECTOR, _patched(old, item))

    def _lsn_of(self, block: bytes) -> int:
        """Of a block on the disk: 0 if it is no metadata of this filesystem, so that anything is newer."""
        places = _LSN_AT_BY_START.get(block[:4]) or _LSN_AT_BY_INFO.get(block[8:10])
        if places is None:
            return 0
        lsn_at, uuid_at = places
        own = self._geometry.uuid.bytes if block[:4] == b"XFSB" else self._geometry.meta_uuid
        lsn = int.from_bytes(block[lsn_at : lsn_at + 8], "big")
        return lsn if block[uuid_at : uuid_at + 16] == own and lsn != 0xFFFF_FFFF_FFFF_FFFF else 0

    def _create_inodes(self, item: Item) -> None:
        """A chunk of inodes that are not in use yet."""
        geometry = self._geometry
        if len(item.regions[0]) < _ICREATE.size:
            raise GuestDamaged("log: inodes are created nowhere")
        group, block, count, size, blocks, generation = _ICREATE.unpack_from(item.regions[0])
        if size != geometry.inode_bytes or not 0 < count <= _ICREATE_INODES_MAX:
            raise GuestDamaged(f"log: {count} inodes of {size} bytes are created")
        if count != blocks << geometry.inodes_per_block_log:
            raise GuestDamaged(f"log: {count} inodes are created in {blocks} blocks")
        number = group << geometry.group_log | block
        offset = geometry.offset_of(number, blocks)
        if any(self._is_cancelled(offset // SECTOR, sectors) for sectors in _CLUSTER_SECTORS):
            return
        first = number << geometry.inodes_per_block_log
        inode = bytearray(size)
        inode[:5] = b"IN\0\0\3"
        inode[92:96] = generation.to_bytes(4, "big")
        inode[96:100] = b"\xff" * 4
        inode[160:176] = geometry.meta_uuid
        parts = [bytes(inode[:152] + (first + index).to_bytes(8, "big") + inode[160:]) for index in range(count)]
        self.overlay.write_at(offset, b"".join(parts))


def _place(item: Item) -> tuple[int, int]:
    """First sector and number of sectors of a buffer."""
    if len(item.regions[0]) < _BUFFER.size:
        raise GuestDamaged("log: a buffer has no description")
    _, _, _, sectors, sector, _ = _BUFFER.unpack_from(item.regions[0])
    return sector, sectors


def _patched(old: bytes, item: Item) -> bytes:
    """The buffer with its logged chunks in place: each region holds a run of bits, or the start of one."""
    words = _BUFFER.unpack_from(item.regions[0])[5]
    bits = int.from_bytes(item.regions[0][_BUFFER.size : _BUFFER.size + 4 * words], "little")
    new = bytearray(old)
    at = 0
    for region in item.regions[1:]:
        rest = bits >> at
        if not rest:
            break
        at += (rest & -rest).bit_length() - 1
        rest = bits >> at
        run = min((~rest & (rest + 1)).bit_length() - 1, len(region) // _CHUNK)
        if not run or (at + run) * _CHUNK > len(old):
            raise GuestDamaged("log: a buffer's changes do not fit into it")
        new[at * _CHUNK : (at + run) * _CHUNK] = region[: run * _CHUNK]
        at += run
    if bits >> at:
        raise GuestDamaged("log: a buffer's changes are not all there")
    return bytes(new)


def _intent_id(item: Item) -> int:
    if len(item.regions[0]) < _INTENT.size:
        raise GuestDamaged("log: an intent has no number")
    return int(_INTENT.unpack_from(item.regions[0])[2])


def _inodes_of(item: Item) -> list[int]:
    data = item.regions[0]
    try:
        if item.type == _REMAP:
            return [
                int.from_bytes(data[at : at + 8], "little")
                for at in range(_REMAP_EXTENTS_AT, len(data) - 7, _REMAP_EXTENT_BYTES)
            ]
        if item.type == _EXCHANGE:
            return list(_EXCHANGE_INODES.unpack_from(data, _EXCHANGE_INODES_AT))
        inode, operation = _ATTRIBUTE_INODE.unpack_from(data, _ATTRIBUTE_INODE_AT)
    except struct.error:
        raise GuestDamaged("log: an intent is cut off") from None
    return [inode] if operation & 0xFF in _ATTRIBUTE_OPERATIONS else []
