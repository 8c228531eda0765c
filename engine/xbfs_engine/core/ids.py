"""Names of things: distinct types over bytes and strings, so that one is never taken for another."""

from __future__ import annotations

from typing import Final, NamedTuple, NewType

ChunkId = NewType("ChunkId", bytes)
"""32 bytes: keyed BLAKE3 of a chunk's plaintext."""

NodeId = NewType("NodeId", bytes)
"""32 bytes: keyed BLAKE3, under another key, of a block map node's plaintext."""

BlobHash = NewType("BlobHash", bytes)
"""32 bytes: BLAKE3 of all bytes of a blob; its name is the kind's folder and this in hex."""

PointId = NewType("PointId", str)
"""64 lower-case hex digits: hash of the manifest blob."""

ID_SIZE: Final = 32


class Placement(NamedTuple):
    """Where a chunk or node lies: the ordinal-th sealed chunk of a pack. A hint: compaction may make it stale."""

    pack: BlobHash
    ordinal: int


class ChunkRef(NamedTuple):
    """A chunk or node id with its placement hint. ``id`` is a ChunkId or a NodeId: the caller knows which."""

    id: bytes
    pack: BlobHash
    ordinal: int
