"""Bounded work in threads: one item per thread in memory, taken from one lazy feed. Stateless."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from xbfs_engine.core.errors import Cancelled

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from xbfs_engine.core.runtime import Clock

T = TypeVar("T")
REPORT_INTERVAL_S = 0.2


class MaintenanceProgress(NamedTuple):
    """How far a check or verify is. Totals are 0 where they are not known beforehand."""

    stage: str
    done: int
    total: int
    read_bytes: int
    total_bytes: int
    damages: int


class Ticker:
    """Tells the caller about progress at most five times a second, and whether to stop. Any thread may call it."""

    def __init__(
        self, clock: Clock, progress: Callable[[MaintenanceProgress], None] | None, stop: Callable[[], bool] | None
    ) -> None:
        self._clock = clock
        self._progress = progress
        self._stop = stop
        self._lock = threading.Lock()
        self._last_s = float("-inf")

    def tick(self, state: Callable[[], MaintenanceProgress]) -> None:
        """Report if it is time to. Raises Cancelled if the caller wants to stop."""
        if self._stop is not None and self._stop():
            raise Cancelled("stopped before everything was examined")
        if self._progress is None:
            return
        with self._lock:
            now_s = self._clock.monotonic_s()
            if now_s - self._last_s >= REPORT_INTERVAL_S:
                self._last_s = now_s
                self._progress(state())


def run_parallel(items: Iterator[T], work: Callable[[T], None], threads: int) -> None:
    """Call ``work`` for every item, in ``threads`` threads; the first exception of any ends all and is raised."""
    lock = threading.Lock()
    failures: list[BaseException] = []

    def loop() -> None:
        try:
            while not failures:
                with lock:
                    try:
                        item = next(items)
                    except StopIteration:
                        return
                work(item)
        except BaseException as exc:  # noqa: BLE001 - raised by the thread that waits
            failures.append(exc)

    workers = [threading.Thread(target=loop, name=f"xbfs-maintain-{number}") for number in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if failures:
        raise failures[0]
