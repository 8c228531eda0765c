"""From extents of a disk to segments: the unit of work of the pipeline. Pure.

A segment is the touched part of one block map leaf. Segments ascend, so the map is written as a stream.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from xbfs_engine.core.errors import BitmapInvalid
from xbfs_engine.core.limits import LEAF_FANOUT

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from xbfs_engine.source.base import Extent


class Segment(NamedTuple):
    """Chunks to read: ``runs`` are (first slot, chunks) within leaf number ``leaf``. ``number`` counts from 0."""

    number: int
    leaf: int
    runs: tuple[tuple[int, int], ...]

    @property
    def chunks(self) -> int:
        """Chunks to read."""
        return sum(count for _, count in self.runs)


def plan(extents: Iterable[Extent], size_bytes: int, chunk_size: int) -> Iterator[Segment]:
    """Segments that cover ``extents`` (ascending by offset, may overlap), rounded out to whole chunks."""
    segments = 0
    leaf = -1
    runs: list[tuple[int, int]] = []
    for first, end in chunk_runs(extents, size_bytes, chunk_size):
        position = first
        while position < end:
            at, slot = divmod(position, LEAF_FANOUT)
            count = min(end - position, LEAF_FANOUT - slot)
            if at != leaf and runs:
                yield Segment(segments, leaf, tuple(runs))
                segments += 1
                runs = []
            leaf = at
            runs.append((slot, count))
            position += count
    if runs:
        yield Segment(segments, leaf, tuple(runs))


def chunk_runs(extents: Iterable[Extent], size_bytes: int, chunk_size: int) -> Iterator[tuple[int, int]]:
    """Disjoint ascending runs [first, end) of chunks touched by ``extents``."""
    first = end = -1
    for offset, length in extents:
        if offset + length > size_bytes:
            raise BitmapInvalid(f"extent ({offset}, {length}) reaches beyond the disk of {size_bytes} bytes")
        low, high = offset // chunk_size, -(-(offset + length) // chunk_size)
        if low > end:
            if end > first:
                yield first, end
            first = low
        end = max(end, high)
    if end > first:
        yield first, end


def grown_edge(old_size_bytes: int, size_bytes: int, chunk_size: int) -> list[Extent]:
    """What must be read after growth although no bitmap marks it: the old last chunk, if it was short.

    Its id was made of fewer bytes; the bytes that were added to it are zero, but nothing has hashed them yet.
    """
    start = old_size_bytes // chunk_size * chunk_size
    if old_size_bytes == size_bytes or start == old_size_bytes:
        return []
    return [(start, min(start + chunk_size, size_bytes) - start)]
