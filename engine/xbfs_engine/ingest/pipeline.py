"""The pipeline of one disk: workers in threads over one feed of segments, results assembled into a block map.

Memory: per worker one segment, one pack and its directory (4 MiB + 32 MiB + 3 MiB by default), plus the assembler's
window and the session's dictionary; see docs/architecture.md. Nothing grows with the disk.
"""

from __future__ import annotations

import threading
import time
from functools import partial
from typing import TYPE_CHECKING

import trio

from xbfs_engine.ingest.assembler import WINDOW
from xbfs_engine.ingest.statistics import Stage
from xbfs_engine.storage.waiting import in_thread

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from xbfs_engine.catalog.mapwriter import MapWriter
    from xbfs_engine.ingest.assembler import MapAssembler
    from xbfs_engine.ingest.planner import Segment
    from xbfs_engine.ingest.worker import Worker
    from xbfs_engine.source.base import DiskSource

REPORT_INTERVAL_S = 0.2
_WAIT_S = 0.5


class _Feed:
    """Hands out segments in order and lets nobody run further than WINDOW ahead of the map."""

    def __init__(self, segments: Iterator[Segment], assembler: MapAssembler) -> None:
        self._segments = segments
        self._assembler = assembler
        self._lock = threading.Lock()
        self._moved = threading.Condition()
        self.stopped = False
        self.ended = False
        self.failure: BaseException | None = None

    def take(self) -> Segment | None:
        """The next segment, or None at the end or when stopped."""
        with self._lock:
            if self.stopped:
                return None
            return next(self._segments, None)

    def crowded(self, segment: Segment) -> bool:
        """Whether ``segment`` is too far ahead of the map. The head of the line never is, so somebody always works."""
        return segment.number - self._assembler.written >= WINDOW

    def wait_for_room(self, segment: Segment) -> None:
        """Wait until the head of the line has come near ``segment`` or everything stops."""
        with self._moved:
            while self.crowded(segment) and not self.stopped:
                self._moved.wait(_WAIT_S)

    def moved(self) -> None:
        """Tell those who wait that the head of the line may have moved."""
        with self._moved:
            self._moved.notify_all()

    def stop(self, failure: BaseException | None = None) -> None:
        """End the run; the first failure counts."""
        if failure is not None and self.failure is None:
            self.failure = failure
        self.stopped = True
        self.moved()


async def run_pipeline(
    segments: Iterator[Segment],
    source: DiskSource,
    maps: MapWriter,
    assembler: MapAssembler,
    workers: Sequence[Worker],
    *,
    carry: bool,
    report: Callable[[], None],
) -> None:
    """Process all segments; on return every chunk is in a durable pack and every leaf in the map.

    Raises the first SourceError or StorageError of any worker. Cancellation stops the workers between segments and
    gives up those that hang in a system call.
    """
    feed = _Feed(segments, assembler)

    def work(worker: Worker) -> None:
        try:
            while (segment := feed.take()) is not None:
                if feed.crowded(segment):
                    _make_room(worker, assembler, feed, segment)
                result = worker.process(segment, source, maps, carry=carry)
                began = time.perf_counter()
                assembler.submit(result)
                worker.counters.seconds[Stage.MAP] += time.perf_counter() - began
                feed.moved()
            if not feed.stopped:
                worker.close_pack()
                assembler.drain()
                feed.moved()
        except BaseException as exc:  # noqa: BLE001 - handed to the task that waits for all workers
            feed.stop(exc)

    limiter = trio.CapacityLimiter(len(workers))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_watch, feed, report)
        async with trio.open_nursery() as threads:
            for worker in workers:
                threads.start_soon(partial(in_thread, work, worker, limiter=limiter))
        feed.ended = True
        nursery.cancel_scope.cancel()
    report()
    if feed.failure is not None:
        raise feed.failure
    assert assembler.finished()


def _make_room(worker: Worker, assembler: MapAssembler, feed: _Feed, segment: Segment) -> None:
    worker.close_pack()
    assembler.drain()
    feed.moved()
    began = time.perf_counter()
    feed.wait_for_room(segment)
    worker.counters.seconds[Stage.WAIT] += time.perf_counter() - began


async def _watch(feed: _Feed, report: Callable[[], None]) -> None:
    """Report regularly; when the run is cancelled, stop the threads (they can not be interrupted)."""
    try:
        while True:
            report()
            await trio.sleep(REPORT_INTERVAL_S)
    finally:
        if not feed.ended:
            feed.stop()
