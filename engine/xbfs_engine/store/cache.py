"""Decoded chunks kept in memory, shared by all readers of a repository.

Owns which chunks are kept and who decodes a missing one; reading and checking is ``reader``'s. Any thread may call it.
Memory: ``capacity_bytes`` of plaintext, plus one batch for every thread inside ``get``.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from typing import TYPE_CHECKING, Final

from xbfs_engine.codec.envelope import ObjectKind
from xbfs_engine.core.limits import MIB

if TYPE_CHECKING:
    from collections.abc import Sequence

    from xbfs_engine.codec.compress import Buffer
    from xbfs_engine.core.ids import ChunkRef
    from xbfs_engine.store.reader import ChunkReader

CAPACITY_BYTES: Final = 128 * MIB
PATIENCE_S: Final = 1.0
"""How long others wait for a thread that fetches the chunk they want: decoding takes a thousandth of it, so a fetch
that takes longer hangs in the storage, and they had better ask it themselves and get its answer."""


class _Flight:
    """Chunks that one thread is fetching; others wait for it."""

    __slots__ = ("_latch", "_started_s", "landed")

    def __init__(self) -> None:
        self.landed: dict[bytes, Buffer] = {}
        self._started_s = time.monotonic()
        self._latch = threading.Lock()
        self._latch.acquire()

    def end(self) -> None:
        """Let everybody go on who waits."""
        self._latch.release()

    def wait(self, patience_s: float) -> None:
        """Wait until ``end``, or until the fetch takes longer than ``patience_s``."""
        if self._latch.acquire(timeout=max(self._started_s + patience_s - time.monotonic(), 0)):
            self._latch.release()


class ChunkCache:
    """The chunks used last, up to ``capacity_bytes``; a chunk wanted by many threads at once is fetched once."""

    def __init__(
        self, reader: ChunkReader, capacity_bytes: int = CAPACITY_BYTES, *, patience_s: float = PATIENCE_S
    ) -> None:
        self._reader = reader
        self._capacity = capacity_bytes
        self._patience_s = patience_s
        self._chunks: OrderedDict[bytes, Buffer] = OrderedDict()
        self._flights: dict[bytes, _Flight] = {}
        self._lock = threading.Lock()
        self.used_bytes = 0
        self.hits = 0
        self.misses = 0

    def cached(self, chunk_id: bytes) -> Buffer | None:
        """The chunk if it is in memory. Never waits for storage or decoding."""
        with self._lock:
            data = self._chunks.get(chunk_id)
            if data is not None:
                self._chunks.move_to_end(chunk_id)
                self.hits += 1
            return data

    def get(self, refs: Sequence[ChunkRef]) -> list[Buffer]:
        """The plaintexts of ``refs``, in their order; what is missing is fetched in one batch.

        Raises what ``ChunkReader.fetch`` raises; then nothing of the batch is kept.
        """
        found: dict[bytes, Buffer] = {}
        missing: dict[bytes, ChunkRef] = {}
        awaited: dict[bytes, tuple[_Flight, ChunkRef]] = {}
        own = _Flight()
        with self._lock:
            for ref in refs:
                data = self._chunks.get(ref.id)
                if data is not None:
                    self._chunks.move_to_end(ref.id)
                    found[ref.id] = data
                elif (flight := self._flights.setdefault(ref.id, own)) is own:
                    missing[ref.id] = ref
                else:
                    awaited[ref.id] = (flight, ref)
            self.hits += len(found)
            self.misses += len(missing) + len(awaited)
        if missing:
            self._fetch(missing, own)
            found |= own.landed
        late: dict[bytes, ChunkRef] = {}
        for chunk_id, (flight, ref) in awaited.items():
            flight.wait(self._patience_s)
            data = flight.landed.get(chunk_id)
            if data is None:
                late[chunk_id] = ref
            else:
                found[chunk_id] = data
        if late:
            found |= self._keep(late, self._reader.fetch(list(late.values()), ObjectKind.DATA_PACK))
        return [found[ref.id] for ref in refs]

    def _fetch(self, missing: dict[bytes, ChunkRef], flight: _Flight) -> None:
        try:
            data = self._reader.fetch(list(missing.values()), ObjectKind.DATA_PACK)
            flight.landed = self._keep(missing, data)
        finally:
            with self._lock:
                for chunk_id in missing:
                    self._flights.pop(chunk_id, None)
            flight.end()

    def _keep(self, refs: dict[bytes, ChunkRef], fetched: list[Buffer]) -> dict[bytes, Buffer]:
        landed = dict(zip(refs, fetched, strict=True))
        chunks = self._chunks
        with self._lock:
            for chunk_id, data in landed.items():
                if chunk_id not in chunks:
                    chunks[chunk_id] = data
                    self.used_bytes += len(data)
            while self.used_bytes > self._capacity and chunks:
                _, dropped = chunks.popitem(last=False)
                self.used_bytes -= len(dropped)
        return landed
