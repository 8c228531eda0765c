"""The threads that read and decode, and how their answers get back to the event loop.

Owns threads and their two queues: requests somebody waits for, and read-ahead, which is done when nothing else is and
dropped when there is too much of it. ``run``, ``offer`` and ``close`` are for the event loop's thread.

A thread per request would be simplest, but decoding is bounded by cores, not threads: few threads do it all. When they
are stuck in a storage that hangs, whoever waits adds one more, up to ``threads_max``; threads too many end by
themselves. A request whose blob is known to hang is parked (``gate``) and holds no thread.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from queue import SimpleQueue
from typing import TYPE_CHECKING, Final, Generic, TypeVar

import trio

from xbfs.vfs.gate import BlobStalled
from xbfs_engine.core.errors import StorageTimeout, XbfsError
from xbfs_engine.core.log import Logger

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")

THREADS_MAX: Final = 64
"""Threads stuck in the storage at once; each costs some 100 KiB."""
GROW_AFTER_S: Final = 0.25
"""A request that waits this long for a thread adds one: decoding alone never takes so long."""
CLOSE_S: Final = 1.0
"""What threads get to end; those stuck in the storage end with the process."""

_log = Logger("xbfs.mount")


def cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0))


class _Job(Generic[T]):
    """A call, and how it ended."""

    __slots__ = ("abandoned", "call", "done", "error", "result", "started")

    def __init__(self, call: Callable[[], T], done: trio.Event | None) -> None:
        self.call = call
        self.done = done
        self.started = False
        self.abandoned = False
        self.result: T | None = None
        self.error: Exception | None = None


class ReadPool:
    """Made inside the event loop. ``backlog``: read-ahead calls kept waiting at most."""

    def __init__(self, *, threads: int | None = None, threads_max: int = THREADS_MAX, backlog: int = 16) -> None:
        self._token = trio.lowlevel.current_trio_token()
        self._base = cores() + 2 if threads is None else threads
        self._max = max(threads_max, self._base)
        self._backlog = backlog
        self._urgent: deque[_Job[object]] = deque()
        self._ahead: deque[_Job[object]] = deque()
        self._wakeups: SimpleQueue[None] = SimpleQueue()
        self._closing = False
        self._lock = threading.Lock()
        self._idle = 0
        self._threads: set[threading.Thread] = set()
        for _ in range(self._base):
            self._grow()

    @property
    def size(self) -> int:
        """Threads there are now."""
        return len(self._threads)

    async def run(self, call: Callable[[], T], timeout_s: float) -> T:
        """Call in a thread and wait for the result.

        Raises what the call raises, StorageTimeout after ``timeout_s``: the thread may be stuck, its result is
        dropped.
        """
        job: _Job[T] = _Job(call, trio.Event())
        assert job.done is not None
        self._submit(job)
        try:
            with trio.move_on_after(timeout_s):
                with trio.move_on_after(GROW_AFTER_S):
                    await job.done.wait()
                while not job.started:
                    self._grow()  # for whoever is first in the queue: maybe not this one
                    with trio.move_on_after(GROW_AFTER_S):
                        await job.done.wait()
                await job.done.wait()
        finally:
            job.abandoned = True
        if not job.done.is_set():
            raise StorageTimeout(f"no answer from the storage within {timeout_s:g} s")
        if job.error is not None:
            raise job.error
        return job.result  # type: ignore[return-value]  # no error: the call has returned a T

    def offer(self, call: Callable[[], object]) -> bool:
        """Have ``call`` made when a thread has nothing better to do; False if too much waits already."""
        if len(self._ahead) >= self._backlog or self._closing:
            return False
        self._ahead.append(_Job(call, None))
        self._wakeups.put(None)
        return True

    def close(self) -> None:
        """End the threads; blocks for at most CLOSE_S. Calls that wait are dropped."""
        self._closing = True
        threads = list(self._threads)
        for _ in threads:
            self._wakeups.put(None)
        for thread in threads:
            thread.join(CLOSE_S / len(threads))

    def _submit(self, job: _Job[T]) -> None:
        self._urgent.append(job)  # type: ignore[arg-type]  # only this class looks into it
        self._wakeups.put(None)

    def _grow(self) -> None:
        with self._lock:
            if len(self._threads) >= self._max or self._closing:
                return
            # A daemon: stuck in a storage that never answers, it must not keep the process from ending.
            thread = threading.Thread(target=self._work, name="xbfs-read", daemon=True)
            self._threads.add(thread)
        thread.start()

    def _work(self) -> None:
        while self._wait():
            job = self._next()
            if job is not None and not job.abandoned:
                self._do(job)
        with self._lock:
            self._threads.discard(threading.current_thread())

    def _wait(self) -> bool:
        """Wait for something to do; False if this thread should end: everything does, or enough others are idle."""
        with self._lock:
            if self._idle >= self._base:
                return False
            self._idle += 1
        self._wakeups.get()  # one for every job
        with self._lock:
            self._idle -= 1
        return not self._closing

    def _next(self) -> _Job[object] | None:
        for queue in (self._urgent, self._ahead):
            try:
                return queue.popleft()
            except IndexError:
                continue
        return None

    def _do(self, job: _Job[object]) -> None:
        job.started = True
        try:
            job.result = job.call()
        except BlobStalled as exc:
            if job.done is not None:
                exc.park(lambda: self._submit(job))
            return
        except Exception as exc:  # noqa: BLE001 - handed to the task that waits
            if job.done is None:
                _drop(exc)
            job.error = exc
        if job.done is not None:
            try:
                self._token.run_sync_soon(job.done.set)
            except trio.RunFinishedError:
                return


def _drop(exc: Exception) -> None:
    """Read-ahead that fails is tried again by whoever needs it; only our own bugs are worth a line."""
    if not isinstance(exc, XbfsError):
        _log.error("read-ahead failed", exc_info=exc)
