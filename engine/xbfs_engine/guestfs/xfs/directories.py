"""Directories: entries in their order, and one entry by the hash of its name.

A directory is a small list in its inode, or blocks of entries followed (32 GiB further on in the fork's address
space) by an index of hashes: inside the only block, in one leaf, or in a tree of leaves.
Layout: "XFS Algorithms & Data Structures", chapter Directories.
"""

from __future__ import annotations

import struct
from bisect import bisect_left
from typing import TYPE_CHECKING, Final, NamedTuple

from xbfs_engine.core.errors import GuestDamaged
from xbfs_engine.guestfs.base import Kind
from xbfs_engine.guestfs.xfs.extents import extents, runs_of
from xbfs_engine.guestfs.xfs.inodes import FORMAT_LOCAL
from xbfs_engine.guestfs.xfs.names import block_magic, find_leaf, forward, name_hash
from xbfs_engine.guestfs.xfs.volume import DIRECTORY_HEADER, TREE_HEADER

if TYPE_CHECKING:
    from collections.abc import Iterator

    from xbfs_engine.guestfs.xfs.inodes import Inode
    from xbfs_engine.guestfs.xfs.volume import Volume

_INDEX_OFFSET: Final = 1 << 35
"""XFS_DIR2_LEAF_OFFSET: byte of the fork where the index starts."""

_DATA_MAGICS: Final = (b"XD2D", b"XDD3")
_SINGLE_MAGICS: Final = (b"XD2B", b"XDB3")
_LEAF_MAGICS: Final = ((0xD2F1, 0xD2FF), (0x3DF1, 0x3DFF))
_DATA_HEADER_BYTES: Final = (16, 64)
_LEAF_HEADER_BYTES: Final = (16, 64)
_LEAF_COUNT_AT: Final = (12, 56)
_FREE_TAG: Final = 0xFFFF
_TAIL_BYTES: Final = 8

_KINDS: Final = (
    Kind.UNKNOWN,
    Kind.FILE,
    Kind.DIRECTORY,
    Kind.CHARACTER_DEVICE,
    Kind.BLOCK_DEVICE,
    Kind.FIFO,
    Kind.SOCKET,
    Kind.SYMLINK,
    Kind.CHARACTER_DEVICE,
)
"""By XFS_DIR3_FT_…; the last is a whiteout of overlayfs, which is a character device 0:0."""


class Entry(NamedTuple):
    """A name with its inode number; ``next`` is where the listing goes on after it."""

    name: bytes
    inode: int
    kind: Kind
    next: int


class Directory:
    """One directory of a volume; keeps nothing."""

    def __init__(self, volume: Volume, inode: Inode) -> None:
        self._volume = volume
        self._inode = inode
        geometry = volume.geometry
        self._checksums = geometry.has_checksums
        self._types = geometry.has_file_types
        self._bytes = geometry.directory_bytes
        self._blocks = geometry.directory_bytes >> geometry.block_log
        self._index = _INDEX_OFFSET >> geometry.block_log

    def entries(self, cookie: int) -> Iterator[Entry]:
        """Entries from the start, or after the one whose ``next`` was ``cookie``."""
        if self._inode.content.format == FORMAT_LOCAL:
            return (entry for entry in self._short() if entry.next > cookie)
        return self._long(cookie)

    def find(self, name: bytes) -> Entry | None:
        """The entry of exactly this name."""
        if self._inode.content.format == FORMAT_LOCAL or self._volume.geometry.is_case_insensitive:
            return next((entry for entry in self.entries(0) if entry.name == name), None)
        wanted = name_hash(name)
        first = self._data_block(0)
        index = self._single_index(first) if first[:4] in _SINGLE_MAGICS else self._tree_index(wanted)
        for value, address in index:
            if value > wanted:
                break
            if value == wanted and address:  # 0 is where an entry was
                entry = self._entry_at(address << 3)
                if entry.name == name:
                    return entry
        return None

    def _damaged(self, what: str) -> GuestDamaged:
        return GuestDamaged(f"directory {self._inode.number}: {what}")

    def _entry(self, name: bytes, number: int, kind: int, following: int) -> Entry:
        if not name or b"/" in name or b"\0" in name:
            raise self._damaged(f"the name {name!r} is not possible")
        try:
            self._volume.geometry.inode_place(number)
        except GuestDamaged as exc:
            raise self._damaged(f"entry {name!r}: {exc}") from None
        return Entry(name, number, _KINDS[kind] if kind < len(_KINDS) else Kind.UNKNOWN, following)

    def _short(self) -> Iterator[Entry]:
        data = self._inode.content.data[: self._inode.size_bytes]
        if len(data) < 6:
            raise self._damaged("it is too short")
        count, wide = data[0], data[1]
        number_bytes = 8 if wide else 4
        at = 2 + number_bytes
        for index in range(count):
            name_end = at + 3 + data[at] if at < len(data) else len(data)
            number_at = name_end + self._types
            end = number_at + number_bytes
            if end > len(data):
                raise self._damaged(f"entry {index} is outside of it")
            number = int.from_bytes(data[number_at:end], "big")
            yield self._entry(data[at + 3 : name_end], number, data[name_end] if self._types else 0, index + 1)
            at = end

    def _long(self, cookie: int) -> Iterator[Entry]:
        for index, data in self._data_blocks(cookie // self._bytes):
            start = index * self._bytes
            for entry in self._parse(data, start):
                if entry.next > cookie and entry.name not in (b".", b".."):
                    yield entry

    def _data_blocks(self, first: int) -> Iterator[tuple[int, bytes]]:
        """Number and bytes of each block of entries, holes left out."""
        position = first * self._blocks
        for extent in extents(self._volume, self._inode, self._inode.content, position):
            position = max(position, extent.start // self._blocks * self._blocks)
            while position < extent.end:
                if position >= self._index:
                    return
                yield position // self._blocks, self._data_block(position // self._blocks)
                position += self._blocks

    def _data_block(self, index: int) -> bytes:
        runs = runs_of(self._volume, self._inode, self._inode.content, index * self._blocks, self._blocks)
        data = self._volume.metadata(runs, DIRECTORY_HEADER, self._inode.number, "directory block")
        if data[:4] not in (_DATA_MAGICS[self._checksums], _SINGLE_MAGICS[self._checksums]):
            raise self._damaged(f"block {index} holds no entries")
        return data

    def _data_end(self, data: bytes) -> int:
        """Where entries end in a block: the only block of a directory also holds the index."""
        if data[:4] not in _SINGLE_MAGICS:
            return len(data)
        count = int.from_bytes(data[-_TAIL_BYTES:-4], "big")
        end = len(data) - _TAIL_BYTES - 8 * count
        if end < _DATA_HEADER_BYTES[self._checksums]:
            raise self._damaged(f"its index of {count} names does not fit into its block")
        return end

    def _parse(self, data: bytes, start: int) -> Iterator[Entry]:
        at = _DATA_HEADER_BYTES[self._checksums]
        end = self._data_end(data)
        while at < end:
            if data[at : at + 2] == b"\xff\xff":
                length = int.from_bytes(data[at + 2 : at + 4], "big")
                if not length or length % 8 or length > end - at:
                    raise self._damaged(f"free space of {length} bytes at {start + at} is not possible")
                at += length
            else:
                entry = self._decode(data, at, end, start)
                at = entry.next - start
                yield entry

    def _decode(self, data: bytes, at: int, end: int, start: int) -> Entry:
        """The entry at a place of a block whose entries go up to ``end``."""
        name_end = at + 9 + data[at + 8] if end - at >= 16 else end
        following = (name_end + self._types + 2 + 7) & ~7
        # The entry's last two bytes say where it starts.
        if following > end or int.from_bytes(data[following - 2 : following], "big") != at:
            raise self._damaged(f"there is no entry at {start + at}")
        number = int.from_bytes(data[at : at + 8], "big")
        kind = data[name_end] if self._types else 0
        return self._entry(data[at + 9 : name_end], number, kind, start + following)

    def _entry_at(self, offset: int) -> Entry:
        index, at = divmod(offset, self._bytes)
        data = self._data_block(index)
        if at < _DATA_HEADER_BYTES[self._checksums] or data[at : at + 2] == b"\xff\xff":
            raise self._damaged(f"its index points to {offset}, where there is no entry")
        return self._decode(data, at, self._data_end(data), index * self._bytes)

    def _single_index(self, data: bytes) -> Iterator[tuple[int, int]]:
        end = self._data_end(data)
        words = struct.unpack_from(f">{(len(data) - _TAIL_BYTES - end) // 4}I", data, end)
        return zip(words[::2], words[1::2], strict=True)

    def _tree_index(self, wanted: int) -> Iterator[tuple[int, int]]:
        """Hashes from the first that is not below ``wanted``, with the addresses of their entries."""
        where = f"index of directory {self._inode.number}"
        block, data = find_leaf(self._index_block, self._index, wanted, self._checksums, where)
        seen = {block}
        while True:
            if block_magic(data) not in _LEAF_MAGICS[self._checksums]:
                raise self._damaged(f"block {block} is no leaf of its index")
            at = _LEAF_COUNT_AT[self._checksums]
            count = int.from_bytes(data[at : at + 2], "big")
            if count > (len(data) - _LEAF_HEADER_BYTES[self._checksums]) // 8:
                raise self._damaged(f"{count} names do not fit into leaf {block} of its index")
            words = struct.unpack_from(f">{2 * count}I", data, _LEAF_HEADER_BYTES[self._checksums])
            first = bisect_left(words[::2], wanted)
            yield from zip(words[2 * first :: 2], words[2 * first + 1 :: 2], strict=True)
            block = forward(data)
            if not block:
                return
            if block in seen:
                raise self._damaged(f"leaf {block} of its index comes twice")
            seen.add(block)
            data = self._index_block(block)

    def _index_block(self, block: int) -> bytes:
        if block < self._index:
            raise self._damaged(f"block {block} is not in its index")
        runs = runs_of(self._volume, self._inode, self._inode.content, block, self._blocks)
        return self._volume.metadata(runs, TREE_HEADER, self._inode.number, "directory index")
