"""What a disk shall hold: the content of a restore point's disk, followed by zeros where the VDI has grown since.

One thread at a time uses a WantedDisk; each may have its own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from xbfs_engine.catalog.blockmap import BlockMap, NodeStore, differing_chunks
from xbfs_engine.codec.envelope import ObjectKind
from xbfs_engine.core.errors import ChunkCorrupt, IntegrityError
from xbfs_engine.core.limits import LEAF_FANOUT
from xbfs_engine.restore.rewind.marks import ChunkMarks

if TYPE_CHECKING:
    from collections.abc import Sequence

    from xbfs_engine.catalog.node import Node
    from xbfs_engine.catalog.restore_point import DiskRecord
    from xbfs_engine.codec.compress import Buffer
    from xbfs_engine.core.ids import ChunkRef
    from xbfs_engine.store.reader import ChunkReader


class WantedDisk:
    """``record``: of the point; ``size_bytes``: of the VDI, which is not smaller."""

    def __init__(self, reader: ChunkReader, record: DiskRecord, size_bytes: int) -> None:
        assert size_bytes >= record.size_bytes
        self.record = record
        self.size_bytes = size_bytes
        self._reader = reader
        self._nodes = NodeStore(reader)
        self._map = BlockMap(self._nodes, record.root, record.chunks)
        self._chunk_id = reader.id_function(ObjectKind.DATA_PACK)
        self._leaf: tuple[int, Node | None] = (-1, None)

    @property
    def chunk_size(self) -> int:
        """Bytes of a chunk."""
        return self.record.chunk_size

    def marks(self, *, full: bool = False) -> ChunkMarks:
        """Marks for the chunks of the VDI, none or all set."""
        return ChunkMarks(self.size_bytes, self.chunk_size, full=full)

    def differing_from(self, newer: DiskRecord) -> ChunkMarks:
        """Where a disk that is as ``newer`` says differs; without reading any data.

        Raises MapCorrupt, BlobLost, StorageError.
        """
        assert newer.chunk_size == self.chunk_size
        found = self.marks()
        newer_map = BlockMap(self._nodes, newer.root, newer.chunks)
        for position, _ in differing_chunks(newer_map, self._map, self._nodes):
            found.add(position, position + 1)
        return found

    def holds(self, position: int, view: memoryview) -> bool:
        """Whether ``view``, all of a chunk of the VDI, is what it shall be."""
        ref = self._ref(position)
        if ref is None:
            return _is_zero(view)
        stored = self._stored(position)
        return self._chunk_id(view[:stored]) == ref.id and _is_zero(view[stored:])

    def content(self, positions: Sequence[int]) -> list[Buffer]:
        """What these chunks (ascending) shall hold, checked against their ids.

        Raises IntegrityError, naming the place; KeyNotHeld, StorageError.
        """
        refs = {position: ref for position in positions if (ref := self._ref(position)) is not None}
        try:
            fetched = self._reader.fetch(list(refs.values()), ObjectKind.DATA_PACK)
        except IntegrityError as exc:
            first, last = positions[0] * self.chunk_size, (positions[-1] + 1) * self.chunk_size
            where = f"disk {self.record.number}, between bytes {first} and {last}"
            raise type(exc)(f"{where}: {exc.message}", hint=exc.hint) from exc
        chunks: dict[int, Buffer] = dict(zip(refs, fetched, strict=True))
        return [self._padded(position, chunks.get(position, b"")) for position in positions]

    def _padded(self, position: int, chunk: Buffer) -> Buffer:
        length = min(self.chunk_size, self.size_bytes - position * self.chunk_size)
        have = memoryview(chunk).nbytes
        if have == length:
            return chunk
        if have not in {0, self._stored(position)}:
            raise ChunkCorrupt(f"disk {self.record.number}: chunk {position} has {have} bytes, which is not its size")
        return bytes(chunk).ljust(length, b"\0")

    def _stored(self, position: int) -> int:
        """Bytes of a chunk that the point has."""
        return min(self.chunk_size, self.record.size_bytes - position * self.chunk_size)

    def _ref(self, position: int) -> ChunkRef | None:
        if position >= self.record.chunks:
            return None
        number, slot = divmod(position, LEAF_FANOUT)
        if self._leaf[0] != number:
            self._leaf = (number, self._map.leaf(number))
        leaf = self._leaf[1]
        return None if leaf is None else leaf.child(slot)


def _is_zero(view: memoryview) -> bool:
    return not np.frombuffer(view, np.uint8).any()
