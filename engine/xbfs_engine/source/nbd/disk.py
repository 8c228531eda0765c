"""A disk of a host as a source: connections that fetch ahead of the threads that read.

``NbdDisk`` is called from worker threads; each connection is made by a task of the event loop that ``open_nbd_disk``
runs in, and then carries data in a thread of its own. The two meet in ``window.Window`` only: no connection ever writes
into a caller's buffer, so a reader may leave at any time. The event loop moves no data.
"""

from __future__ import annotations

import threading
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING

import numpy as np
import trio

from xbfs_engine.core.errors import CertificateRejected, SourceChanged, SourceUnreadable, TransferFailed, XbfsError
from xbfs_engine.core.limits import MIB
from xbfs_engine.core.log import Logger
from xbfs_engine.source.nbd.connection import NbdConnection
from xbfs_engine.source.nbd.target import NbdTarget, Timeouts
from xbfs_engine.source.nbd.window import PIECE_SIZE, Window

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence

    from outcome import Outcome

    from xbfs_engine.source.base import Extent
    from xbfs_engine.source.nbd.budget import HostBudget
    from xbfs_engine.source.nbd.window import Fetch

    Targets = Callable[[], Awaitable[Sequence[NbdTarget]]]

READ_AHEAD_BYTES = 32 * MIB

_FLIGHT_BYTES = 2 * PIECE_SIZE
_FLIGHT_REQUESTS = 32
"""In flight per connection. A host serves one request at a time: a second one hides the latency, no more is gained."""

_log = Logger("xbfs.nbd")


class NbdDisk:
    """The disk. Any thread but the event loop's may read; several may at once."""

    def __init__(
        self, size_bytes: int, extents: Callable[[], Iterator[Extent]] | None, window: Window, patience_s: float
    ) -> None:
        self._size = size_bytes
        self._extents = extents
        self._window = window
        self._patience_s = patience_s

    @property
    def size_bytes(self) -> int:
        """Virtual size, as XAPI and every connection gave it."""
        return self._size

    def data_extents(self) -> Iterator[Extent]:
        """What the caller knows of allocation, or all of the disk: hosts do not tell."""
        if self._extents is not None:
            yield from self._extents()
        elif self._size:
            yield 0, self._size

    def read_ahead(self, reads: Iterator[Extent]) -> None:
        """Begin to fetch these."""
        self._window.announce(piece for offset, length in reads for piece in _pieces(offset, length))

    def read_into(self, offset: int, view: memoryview) -> None:
        """Fill ``view`` with what was fetched ahead, or fetch it now.

        Raises TransferFailed, or whatever kept the last connection from being made again (PoolError, SourceError).
        """
        assert offset + len(view) <= self._size
        for fetch in self._window.claim(list(_pieces(offset, len(view)))):
            self._wait(fetch)
            rest = len(fetch.wanted)
            # numpy copies without the interpreter's lock: others go on meanwhile.
            np.copyto(np.frombuffer(view[:rest], np.uint8), np.frombuffer(fetch.wanted, np.uint8))
            view = view[rest:]
            self._window.release(fetch)
        assert not view

    def check_unchanged(self) -> None:
        """Do nothing: a snapshot does not change, and every connection compared the size."""

    def close(self) -> None:
        """Let nobody read any more."""
        self._window.fail(_closed())

    def _wait(self, fetch: Fetch) -> None:
        """Wait for a piece as long as any piece arrives; connections have deadlines of their own that come first."""
        arrivals = self._window.arrivals
        while not fetch.wait(self._patience_s):
            if arrivals == self._window.arrivals:
                self._window.fail(TransferFailed(f"nothing of the disk arrived for {self._patience_s:g} s"))
            arrivals = self._window.arrivals
        self._window.check()


@asynccontextmanager
async def open_nbd_disk(
    targets: Targets,
    budget: HostBudget,
    *,
    connections: int,
    size_bytes: int,
    extents: Callable[[], Iterator[Extent]] | None = None,
    timeouts: Timeouts = Timeouts(),  # noqa: B008 - immutable
    read_ahead_bytes: int = READ_AHEAD_BYTES,
) -> AsyncIterator[NbdDisk]:
    """Open a disk of ``size_bytes`` over up to ``connections`` connections; waits until the first one is made.

    ``targets`` asks XAPI where the disk can be read now, best first; it is asked again for every new connection.
    ``extents``: where the disk may hold data, if that is known. ``read_ahead_bytes`` bounds the memory (3 MiB or more).

    Raises TransferFailed, CertificateRejected, SourceChanged (another size), SourceUnreadable (no target), and what
    ``targets`` raises. Later failures are raised by reads.
    """
    assert connections > 0
    bell = threading.Semaphore(0)
    window = Window(size_bytes, read_ahead_bytes, bell.release)
    patience_s = timeouts.tries * (timeouts.connect_s + timeouts.message_s) + sum(timeouts.pauses_s)
    disk = NbdDisk(size_bytes, extents, window, patience_s)
    crew = _Crew(connections)
    failure: Exception | None = None
    async with trio.open_nursery() as nursery:
        for _ in range(connections):
            nursery.start_soon(_Member(targets, budget, timeouts, size_bytes, window, bell, crew).run)
        try:
            await crew.settled.wait()
            window.check()
            yield disk
        except Exception as exc:  # noqa: BLE001 - raised below: a nursery would wrap it in a group
            failure = exc
        finally:
            disk.close()
            nursery.cancel_scope.cancel()
    if failure is not None:
        raise failure


class _Crew:
    """The members that are left. ``settled``: one of them is connected, or nobody is left."""

    def __init__(self, members: int) -> None:
        self.members = members
        self.settled = trio.Event()


class _Member:
    """A task that keeps one connection and, over all its reconnections to a host, one token of that host."""

    def __init__(
        self,
        targets: Targets,
        budget: HostBudget,
        timeouts: Timeouts,
        size_bytes: int,
        window: Window,
        bell: threading.Semaphore,
        crew: _Crew,
    ) -> None:
        self._targets = targets
        self._budget = budget
        self._timeouts = timeouts
        self._size = size_bytes
        self._window = window
        self._bell = bell
        self._crew = crew
        self._seat = AsyncExitStack()
        self._owner: str | None = None
        self._failures = 0

    async def run(self) -> None:
        """Connect and read until the window fails; connect again when that breaks, but not for ever."""
        reason: XbfsError = _closed()
        try:
            async with self._seat:
                while True:
                    try:
                        await self._serve()
                    except XbfsError as exc:
                        _log.info("nbd connection lost", host=self._owner, failures=self._failures, reason=exc.message)
                        if self._failures >= len(self._timeouts.pauses_s) or not exc.retryable:
                            reason = exc
                            return
                    else:
                        return
                    await trio.sleep(self._timeouts.pauses_s[self._failures])
                    self._failures += 1
        finally:
            self._leave(reason)

    def _leave(self, reason: XbfsError) -> None:
        """Go; the others go on with fewer. The last one takes the disk along, and so does a disk of another size.

        When all are cancelled this lets go the threads that wait: whoever started them may wait for them in turn.
        """
        self._crew.members -= 1
        if not self._crew.members or isinstance(reason, SourceChanged):
            self._window.fail(reason)
            self._crew.settled.set()

    async def _serve(self) -> None:
        connection = await self._connect()
        try:
            self._crew.settled.set()
            await self._in_thread(connection)
        finally:
            await connection.aclose()

    async def _connect(self) -> NbdConnection:
        """Try every target once. Raises the first failure, or the first that no other try will mend."""
        targets = await self._targets()
        if not targets:
            raise SourceUnreadable(
                "no host offers this disk over NBD",
                hint="give a network of the pool the purpose nbd (`xe network-param-add param-name=purpose`)",
            )
        failures: list[XbfsError] = []
        # A host that has a place for us now goes before the ones that we would wait for.
        for target in sorted(targets, key=self._must_wait):
            await self._sit(target.owner)
            try:
                async with self._budget.opening(target.owner):
                    connection = await NbdConnection.open(target, timeouts=self._timeouts)
            except (TransferFailed, CertificateRejected) as exc:
                failures.append(exc)
                continue
            if connection.size_bytes != self._size:
                await connection.aclose()
                raise SourceChanged(f"{target.place} shows {connection.size_bytes} bytes; XAPI says {self._size}")
            return connection
        raise next((failure for failure in failures if not failure.retryable), failures[0])

    def _must_wait(self, target: NbdTarget) -> bool:
        return target.owner != self._owner and not self._budget.free(target.owner)

    async def _sit(self, owner: str) -> None:
        """Hold a token of this host."""
        if owner == self._owner:
            return
        self._owner = None
        await self._seat.aclose()
        await self._seat.enter_async_context(self._budget.token(owner))
        self._owner = owner

    async def _in_thread(self, connection: NbdConnection) -> None:
        """Transfer in a thread and wait for its end, which comes soon when this is cancelled: all members are then."""
        task, token = trio.lowlevel.current_task(), trio.lowlevel.current_trio_token()

        def deliver(result: Outcome[None]) -> None:
            token.run_sync_soon(trio.lowlevel.reschedule, task, result)

        def abort(_: object) -> trio.lowlevel.Abort:
            self._window.fail(_closed())
            connection.stop()
            return trio.lowlevel.Abort.FAILED

        trio.lowlevel.start_thread_soon(lambda: self._transfer(connection), deliver, "xbfs-nbd")
        await trio.lowlevel.wait_task_rescheduled(abort)

    def _transfer(self, connection: NbdConnection) -> None:
        """Fetch what the window wants until it fails or the connection breaks; what is under way goes back."""
        flight: dict[int, Fetch] = {}
        flying = 0
        try:
            while True:
                # Many small requests at a time: sending them one by one costs more than their data.
                if flying <= _FLIGHT_BYTES // 2 and len(flight) <= _FLIGHT_REQUESTS // 2:
                    while flying < _FLIGHT_BYTES and len(flight) < _FLIGHT_REQUESTS:
                        fetch = self._window.take(idle=not flight)
                        if fetch is None:
                            break
                        flight[connection.ask(fetch.start, fetch.buffer)] = fetch
                        flying += len(fetch.buffer)
                if not flight:
                    if self._window.failed:
                        return
                    self._bell.acquire()
                    continue
                fetch = flight.pop(connection.reply())
                flying -= len(fetch.buffer)
                self._window.arrived(fetch)
                self._failures = 0
        except TransferFailed as exc:
            # The place may be unreadable for ever, which a host says by hanging up.
            suspect = flight[connection.suspect]
            suspect.failures += 1
            if suspect.failures >= self._timeouts.tries:
                self._window.fail(exc)
            raise
        finally:
            self._window.put_back(list(flight.values()))


def _closed() -> TransferFailed:
    return TransferFailed("the disk was closed while it was read")


def _pieces(offset: int, length: int) -> Iterator[Extent]:
    """Cut at multiples of PIECE_SIZE."""
    end = offset + length
    while offset < end:
        cut = min(end, (offset // PIECE_SIZE + 1) * PIECE_SIZE)
        yield offset, cut - offset
        offset = cut
