"""One worker thread of the pipeline: reads a segment and does everything with it, up to its leaf.

read -> zero test -> id -> dedup -> compress -> seal into its own pack. There is no queue between stages: each step
works on the whole segment in a reused buffer and all heavy calls release the GIL.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import numpy as np

from xbfs_engine.codec.compress import Compressor
from xbfs_engine.core.limits import LEAF_FANOUT
from xbfs_engine.ingest.assembler import LeafResult
from xbfs_engine.ingest.statistics import Stage, WorkerCounters
from xbfs_engine.store.session import Place

if TYPE_CHECKING:
    from collections.abc import Callable

    from xbfs_engine.catalog.mapwriter import Child, MapWriter
    from xbfs_engine.catalog.node import Node
    from xbfs_engine.codec.compress import Buffer
    from xbfs_engine.ingest.planner import Segment
    from xbfs_engine.source.base import DiskSource
    from xbfs_engine.store.session import WriteSession

_PROBE_WORDS = 8


class Worker:
    """Processes segments of any disk, one at a time. Owned by one thread."""

    def __init__(
        self, session: WriteSession, chunk_id: Callable[[Buffer], bytes], *, chunk_size: int, level: int
    ) -> None:
        self._session = session
        self._chunk_id = chunk_id
        self._chunk_size = chunk_size
        self._compressor = Compressor(level)
        self._writer = session.data_writer()
        self._buffer = bytearray(LEAF_FANOUT * chunk_size)
        self._view = memoryview(self._buffer)
        self._rows = np.frombuffer(self._buffer, dtype=np.uint64).reshape(LEAF_FANOUT, chunk_size // 8)
        self.counters = WorkerCounters()

    def close_pack(self) -> None:
        """Write out the pack that is being filled."""
        started = time.perf_counter()
        self._session.seal(self._writer)
        self.counters.seconds[Stage.STORE] += time.perf_counter() - started

    def process(self, segment: Segment, source: DiskSource, maps: MapWriter, *, carry: bool) -> LeafResult:
        """Read a segment and store what is new of it."""
        seconds = self.counters.seconds
        began = time.perf_counter()
        base = maps.base_leaf(segment.leaf)
        children: list[Child | None] = [None] * LEAF_FANOUT
        if carry and base is not None:
            for slot, ref in base.children():
                children[slot] = (ref.id, Place(ref.pack, ref.ordinal))
        read = time.perf_counter()
        seconds[Stage.MAP] += read - began
        ends = self._read(segment, source)
        hashed = time.perf_counter()
        seconds[Stage.READ] += hashed - read
        ids = self._ids(ends)
        looked = time.perf_counter()
        seconds[Stage.HASH] += looked - hashed
        unknown = self._unchanged(ids, base, children, ends)
        places = self._session.find([chunk_id for _, chunk_id in unknown])
        seconds[Stage.LOOKUP] += time.perf_counter() - looked
        stored = False
        for (slot, chunk_id), place in zip(unknown, places, strict=True):
            if place is None:
                child, is_new = self._store(slot, chunk_id, ends[slot])
                stored |= is_new
                children[slot] = child
            else:
                self.counters.duplicate += ends[slot]
                children[slot] = (chunk_id, Place(*place))
        return LeafResult(segment.number, segment.leaf, children, stored)

    def _read(self, segment: Segment, source: DiskSource) -> dict[int, int]:
        """Fill the buffer; returns the bytes of each chunk read, by slot."""
        size = self._chunk_size
        disk_start = segment.leaf * LEAF_FANOUT * size
        limit = source.size_bytes - disk_start
        lengths: dict[int, int] = {}
        for first, count in segment.runs:
            end = min((first + count) * size, limit)
            source.read_into(disk_start + first * size, self._view[first * size : end])
            self.counters.source += end - first * size
            for slot in range(first, first + count):
                lengths[slot] = min(size, limit - slot * size)
        return lengths

    def _ids(self, lengths: dict[int, int]) -> list[tuple[int, bytes]]:
        """Ids of the chunks that are not zero, by slot."""
        size, view, rows, chunk_id = self._chunk_size, self._view, self._rows, self._chunk_id
        probes: list[bool] = np.any(rows[:, :_PROBE_WORDS], axis=1).tolist()
        found: list[tuple[int, bytes]] = []
        for slot, length in lengths.items():
            start = slot * size
            if length < size:
                self._buffer[start + length : start + size] = bytes(size - length)
                probes[slot] = False
            if probes[slot] or rows[slot].any():
                found.append((slot, chunk_id(view[start : start + length])))
            else:
                self.counters.zero += length
        return found

    def _unchanged(
        self, ids: list[tuple[int, bytes]], base: Node | None, children: list[Child | None], lengths: dict[int, int]
    ) -> list[tuple[int, bytes]]:
        """Settle the chunks that the base has at the same place, in a pack that is there; returns the others."""
        for slot in lengths:
            children[slot] = None
        unknown: list[tuple[int, bytes]] = []
        for slot, chunk_id in ids:
            ref = None if base is None else base.child(slot)
            if ref is not None and ref.id == chunk_id and self._session.holds(ref.pack):
                children[slot] = (chunk_id, Place(ref.pack, ref.ordinal))
                self.counters.unchanged += lengths[slot]
            else:
                unknown.append((slot, chunk_id))
        return unknown

    def _store(self, slot: int, chunk_id: bytes, length: int) -> tuple[Child, bool]:
        """Store a chunk unless another worker, or this one, already does."""
        if self._writer.full:
            self.close_pack()
        mine = Place(self._writer.ticket, self._writer.count)
        place = self._session.claim(chunk_id, mine)
        if place is not mine:
            self.counters.duplicate += length
            return (chunk_id, place), False
        seconds = self.counters.seconds
        start = slot * self._chunk_size
        began = time.perf_counter()
        encoding, payload = self._compressor.encode(self._view[start : start + length])
        compressed = time.perf_counter()
        self._writer.add(chunk_id, payload, length, encoding)
        seconds[Stage.COMPRESS] += compressed - began
        seconds[Stage.SEAL] += time.perf_counter() - compressed
        self.counters.new += length
        return (chunk_id, mine), True
