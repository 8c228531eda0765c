"""What is fetched ahead: pieces of a disk in a ring of fixed size, shared by threads that read and connections.

Readers announce, claim, wait for and release pieces; connections take, finish and put them back. Any thread may call
any method; none but ``Fetch.wait`` blocks. Memory: the ring, plus pieces that somebody waits for unannounced.

Pieces may be small and many: a connection that found nothing to do is woken for one that a reader waits for, or else
for a batch.
"""

from __future__ import annotations

import threading
from collections import deque
from typing import TYPE_CHECKING, NamedTuple

from xbfs_engine.core.limits import MIB
from xbfs_engine.source.nbd.protocol import SECTOR

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from xbfs_engine.core.errors import XbfsError
    from xbfs_engine.source.base import Extent

PIECE_SIZE = 2 * MIB
"""Largest single request. More only makes readers wait longer for its first byte (hosts serve 512 KiB at a time)."""

_BATCH_BYTES = PIECE_SIZE
"""What a connection is woken for while nobody waits; with a small ring, a quarter of that."""


class Fetch:
    """One piece on its way. ``buffer`` takes whole sectors from ``start``; ``wanted`` is what was asked for."""

    __slots__ = ("_arrived", "buffer", "failures", "place", "queued", "released", "start", "wanted")

    def __init__(self, piece: Extent, start: int, buffer: memoryview, place: int | None) -> None:
        offset, length = piece
        self.start = start
        self.buffer = buffer
        self.wanted = buffer[offset - start : offset - start + length]
        self.place = place
        """Where in the ring the buffer lies; None if it is a buffer of its own."""
        self.queued = True
        self.released = False
        self.failures = 0
        self._arrived = threading.Event()

    def arrive(self) -> None:
        """Let its reader go on."""
        self._arrived.set()

    def wait(self, timeout_s: float) -> bool:
        """Wait until it arrived or everything failed; False if neither happened in time."""
        return self._arrived.wait(timeout_s)


class _Sectors(NamedTuple):
    """A piece rounded out to whole sectors, but not beyond the disk."""

    start: int
    length: int


class Window:
    """The pieces of one disk that are wanted, under way, or there.

    ``wake`` is called once for each ``take`` that found nothing, when it should be tried again; it must not block.
    """

    def __init__(self, disk_size_bytes: int, ring_bytes: int, wake: Callable[[], None]) -> None:
        assert ring_bytes >= PIECE_SIZE + 2 * SECTOR
        self._disk_size = disk_size_bytes
        self._ring_size = min(ring_bytes, disk_size_bytes)
        self._wake = wake
        self._lock = threading.Lock()
        self._announced: Iterator[Extent] = iter(())
        self._next: Extent | None = None
        self._ring: memoryview | None = None
        self._in_ring: deque[Fetch] = deque()
        self._ahead: dict[Extent, Fetch] = {}
        self._overtaken: set[Extent] = set()
        self._queue: deque[Fetch] = deque()
        self._claimed: set[Fetch] = set()
        self._queue_bytes = 0
        self._batch = min(_BATCH_BYTES, ring_bytes // 4)
        self._idle = 0
        self._failure: XbfsError | None = None
        self.arrivals = 0
        """Pieces that have arrived; for those who want to know whether anything still moves."""

    def announce(self, pieces: Iterator[Extent]) -> None:
        """Fetch these ahead: ascending, disjoint, each at most PIECE_SIZE."""
        with self._lock:
            self._announced = pieces
            self._ring = memoryview(bytearray(self._ring_size))
            self._extend()
            self._call()

    def claim(self, pieces: Sequence[Extent]) -> list[Fetch]:
        """Become the reader of these; what is not fetched ahead is put first in the queue. Raises the failure."""
        fetches: list[Fetch] = []
        urgent: list[Fetch] = []
        with self._lock:
            self._check()
            for piece in pieces:
                fetch = self._ahead.pop(piece, None)
                if fetch is None:
                    sectors = self._sectors(piece)
                    fetch = Fetch(piece, sectors.start, memoryview(bytearray(sectors.length)), None)
                    urgent.append(fetch)
                    if self._ring is not None:
                        self._overtaken.add(piece)
                fetches.append(fetch)
            self._claimed.update(fetches)
            self._push_front(urgent)
            self._call()
        return fetches

    @property
    def failed(self) -> bool:
        """Whether all is over."""
        return self._failure is not None

    def check(self) -> None:
        """Raise the failure, if there is one."""
        with self._lock:
            self._check()

    def release(self, fetch: Fetch) -> None:
        """Be done with it; its place is used for what comes next."""
        with self._lock:
            fetch.released = True
            self._claimed.discard(fetch)
            while self._in_ring and self._in_ring[0].released:
                self._in_ring.popleft()
            self._extend()
            self._call()

    def take(self, *, idle: bool) -> Fetch | None:
        """The next piece to ask a server for. ``idle``: the caller sleeps until ``wake`` if there is none."""
        with self._lock:
            if self._queue:
                fetch = self._queue.popleft()
                fetch.queued = False
                self._queue_bytes -= len(fetch.buffer)
                return fetch
            self._idle += idle and self._failure is None
            return None

    def arrived(self, fetch: Fetch) -> None:
        """The buffer of ``fetch`` is full."""
        with self._lock:
            self.arrivals += 1
        fetch.arrive()

    def put_back(self, fetches: Sequence[Fetch]) -> None:
        """Ask again for these, before all others."""
        with self._lock:
            if self._failure is None:
                self._push_front(fetches)
                self._call()

    def fail(self, failure: XbfsError) -> None:
        """Give up: all who wait, and all who come, get the first failure."""
        with self._lock:
            self._failure = self._failure or failure
            self._announced, self._next = iter(()), None
            self._queue.clear()
            self._ahead.clear()
            for fetch in self._claimed:
                fetch.arrive()
            self._wake_some(self._idle)

    def _check(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _call(self) -> None:
        """Wake as many of those who found nothing to do as there is reason to."""
        if self._idle and self._queue:
            awaited = any(fetch.queued for fetch in self._claimed)
            self._wake_some(min(self._idle, max(awaited, self._queue_bytes // self._batch)))

    def _wake_some(self, number: int) -> None:
        self._idle -= number
        for _ in range(number):
            self._wake()

    def _push_front(self, fetches: Sequence[Fetch]) -> None:
        self._queue.extendleft(reversed(fetches))
        for fetch in fetches:
            fetch.queued = True
            self._queue_bytes += len(fetch.buffer)

    def _extend(self) -> None:
        """Put as many announced pieces into the ring as there is room for; without any more, let it go."""
        if self._ring is None:
            return
        while (piece := self._next or next(self._announced, None)) is not None:
            if piece in self._overtaken:
                self._overtaken.remove(piece)
                self._next = None
                continue
            sectors = self._sectors(piece)
            place = self._room(sectors.length)
            self._next = piece if place is None else None
            if place is None:
                return
            # Who overtook what was never announced is forgotten as soon as the announced ones are beyond it.
            if self._overtaken:
                self._overtaken = {other for other in self._overtaken if other > piece}
            fetch = Fetch(piece, sectors.start, self._ring[place : place + sectors.length], place)
            self._in_ring.append(fetch)
            self._ahead[piece] = fetch
            self._queue.append(fetch)
            self._queue_bytes += sectors.length
        if not self._in_ring:
            self._ring = None
            self._overtaken.clear()

    def _room(self, length: int) -> int | None:
        """A free place of this length after the newest in the ring."""
        if not self._in_ring:
            return 0
        oldest, newest = self._in_ring[0].place, self._in_ring[-1].place
        assert oldest is not None
        assert newest is not None
        end = newest + len(self._in_ring[-1].buffer)
        if newest < oldest:
            return end if end + length <= oldest else None
        if end + length <= self._ring_size:
            return end
        return 0 if length <= oldest else None

    def _sectors(self, piece: Extent) -> _Sectors:
        offset, length = piece
        start = offset // SECTOR * SECTOR
        return _Sectors(start, min(-(-(offset + length) // SECTOR) * SECTOR, self._disk_size) - start)
