"""The threads that read and decode, and how their answers get back to the event loop.

Owns threads and two queues: requests somebody waits for, and read-ahead, which at most one thread per core does, only
when no request waits, and which is dropped when there is too much of it. ``run``, ``offer`` and ``close`` are for the
event loop's thread.

A hop to a thread and back is most of what a small read costs, so a request goes straight to the thread that became
idle last; nobody else wakes. Threads stuck in a storage that hangs are replaced by whoever waits for one, up to
``threads_max``; superfluous ones end by themselves. A request whose blob is known to hang is parked (``gate``) and
holds no thread.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from contextlib import suppress
from typing import TYPE_CHECKING, Final, Generic, NoReturn, TypeVar, cast

import trio

from xbfs.vfs.gate import Parked
from xbfs_engine.core.errors import StorageTimeout, XbfsError
from xbfs_engine.core.log import Logger

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")

THREADS_MAX: Final = 64
"""Threads stuck in the storage at once; each costs some 100 KiB."""
GROW_AFTER_S: Final = 0.25
"""A request that waits this long for a thread adds one: decoding alone never takes so long. Also how often waiting
requests are looked at: far cheaper than a timer for each of them."""
QUIET_TICKS: Final = 8
"""After so many looks at nothing the pool sleeps until there is a request."""
CLOSE_S: Final = 1.0
"""What threads get to end; those stuck in the storage end with the process."""

_log = Logger("xbfs.mount")


def cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0))


class _Job(Generic[T]):
    """A call, how it ended, and the task that waits for it: none for read-ahead, none any more if it gave up."""

    __slots__ = ("awaited", "began_s", "call", "error", "result", "started", "task", "timeout_s")

    def __init__(self, call: Callable[[], T], task: trio.lowlevel.Task | None, timeout_s: float) -> None:
        self.call = call
        self.task = task
        self.awaited = task is not None
        self.timeout_s = timeout_s
        self.began_s = trio.current_time() if task is not None else 0.0
        self.started = False
        self.result: T | None = None
        self.error: Exception | None = None

    def finish(self) -> None:
        """Let the waiting task go on. In the event loop's thread."""
        task, self.task = self.task, None
        if task is not None:
            trio.lowlevel.reschedule(task)

    def give_up(self, _: object = None) -> trio.lowlevel.Abort:
        """The waiting task was cancelled."""
        self.task = None
        return trio.lowlevel.Abort.SUCCEEDED

    @property
    def abandoned(self) -> bool:
        """Whether nobody wants the result any more."""
        return self.awaited and self.task is None


class _Worker(threading.Thread):
    """A thread with a latch that is shut while the thread is idle; ``job`` is None when it shall end."""

    def __init__(self, work: Callable[[_Worker], None]) -> None:
        # A daemon: stuck in a storage that never answers, it must not keep the process from ending.
        super().__init__(target=work, args=(self,), name="xbfs-read", daemon=True)
        self.job: _Job[object] | None = None
        self.latch = threading.Lock()
        self.latch.acquire()


class ReadPool:
    """Made inside the event loop, with ``tend`` running. ``backlog``: read-ahead calls kept waiting at most."""

    def __init__(self, *, threads: int | None = None, threads_max: int = THREADS_MAX, backlog: int = 16) -> None:
        self._token = trio.lowlevel.current_trio_token()
        self._ahead_max = cores()
        self._base = self._ahead_max + 2 if threads is None else threads
        self._max = max(threads_max, self._base)
        self._backlog = backlog
        self._lock = threading.Lock()
        self._urgent: deque[_Job[object]] = deque()
        self._ahead: deque[_Job[object]] = deque()
        self._ahead_running = 0
        self._idle: list[_Worker] = []
        self._workers: set[_Worker] = set()
        self._closing = False
        self._waiting: dict[_Job[object], None] = {}
        self._asleep: trio.Event | None = None
        for _ in range(self._base):
            self._grow()

    @property
    def size(self) -> int:
        """Threads there are now."""
        return len(self._workers)

    async def run(self, call: Callable[[], T], timeout_s: float) -> T:
        """Call in a thread and wait for the result.

        Raises what the call raises, StorageTimeout after ``timeout_s``: the thread may be stuck, its result is
        dropped.
        """
        job: _Job[T] = _Job(call, trio.lowlevel.current_task(), timeout_s)
        waiting = cast("_Job[object]", job)
        self._waiting[waiting] = None
        if self._asleep is not None:
            self._asleep.set()
        self._submit(waiting)
        try:
            await trio.lowlevel.wait_task_rescheduled(job.give_up)
        finally:
            job.task = None
            del self._waiting[waiting]
        if job.error is not None:
            raise job.error
        return cast("T", job.result)

    async def tend(self) -> NoReturn:
        """Keep deadlines and replace stuck threads, for as long as the pool is used."""
        quiet = 0
        while True:
            await trio.sleep(GROW_AFTER_S)
            quiet = 0 if self._waiting else quiet + 1
            if quiet >= QUIET_TICKS:
                self._asleep = trio.Event()
                await self._asleep.wait()
                self._asleep = None
            now_s = trio.current_time()
            for job in list(self._waiting):
                if now_s - job.began_s > job.timeout_s - GROW_AFTER_S:
                    job.error = StorageTimeout(f"no answer from the storage within {job.timeout_s:g} s")
                    job.finish()
                elif not job.started and now_s - job.began_s >= GROW_AFTER_S:
                    self._grow()  # for whoever is first in the queue: maybe not this one

    def offer(self, call: Callable[[], object]) -> bool:
        """Have ``call`` made when a thread has nothing better to do; False if too much waits already."""
        with self._lock:
            if len(self._ahead) >= self._backlog or self._closing:
                return False
            self._ahead.append(_Job(call, None, 0))
            worker = self._woken()
        if worker is not None:
            worker.latch.release()
        return True

    def close(self) -> None:
        """End the threads; blocks for at most CLOSE_S. Calls that wait are dropped."""
        with self._lock:
            self._closing = True
            idle, self._idle = self._idle, []
            workers = list(self._workers)
        for worker in idle:
            worker.latch.release()
        for worker in workers:
            worker.join(CLOSE_S / len(workers))

    def _submit(self, job: _Job[object]) -> None:
        with self._lock:
            self._urgent.append(job)
            worker = self._woken()
        if worker is not None:
            worker.latch.release()

    def _woken(self) -> _Worker | None:
        """An idle worker that was given the next job, if there are both; the caller opens its latch. Locked."""
        job = self._next() if self._idle else None
        if job is None:
            return None
        worker = self._idle.pop()
        worker.job = job
        return worker

    def _next(self) -> _Job[object] | None:
        """The job to do next. Locked."""
        while self._urgent:
            job = self._urgent.popleft()
            if not job.abandoned:
                job.started = True
                return job
        if self._ahead and self._ahead_running < self._ahead_max:
            self._ahead_running += 1
            return self._ahead.popleft()
        return None

    def _grow(self) -> None:
        with self._lock:
            if len(self._workers) >= self._max or self._closing:
                return
            worker = _Worker(self._work)
            self._workers.add(worker)
        try:
            worker.start()
        except RuntimeError as exc:  # the system's limit on threads: go on with those there are
            _log.warning("no more threads", problem=str(exc))
            with self._lock:
                self._workers.discard(worker)

    def _work(self, worker: _Worker) -> None:
        while (job := self._wait(worker)) is not None:
            self._do(job)
        with self._lock:
            self._workers.discard(worker)

    def _wait(self, worker: _Worker) -> _Job[object] | None:
        """The next job; None if this thread should end: because everything does, or enough others are idle."""
        with self._lock:
            job = None if self._closing else self._next()
            if job is not None or self._closing or len(self._idle) >= self._base:
                return job
            worker.job = None
            self._idle.append(worker)
        worker.latch.acquire()
        return worker.job

    def _do(self, job: _Job[object]) -> None:
        result: object = None
        error: Exception | None = None
        try:
            result = job.call()
        except Parked as exc:
            if job.awaited:
                exc.park(lambda: self._submit(job))
                return
        except Exception as exc:  # noqa: BLE001 - handed to the task that waits
            error = exc
        if not job.awaited:
            self._ahead_done(error)
            return
        if job.task is not None:
            job.result, job.error = result, error
            with suppress(trio.RunFinishedError):
                self._token.run_sync_soon(job.finish)

    def _ahead_done(self, problem: Exception | None) -> None:
        """Read-ahead that fails is tried again by whoever needs it; only our own bugs are worth a line."""
        with self._lock:
            self._ahead_running -= 1
        if problem is not None and not isinstance(problem, XbfsError):
            _log.error("read-ahead failed", exc_info=problem)
