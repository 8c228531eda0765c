"""Block map nodes: their bytes and random access into them. Format only, no I/O.

A node of level 0 (leaf) names the chunks of 4 MiB of disk; one of level n names up to 256 nodes of level n-1. A child
that does not exist reads as zeros. docs/format.md, "Block map node".
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from xbfs_engine.core.errors import FormatTooNew, MapCorrupt
from xbfs_engine.core.ids import ID_SIZE, BlobHash, ChunkRef
from xbfs_engine.core.limits import LEAF_FANOUT, MAP_LEVEL_MAX, NODE_FANOUT
from xbfs_engine.store.metadata import metadata_body, metadata_chunk, metadata_hints

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from xbfs_engine.codec.compress import Buffer

VERSION = 1
HEAD = struct.Struct("<BBH")
"""Version, level, children; then the presence bitmap (bit i of byte i//8 from the least significant) and the ids."""
HINTS_HEAD = struct.Struct("<H")
"""Packs in the hint table; then their hashes, one table index (u8) a child, one ordinal (u16) a child."""
SAME_PACK = BlobHash(bytes(ID_SIZE))
"""In a hint: the pack that this very node lies in."""
assert HEAD.size == 4


def fanout(level: int) -> int:
    """Children a node of this level can have."""
    return NODE_FANOUT if level else LEAF_FANOUT


def node_span(level: int) -> int:
    """Chunks a node of this level covers."""
    return LEAF_FANOUT * int(NODE_FANOUT**level)


def top_level(chunks: int) -> int:
    """The level of the root of a map of so many chunks."""
    level = 0
    while node_span(level) < chunks:
        level += 1
    return level


def encode_node(level: int, children: Sequence[ChunkRef | None]) -> tuple[bytes, bytes]:
    """Body and hints of a node; ``children`` has fanout(level) places."""
    assert len(children) == fanout(level)
    present = [child for child in children if child is not None]
    mask = sum(1 << slot for slot, child in enumerate(children) if child is not None)
    body = b"".join(
        [HEAD.pack(VERSION, level, len(present)), mask.to_bytes(len(children) // 8, "little"), *(c.id for c in present)]
    )
    table = {pack: number for number, pack in enumerate(dict.fromkeys(child.pack for child in present))}
    hints = b"".join(
        [
            HINTS_HEAD.pack(len(table)),
            *table,
            bytes(table[child.pack] for child in present),
            struct.pack(f"<{len(present)}H", *(child.ordinal for child in present)),
        ]
    )
    return body, hints


class Node:
    """A decoded node: a view over its bytes, so that thousands fit in a cache. Immutable."""

    __slots__ = ("_hints", "_ids", "_indexes", "_mask", "_pack", "_packs", "count", "level")

    def __init__(self, plaintext: Buffer, level: int, pack: BlobHash) -> None:
        """Decode a node that must be of ``level`` and was read from ``pack``. Raises MapCorrupt, FormatTooNew."""
        body = bytes(metadata_body(plaintext))
        hints = bytes(metadata_hints(plaintext))
        if len(body) < HEAD.size or len(hints) < HINTS_HEAD.size:
            raise MapCorrupt("a block map node is truncated")
        version, found_level, count = HEAD.unpack_from(body)
        if version != VERSION:
            raise FormatTooNew(f"a block map node has version {version}")
        width = fanout(level) // 8
        ids_at = HEAD.size + width
        if found_level != level or level > MAP_LEVEL_MAX or len(body) != ids_at + count * ID_SIZE:
            raise MapCorrupt(f"a block map node of level {found_level} stands where level {level} belongs")
        self._mask = int.from_bytes(body[HEAD.size : ids_at], "little")
        packs: int = HINTS_HEAD.unpack_from(hints)[0]
        indexes_at = HINTS_HEAD.size + packs * ID_SIZE
        if self._mask.bit_count() != count or not count or len(hints) != indexes_at + 3 * count:
            raise MapCorrupt(f"a block map node of level {level} has impossible counts")
        self._indexes = hints[indexes_at : indexes_at + count]
        if max(self._indexes) >= packs:
            raise MapCorrupt(f"a block map node of level {level} hints at a pack it does not list")
        self.level = level
        self.count: int = count
        self._ids = body[ids_at:]
        self._packs = hints[HINTS_HEAD.size : indexes_at]
        self._hints = hints[indexes_at + count :]
        self._pack = pack

    @property
    def memory_bytes(self) -> int:
        """About what this node costs in a cache."""
        return len(self._ids) + len(self._packs) + 3 * self.count + 400

    def child(self, slot: int) -> ChunkRef | None:
        """The child at a place, or None where there is none."""
        mask = self._mask
        if not mask >> slot & 1:
            return None
        return self._at((mask & ((1 << slot) - 1)).bit_count())

    def children(self) -> Iterator[tuple[int, ChunkRef]]:
        """All children with their places, ascending."""
        mask = self._mask
        for rank in range(self.count):
            lowest = mask & -mask
            mask ^= lowest
            yield lowest.bit_length() - 1, self._at(rank)

    def to_list(self) -> list[ChunkRef | None]:
        """Children by place."""
        listed: list[ChunkRef | None] = [None] * fanout(self.level)
        for slot, child in self.children():
            listed[slot] = child
        return listed

    def _at(self, rank: int) -> ChunkRef:
        index = self._indexes[rank] * ID_SIZE
        pack = BlobHash(self._packs[index : index + ID_SIZE])
        ordinal = self._hints[2 * rank] | self._hints[2 * rank + 1] << 8
        return ChunkRef(
            self._ids[rank * ID_SIZE : (rank + 1) * ID_SIZE], self._pack if pack == SAME_PACK else pack, ordinal
        )


def node_plaintext(level: int, children: Sequence[ChunkRef | None]) -> bytes:
    """The plaintext of a metadata chunk that holds this node."""
    return metadata_chunk(*encode_node(level, children))
