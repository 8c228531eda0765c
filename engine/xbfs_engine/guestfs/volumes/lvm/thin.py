"""The metadata of a thin pool (dm-thin): which block of the pool's data holds a block of a thin volume.

Layout: Linux ``drivers/md/dm-thin-metadata.c`` and ``drivers/md/persistent-data/dm-btree-internal.h``: blocks of
4 KiB with a CRC-32C; a B-tree from device number to the root of a B-tree from block number to place. All integers are
little-endian. A pool keeps a bounded cache of nodes, so it and its volumes serve one thread at a time.
"""

from __future__ import annotations

import struct
from bisect import bisect_left, bisect_right
from collections import OrderedDict
from typing import TYPE_CHECKING, Final, NamedTuple

from xbfs_engine.core.errors import GuestDamaged, GuestUnsupported
from xbfs_engine.core.limits import GIB, KIB
from xbfs_engine.guestfs.crc32c import crc32c
from xbfs_engine.guestfs.volumes.sources import Derived

if TYPE_CHECKING:
    from xbfs_engine.formats.source import BlockSource

_BLOCK: Final = 4096
_SECTOR: Final = 512
_SUPERBLOCK: Final = struct.Struct("<IIQ16sQIIQQ128s128sQQIIQIII")
_SUPERBLOCK_MAGIC: Final = 27022010
_SUPERBLOCK_XOR: Final = 160774
_NODE: Final = struct.Struct("<IIQIIII")
_NODE_XOR: Final = 121107
_INTERNAL: Final = 1
_LEAF: Final = 2
_DEPTH_MAX: Final = 16
"""A node has room for 126 entries at least, filled to a third: far fewer levels reach 2^64."""

_NODES_CACHED: Final = 512
"""Up to 10 MiB of Python integers."""

_CHUNK_MIN: Final = 64 * KIB
_CHUNK_MAX: Final = GIB
_TIME_BITS: Final = 24

assert _NODE.size == 32


class _Node(NamedTuple):
    is_leaf: bool
    keys: tuple[int, ...]
    values: tuple[int, ...]


class ThinPool:
    """A thin pool as its last committed transaction left it."""

    def __init__(self, metadata: BlockSource, data: BlockSource) -> None:
        self._metadata = metadata
        self.data = data
        self._nodes: OrderedDict[int, _Node] = OrderedDict()
        block = self._block(0, _SUPERBLOCK_XOR, "superblock")
        fields = _SUPERBLOCK.unpack_from(block)
        magic, version = fields[4:6]
        self._mapping_root = int(fields[11])
        chunk_sectors, incompatible = fields[13], fields[18]
        if magic != _SUPERBLOCK_MAGIC or version not in (1, 2) or incompatible:
            raise GuestUnsupported(f"thin pool: version {version}, features {incompatible:#x} are not known here")
        self.chunk_bytes = int(chunk_sectors) * _SECTOR
        if not _CHUNK_MIN <= self.chunk_bytes <= _CHUNK_MAX or self.chunk_bytes % _CHUNK_MIN:
            raise GuestDamaged(f"thin pool: blocks of {self.chunk_bytes} bytes are claimed")

    def volume(self, device: int, size_bytes: int, origin: BlockSource | None) -> ThinVolume:
        """A thin volume; what it never wrote is in ``origin``, if there is one, else zeros."""
        root = self._find(self._mapping_root, device)
        if root is None:
            raise GuestDamaged(f"thin pool: it has no device {device}")
        return ThinVolume(self, root, size_bytes, origin)

    def place(self, root: int, block: int) -> int | None:
        """Offset in the pool's data of a volume's block; None if it was never written."""
        value = self._find(root, block)
        if value is None:
            return None
        offset = (value >> _TIME_BITS) * self.chunk_bytes
        if offset + self.chunk_bytes > self.data.size_bytes:
            raise GuestDamaged(f"thin pool: block {block} lies at {offset}, beyond the end of the pool's data")
        return offset

    def _find(self, root: int, key: int) -> int | None:
        at = root
        for _ in range(_DEPTH_MAX):
            node = self._node(at)
            if node.is_leaf:
                index = bisect_left(node.keys, key)
                found = index < len(node.keys) and node.keys[index] == key
                return node.values[index] if found else None
            index = bisect_right(node.keys, key) - 1
            if index < 0:
                return None
            at = node.values[index]
        raise GuestDamaged(f"thin pool: the tree at block {root} is deeper than {_DEPTH_MAX}")

    def _node(self, number: int) -> _Node:
        node = self._nodes.get(number)
        if node is None:
            node = self._nodes[number] = self._parse(number)
            if len(self._nodes) > _NODES_CACHED:
                self._nodes.popitem(last=False)
        else:
            self._nodes.move_to_end(number)
        return node

    def _parse(self, number: int) -> _Node:
        block = self._block(number, _NODE_XOR, "node")
        _, flags, _, count, entries, value_bytes, _ = _NODE.unpack_from(block)
        values_at = _NODE.size + 8 * entries
        if flags not in (_INTERNAL, _LEAF) or count > entries or value_bytes != 8 or values_at + 8 * entries > _BLOCK:
            raise GuestDamaged(f"thin pool: node {number} has flags {flags:#x}, {count} of {entries} entries")
        keys: tuple[int, ...] = struct.unpack_from(f"<{count}Q", block, _NODE.size)
        return _Node(flags == _LEAF, keys, struct.unpack_from(f"<{count}Q", block, values_at))

    def _block(self, number: int, xor: int, what: str) -> bytes:
        """A block whose checksum and own number are right."""
        if (number + 1) * _BLOCK > self._metadata.size_bytes:
            raise GuestDamaged(f"thin pool: {what} {number} lies beyond the end of the metadata")
        block = self._metadata.read_at(number * _BLOCK, _BLOCK)
        stored, _, own = struct.unpack_from("<IIQ", block)
        # The kernel leaves out the inversion that ends a CRC-32C.
        if crc32c(block[4:]) ^ 0xFFFF_FFFF ^ xor != stored or own != number:
            raise GuestDamaged(f"thin pool: {what} {number} does not match its checksum")
        return block


class ThinVolume(Derived):
    """A thin volume or a thin snapshot."""

    def __init__(self, pool: ThinPool, root: int, size_bytes: int, origin: BlockSource | None) -> None:
        super().__init__(size_bytes)
        self._pool = pool
        self._root = root
        self._origin = origin

    def _read(self, offset: int, length: int) -> bytes:
        pieces = []
        while length:
            block, inside = divmod(offset, self._pool.chunk_bytes)
            take = min(length, self._pool.chunk_bytes - inside)
            place = self._pool.place(self._root, block)
            if place is None:
                pieces.append(self._never_written(offset, take))
            else:
                pieces.append(self._pool.data.read_at(place + inside, take))
            offset += take
            length -= take
        return b"".join(pieces)

    def _never_written(self, offset: int, length: int) -> bytes:
        if self._origin is None:
            return bytes(length)
        there = min(max(self._origin.size_bytes - offset, 0), length)
        return (self._origin.read_at(offset, there) if there else b"") + bytes(length - there)
