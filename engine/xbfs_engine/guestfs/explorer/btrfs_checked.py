"""What btrfs says of its own bytes: reads that are checked against their checksums, from the second copy if need be.

Files without checksums (mounted or marked nodatasum) are read unchecked, as Linux does, and so is all of a volume
with xxhash, which Python does not have.
"""

from __future__ import annotations

import hashlib
import struct
from bisect import bisect_right
from typing import TYPE_CHECKING, Final

import numpy as np
from fs_explorer.errors import CorruptDataError
from fs_explorer.filesystems.btrfs.btree import BTrees
from fs_explorer.filesystems.btrfs.chunks import (
    CHUNK_ITEM_KEY,
    FIRST_CHUNK_TREE_OBJECTID,
    Chunk,
    ChunkMap,
    LogicalRA,
)
from fs_explorer.filesystems.btrfs.fs import ROOT_ITEM
from fs_explorer.filesystems.btrfs.super import CSUM_BLAKE2, CSUM_CRC32C, CSUM_SHA256
from fs_explorer.io.source import RandomAccess

from xbfs_engine.guestfs.crc32c import crc32c_rows

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fs_explorer.filesystems.btrfs.fs import BtrfsFS
    from numpy.typing import NDArray

_SUM_TREE: Final = 7
_SUMS_OBJECT: Final = (1 << 64) - 10
_SUMS_KEY: Final = 128

_SUM_FIELD_BYTES: Final = 32
"""A tree block begins with its checksum, which covers the rest."""

_STRIPES_AT: Final = 48
_STRIPES_COUNT_AT: Final = 44
_STRIPE: Final = struct.Struct("<QQ16s")


def checked(tree: BtrfsFS) -> tuple[BTrees, LogicalRA]:
    """The tree's trees and its address space, checked; both may be used as soon as its chunks are known."""
    copies = _Copies(tree)
    sb = tree.sb
    nodes = _CheckedNodes(copies, sb.csum_type)
    trees = BTrees(nodes, sb.nodesize, sb.meta_fsid, tree.ctx.cache, sb.csum_type)
    return trees, _CheckedData(tree, trees, copies)


class _Copies:
    """The address space as each copy on this device holds it; further ones are looked for when the first is bad."""

    def __init__(self, tree: BtrfsFS) -> None:
        self._first = tree.lra
        self._tree = tree
        self._second: LogicalRA | None = None

    def __iter__(self) -> Iterator[RandomAccess]:
        yield self._first
        if self._second is None:
            self._second = self._map_second()
        if self._second.cmap.chunks:
            yield self._second

    def _map_second(self) -> LogicalRA:
        """Profile DUP keeps two copies on one device."""
        chunks = ChunkMap()
        # The chunks themselves were read before anything could be checked.
        own, root = self._tree.sb.devid, self._tree.sb.chunk_root
        unchecked = BTrees(
            self._first, self._tree.sb.nodesize, self._tree.sb.meta_fsid, self._tree.ctx.cache, self._tree.sb.csum_type
        )
        for key, item in unchecked.iter_range(root, FIRST_CHUNK_TREE_OBJECTID, CHUNK_ITEM_KEY):
            length, kind = struct.unpack_from("<Q", item)[0], struct.unpack_from("<Q", item, 24)[0]
            count = struct.unpack_from("<H", item, _STRIPES_COUNT_AT)[0]
            stripes = [_STRIPE.unpack_from(item, _STRIPES_AT + index * _STRIPE.size) for index in range(count)]
            ours = [offset for device, offset, _ in stripes if device == own]
            if len(ours) > 1:
                chunks.add(Chunk(key[2], length, kind, ours[1], None))
        return LogicalRA(self._tree.ra, chunks)


class _CheckedNodes(RandomAccess):
    """Tree blocks: only ever read one at a time, whole."""

    def __init__(self, copies: _Copies, sum_type: int) -> None:
        self._copies = copies
        self._sum_type = sum_type
        self.size = 1 << 64

    def read_at(self, off: int, n: int) -> bytes:
        for copy in self._copies:
            try:
                raw = copy.read_at(off, n)
            except CorruptDataError:
                continue
            body = np.frombuffer(raw[_SUM_FIELD_BYTES:], np.uint8).reshape(1, -1)
            sums = _sums(body, self._sum_type)
            if sums is None or raw.startswith(sums[0]):
                return raw
        raise CorruptDataError(f"btrfs: the tree block at {off:#x} can not be read, or its checksum does not match")


class _CheckedData(LogicalRA):
    """Content of files."""

    def __init__(self, tree: BtrfsFS, trees: BTrees, copies: _Copies) -> None:
        super().__init__(tree.ra, tree.lra.cmap)
        self._trees = trees
        self._copies = copies
        self._sector = tree.sb.sectorsize
        self._sum_type = tree.sb.csum_type
        self._root: int | None = None
        # ROOT_ITEM (btrfs_root_item): the address of the tree stands at 176.
        for key, item in trees.iter_from(tree.sb.root, (_SUM_TREE, ROOT_ITEM, 0)):
            if key[:2] == (_SUM_TREE, ROOT_ITEM) and len(item) >= 184:
                self._root = struct.unpack_from("<Q", item, 176)[0]
            break

    def read_at(self, off: int, n: int) -> bytes:
        if n <= 0:
            return b""
        start = off - off % self._sector
        end = off + n + -(off + n) % self._sector
        expected = dict(self._expected(start, end))
        trouble = CorruptDataError(f"btrfs: the checksum of the data at {start:#x}+{end - start} does not match")
        for copy in self._copies:
            try:
                raw = copy.read_at(start, end - start)
            except CorruptDataError as error:
                trouble = error
                continue
            sums = _sums(np.frombuffer(raw, np.uint8).reshape(-1, self._sector), self._sum_type) if expected else None
            if sums is None or all(sums[(at - start) // self._sector] == value for at, value in expected.items()):
                return raw[off - start : off - start + n]
        raise trouble

    def _expected(self, start: int, end: int) -> Iterator[tuple[int, bytes]]:
        """Addresses of sectors and what their checksums are to be, where there are any."""
        width = _WIDTHS.get(self._sum_type)
        if self._root is None or width is None:
            return
        for key, item in self._sum_items(start):
            if key[:2] != (_SUMS_OBJECT, _SUMS_KEY) or key[2] >= end:
                return
            first = max(start, key[2])
            for at in range(first, min(end, key[2] + len(item) // width * self._sector), self._sector):
                index = (at - key[2]) // self._sector * width
                yield at, item[index : index + width]

    def _sum_items(self, start: int) -> Iterator[tuple[tuple[int, int, int], bytes]]:
        """From the item that covers an address: the last one that does not begin behind it."""
        assert self._root is not None
        wanted = (_SUMS_OBJECT, _SUMS_KEY, start)
        node = self._trees.node(self._root)
        while node.level:
            below = max(0, bisect_right(node.keys, wanted) - 1)
            node = self._trees.node(node.ptrs[below], node.level - 1)
        index = bisect_right(node.keys, wanted) - 1
        if index >= 0 and node.keys[index][:2] == (_SUMS_OBJECT, _SUMS_KEY):
            wanted = node.keys[index]
        yield from self._trees.iter_from(self._root, wanted)


_WIDTHS: Final = {CSUM_CRC32C: 4, CSUM_SHA256: 32, CSUM_BLAKE2: 32}


def _sums(rows: NDArray[np.uint8], kind: int) -> list[bytes] | None:
    """The checksum of each row, or None if there is no telling."""
    if kind == CSUM_CRC32C:
        return [value.to_bytes(4, "little") for value in crc32c_rows(rows).tolist()]
    if kind == CSUM_SHA256:
        return [hashlib.sha256(row).digest() for row in rows]
    if kind == CSUM_BLAKE2:
        return [hashlib.blake2b(row, digest_size=32).digest() for row in rows]
    return None
