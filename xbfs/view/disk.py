"""A disk of a restore point as random-access bytes: block map and decoded chunks put together.

Owns the way from an offset to chunks; which chunks are kept is ``store.cache``'s, map nodes ``catalog.blockmap``'s.
Any number of threads may read at once. Where the map has no chunk the disk reads as zeros.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from xbfs.view.base import Extent, joined, joined_cached
from xbfs_engine.core.errors import IntegrityError, MapCorrupt
from xbfs_engine.core.limits import CHUNK_SIZE_MAX, LEAF_FANOUT, MIB

if TYPE_CHECKING:
    from collections.abc import Iterator

    from typing_extensions import Buffer

    from xbfs_engine.catalog.blockmap import BlockMap
    from xbfs_engine.catalog.node import Node
    from xbfs_engine.core.ids import ChunkRef
    from xbfs_engine.store.cache import ChunkCache

LEAVES_MAX: Final = 256
"""Leaves a disk keeps unpacked, so that reads do not walk the map: 1 GiB of disk in about 4 MiB."""
BATCH_BYTES: Final = 4 * MIB
"""Chunks asked for at once: bounds what one reading thread holds beside its answer."""

_ZEROS: Final = memoryview(bytes(CHUNK_SIZE_MAX))
_Refs = tuple["ChunkRef | None", ...]
"""The chunks of a leaf by place."""
_NO_CHUNKS: Final[_Refs] = (None,) * LEAF_FANOUT


class PointDisk:
    """One disk. ``chunk_size`` in bytes; the last chunk may be short."""

    __slots__ = ("_cache", "_chunk_size", "_leaves", "_map", "_size")

    def __init__(self, block_map: BlockMap, cache: ChunkCache, *, size_bytes: int, chunk_size: int) -> None:
        self._map = block_map
        self._cache = cache
        self._size = size_bytes
        self._chunk_size = chunk_size
        # By leaf number. No lock: entries are immutable, and whoever clears it while another looks hurts nobody.
        self._leaves: dict[int, _Refs] = {}

    @property
    def size_bytes(self) -> int:
        """Size of the disk."""
        return self._size

    def read_at(self, offset: int, length: int) -> bytes:
        """The bytes of [offset, offset+length), clipped at the end. May block.

        Raises IntegrityError, whose message names the first byte of the disk that can not be read, or StorageError.
        """
        return joined(self.parts_at(offset, length))

    def parts_at(self, offset: int, length: int) -> list[memoryview]:
        """``read_at`` in pieces, one for each chunk; they are views of what the cache holds. Raises the same."""
        end = min(offset + length, self._size)
        position = offset // self._chunk_size
        if offset < end <= (position + 1) * self._chunk_size:
            return [self._slice(self._chunk(position), position, offset, end)]
        parts: list[memoryview] = []
        for first, last in self._batches(offset, end):
            chunks = self._chunks(first, last)
            parts += [self._slice(chunks.get(position), position, offset, end) for position in range(first, last)]
        return parts

    def warm(self, offset: int, length: int) -> None:
        """Decode what [offset, offset+length) needs into the cache. May block; raises as ``read_at``."""
        for first, last in self._batches(offset, min(offset + length, self._size)):
            self._chunks(first, last)

    def read_cached(self, offset: int, length: int) -> bytes | memoryview | None:
        """The same bytes if all map nodes and chunks are in memory, else None. Never blocks, never raises."""
        return joined_cached(self.parts_cached(offset, length))

    def parts_cached(self, offset: int, length: int) -> list[memoryview] | None:
        """``read_cached`` in pieces, one for each chunk."""
        size = self._chunk_size
        position = offset // size
        start = offset - position * size
        if start + length <= size and offset + length <= self._size:
            part = self._cached(position, start, start + length)
            return None if part is None else [part]
        end = min(offset + length, self._size)
        parts: list[memoryview] = []
        while offset < end:
            stop = min(start + end - offset, size)
            part = self._cached(position, start, stop)
            if part is None:
                return None
            parts.append(part)
            offset += stop - start
            position += 1
            start = 0
        return parts

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        """Alternating data and hole extents, exact to a chunk, clipped at the end. May block."""
        end = min(offset + length, self._size)
        size = self._chunk_size
        at = data_end = offset
        for start, stop in self._data(offset // size, -(-end // size)) if offset < end else ():
            low, high = max(start * size, offset), min(stop * size, end)
            if low > data_end:
                if data_end > at:
                    yield Extent(at, data_end - at, True)
                yield Extent(data_end, low - data_end, False)
                at = low
            data_end = high
        if data_end > at:
            yield Extent(at, data_end - at, True)
        if data_end < end:
            yield Extent(data_end, end - data_end, False)

    def _data(self, first: int, last: int) -> Iterator[tuple[int, int]]:
        """Runs of positions in [first, last) that have chunks, ascending."""
        for number, leaf in self._map.leaves(first // LEAF_FANOUT, -(-last // LEAF_FANOUT)):
            base = number * LEAF_FANOUT
            for slot, _ in leaf.children():
                if first <= base + slot < last:
                    yield base + slot, base + slot + 1

    def _batches(self, offset: int, end: int) -> Iterator[tuple[int, int]]:
        """Ranges of positions that cover [offset, end), each of at most BATCH_BYTES."""
        size = self._chunk_size
        step = BATCH_BYTES // size
        last = -(-end // size)
        for first in range(offset // size, last, step) if offset < end else ():
            yield first, min(first + step, last)

    def _chunk(self, position: int) -> Buffer | None:
        """One chunk, or None where the disk is zero."""
        ref = self._refs(position // LEAF_FANOUT, position)[position % LEAF_FANOUT]
        if ref is None:
            return None
        try:
            return self._cache.get([ref])[0]
        except IntegrityError as exc:
            raise self._located(exc, position) from exc

    def _chunks(self, first: int, last: int) -> dict[int, Buffer]:
        """The chunks that exist in [first, last), by position."""
        refs: dict[int, ChunkRef] = {}
        for number in range(first // LEAF_FANOUT, (last - 1) // LEAF_FANOUT + 1):
            base = number * LEAF_FANOUT
            low, high = max(base, first), min(base + LEAF_FANOUT, last)
            leaf = self._refs(number, low)[low - base : high - base]
            refs |= {position: ref for position, ref in enumerate(leaf, low) if ref is not None}
        try:
            data = self._cache.get(list(refs.values()))
        except IntegrityError as exc:
            raise self._blamed(refs, exc) from exc
        return dict(zip(refs, data, strict=True))

    def _blamed(self, refs: dict[int, ChunkRef], problem: IntegrityError) -> IntegrityError:
        """The error of the first chunk that can not be read: a batch does not say which one it was."""
        for position, ref in refs.items():
            try:
                self._cache.get([ref])
            except IntegrityError as exc:
                return self._located(exc, position)
        return problem

    def _located(self, problem: IntegrityError, position: int) -> IntegrityError:
        return type(problem)(f"byte {position * self._chunk_size} of the disk: {problem.message}", hint=problem.hint)

    def _cached(self, position: int, start: int, stop: int) -> memoryview | None:
        """Bytes [start, stop) of the chunk at ``position``, if they are known without waiting."""
        number = position // LEAF_FANOUT
        refs = self._leaves.get(number)
        if refs is None:
            known, leaf = self._map.leaf_cached(number)
            if not known:
                return None
            refs = self._unpacked(number, leaf)
        ref = refs[position % LEAF_FANOUT]
        if ref is None:
            return _ZEROS[start:stop]
        chunk = self._cache.cached(ref.id)
        if chunk is None or len(chunk) != self._expected(position):
            return None
        return memoryview(chunk)[start:stop]

    def _refs(self, number: int, position: int) -> _Refs:
        """The chunks of a leaf. May block; an error says that ``position`` can not be read."""
        refs = self._leaves.get(number)
        if refs is not None:
            return refs
        try:
            return self._unpacked(number, self._map.leaf(number))
        except IntegrityError as exc:
            raise self._located(exc, position) from exc

    def _unpacked(self, number: int, leaf: Node | None) -> _Refs:
        refs = _NO_CHUNKS if leaf is None else tuple(leaf.to_list())
        if len(self._leaves) >= LEAVES_MAX:
            self._leaves.clear()
        self._leaves[number] = refs
        return refs

    def _expected(self, position: int) -> int:
        return min(self._chunk_size, self._size - position * self._chunk_size)

    def _slice(self, chunk: Buffer | None, position: int, offset: int, end: int) -> memoryview:
        """The part of [offset, end) that lies in the chunk at ``position``; None is a chunk of zeros."""
        start = position * self._chunk_size
        view = _ZEROS if chunk is None else memoryview(chunk)
        if chunk is not None and len(view) != self._expected(position):
            raise MapCorrupt(f"byte {start} of the disk: the map names a chunk of {len(view)} bytes")
        return view[max(offset - start, 0) : min(end - start, self._expected(position))]
