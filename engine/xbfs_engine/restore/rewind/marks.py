"""Marked chunks of a disk. One thread at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator


class ChunkMarks:
    """A byte a chunk: 16 MiB for a TiB of disk at the smallest chunk size. ``size_bytes`` and lengths of the disk."""

    def __init__(self, size_bytes: int, chunk_size: int, *, full: bool = False) -> None:
        self.size_bytes = size_bytes
        self.chunk_size = chunk_size
        count = -(-size_bytes // chunk_size)
        self._marks = bytearray(b"\1") * count if full else bytearray(count)

    def add(self, first: int, end: int) -> None:
        """Mark the chunks [first, end)."""
        assert 0 <= first <= end <= len(self._marks)
        self._marks[first:end] = b"\1" * (end - first)

    def replace(self, where: ChunkMarks, by: ChunkMarks) -> None:
        """Take the marks of ``by`` at the chunks that are marked in ``where``."""
        for first, end in where.runs():
            self._marks[first:end] = by._marks[first:end]

    def runs(self) -> Iterator[tuple[int, int]]:
        """Marked chunks [first, end), ascending, neighbours together."""
        first = self._marks.find(1)
        while first >= 0:
            end = self._marks.find(0, first)
            end = len(self._marks) if end < 0 else end
            yield first, end
            first = self._marks.find(1, end)

    def batches(self, chunks_max: int) -> Iterator[list[tuple[int, int]]]:
        """The same, cut and taken together so that each batch but the last has ``chunks_max`` chunks."""
        batch: list[tuple[int, int]] = []
        room = chunks_max
        for start, end in self.runs():
            first = start
            while first < end:
                cut = min(end, first + room)
                batch.append((first, cut))
                room -= cut - first
                first = cut
                if not room:
                    yield batch
                    batch, room = [], chunks_max
        if batch:
            yield batch

    def extent(self, first: int, end: int) -> tuple[int, int]:
        """Offset and length in bytes of the chunks [first, end)."""
        offset = first * self.chunk_size
        return offset, min(end * self.chunk_size, self.size_bytes) - offset

    @property
    def marked_bytes(self) -> int:
        """Bytes of the disk in marked chunks."""
        if not self._marks:
            return 0
        short = len(self._marks) * self.chunk_size - self.size_bytes
        return self._marks.count(1) * self.chunk_size - (short if self._marks[-1] else 0)
