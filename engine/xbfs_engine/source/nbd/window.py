"""What is fetched ahead: pieces of a disk in a ring of fixed size, shared by reading threads and the event loop.

Readers announce, claim, wait for and release pieces; connections take, finish and put them back. Any thread may call
any method; none but ``Fetch.wait`` blocks. Memory: the ring, plus pieces that somebody waits for unannounced.
"""

from __future__ import annotations

import threading
from collections import deque
from itertools import chain
from typing import TYPE_CHECKING, NamedTuple

from xbfs_engine.core.limits import MIB
from xbfs_engine.source.nbd.protocol import SECTOR

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from xbfs_engine.core.errors import XbfsError
    from xbfs_engine.source.base import Extent

PIECE_SIZE = 2 * MIB
"""Largest single request. More only makes readers wait longer for its first byte (hosts serve 512 KiB at a time)."""


class Fetch:
    """One piece on its way. ``buffer`` takes whole sectors from ``start``; ``wanted`` is what was asked for."""

    __slots__ = ("_arrived", "buffer", "failures", "place", "released", "start", "wanted")

    def __init__(self, piece: Extent, start: int, buffer: memoryview, place: int | None) -> None:
        offset, length = piece
        self.start = start
        self.buffer = buffer
        self.wanted = buffer[offset - start : offset - start + length]
        self.place = place
        """Where in the ring the buffer lies; None if it is a buffer of its own."""
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

    ``wake`` is called when there is work again after ``take`` found none; it must not block.
    """

    def __init__(self, disk_size_bytes: int, ring_bytes: int, wake: Callable[[], None]) -> None:
        assert ring_bytes >= PIECE_SIZE + 2 * SECTOR
        self._disk_size = disk_size_bytes
        self._ring_size = min(ring_bytes, disk_size_bytes)
        self._wake = wake
        self._lock = threading.Lock()
        self._announced: Iterator[Extent] = iter(())
        self._ring: memoryview | None = None
        self._in_ring: deque[Fetch] = deque()
        self._ahead: dict[Extent, Fetch] = {}
        self._overtaken: set[Extent] = set()
        self._queue: deque[Fetch] = deque()
        self._claimed: set[Fetch] = set()
        self._idle = False
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
            self._queue.extendleft(reversed(urgent))
        self._call()
        return fetches

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
                return self._queue.popleft()
            self._idle |= idle
            return None

    def arrived(self, fetch: Fetch) -> None:
        """The buffer of ``fetch`` is full."""
        self.arrivals += 1
        fetch.arrive()

    def put_back(self, fetches: Sequence[Fetch]) -> None:
        """Ask again for these, before all others."""
        with self._lock:
            if self._failure is None:
                self._queue.extendleft(reversed(fetches))
        self._call()

    def fail(self, failure: XbfsError) -> None:
        """Give up: all who wait, and all who come, get the first failure."""
        with self._lock:
            self._failure = self._failure or failure
            self._announced = iter(())
            self._queue.clear()
            self._ahead.clear()
            for fetch in self._claimed:
                fetch.arrive()

    def _check(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _call(self) -> None:
        """Wake those who found nothing to do. Without the lock: they may run at once."""
        with self._lock:
            if not self._idle or not self._queue:
                return
            self._idle = False
        self._wake()

    def _extend(self) -> None:
        """Put as many announced pieces into the ring as there is room for; without any more, let it go."""
        if self._ring is None:
            return
        for piece in self._announced:
            if piece in self._overtaken:
                self._overtaken.remove(piece)
                continue
            sectors = self._sectors(piece)
            place = self._room(sectors.length)
            if place is None:
                self._announced = chain([piece], self._announced)
                return
            # Who overtook what was never announced is forgotten as soon as the announced ones are beyond it.
            if self._overtaken:
                self._overtaken = {other for other in self._overtaken if other > piece}
            fetch = Fetch(piece, sectors.start, self._ring[place : place + sectors.length], place)
            self._in_ring.append(fetch)
            self._ahead[piece] = fetch
            self._queue.append(fetch)
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
