"""The workers that there are: at most so many, the one that was used least recently ends for another, and each after
some idle time.

Owns who has a worker and for how long. Any thread may call; a worker that is lent is never ended for another one. One
thread ends idle workers, while there are any.
"""

from __future__ import annotations

from collections import OrderedDict
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Condition, Thread
from typing import TYPE_CHECKING

from xbfs_engine.core.errors import GuestReaderFailed
from xbfs_engine.core.log import Logger

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from xbfs_engine.core.runtime import Clock
    from xbfs_engine.guestfs.worker.process import WorkerProcess

_log = Logger("xbfs.guestfs.worker")


@dataclass(slots=True)
class _Slot:
    process: WorkerProcess | None = None
    """None while it is being started."""
    is_lent: bool = True
    used_s: float = 0.0


class WorkerPool:
    """At most ``workers_max`` workers; each ends when it was idle for ``idle_s``."""

    def __init__(self, clock: Clock, workers_max: int, idle_s: float, waiting_s: float) -> None:
        assert workers_max > 0
        self._clock = clock
        self._workers_max = workers_max
        self._idle_s = idle_s
        self._waiting_s = waiting_s
        self._changed = Condition()
        self._slots: OrderedDict[object, _Slot] = OrderedDict()
        self._tidying = False
        self._is_closed = False

    @property
    def live(self) -> int:
        """Workers there are now, those that are being started included."""
        with self._changed:
            return sum(slot.process is None or not slot.process.is_over for slot in self._slots.values())

    @contextmanager
    def lend(self, owner: object, start: Callable[[], WorkerProcess]) -> Iterator[WorkerProcess]:
        """The worker of ``owner``, any object of its own; ``start`` makes it. One loan for one owner at a time."""
        process = self._take(owner)
        try:
            if process is None:
                process = self._start(owner, start)
            yield process
        finally:
            self._give_back(owner)

    def end(self, owner: object) -> None:
        """End the owner's worker, also one that is lent: then its request fails."""
        with self._changed:
            slot = self._slots.pop(owner, None)
            self._changed.notify_all()
        if slot is not None and slot.process is not None:
            slot.process.end()

    def close(self) -> None:
        """End all; nothing is lent from here on."""
        with self._changed:
            self._is_closed = True
            slots, self._slots = self._slots, OrderedDict()
            self._changed.notify_all()
        for slot in slots.values():
            if slot.process is not None:
                slot.process.end()

    def notice(self) -> None:
        """Some worker is over."""
        with self._changed:
            self._changed.notify_all()

    def _take(self, owner: object) -> WorkerProcess | None:
        """The owner's worker, lent; None if a place for one was taken."""
        gone = None
        with self._changed:
            self._refuse_if_closed()
            slot = self._slots.get(owner)
            if slot is not None and slot.process is not None and slot.process.is_over:
                gone = self._slots.pop(owner)
                slot = None
            if slot is not None:
                slot.is_lent = True
                self._slots.move_to_end(owner)
                return slot.process
            if gone is None and len(self._slots) >= self._workers_max:
                gone = self._make_room()
            self._slots[owner] = _Slot()
            if not self._tidying:
                self._tidying = True
                Thread(target=self._tidy, name="guest-workers", daemon=True).start()
        if gone is not None and gone.process is not None:
            gone.process.end()
        return None

    def _make_room(self) -> _Slot | None:
        until_s = self._clock.monotonic_s() + self._waiting_s
        while len(self._slots) >= self._workers_max:
            for owner, slot in self._slots.items():
                if not slot.is_lent:
                    return self._slots.pop(owner)
            left_s = until_s - self._clock.monotonic_s()
            if left_s <= 0:
                raise GuestReaderFailed(f"all {self._workers_max} readers of guests are busy")
            self._changed.wait(left_s)
            self._refuse_if_closed()
        return None

    def _start(self, owner: object, start: Callable[[], WorkerProcess]) -> WorkerProcess:
        process = start()
        with self._changed:
            slot = self._slots.get(owner)
            if slot is not None:
                slot.process = process
                return process
        process.end()
        raise GuestReaderFailed("readers of guests were closed")

    def _give_back(self, owner: object) -> None:
        with self._changed:
            slot = self._slots.get(owner)
            if slot is None:
                return
            if slot.process is None:
                del self._slots[owner]
            slot.is_lent = False
            slot.used_s = self._clock.monotonic_s()
            self._changed.notify_all()

    def _refuse_if_closed(self) -> None:
        if self._is_closed:
            raise GuestReaderFailed("readers of guests were closed")

    def _tidy(self) -> None:
        """End what is idle or over, as long as there is anything."""
        while True:
            with self._changed:
                if not self._slots:
                    self._tidying = False
                    return
                now_s = self._clock.monotonic_s()
                idle = [owner for owner, slot in self._slots.items() if not slot.is_lent and self._is_due(slot, now_s)]
                ended = [self._slots.pop(owner) for owner in idle]
                if not ended:
                    first_s = min((slot.used_s for slot in self._slots.values() if not slot.is_lent), default=now_s)
                    self._changed.wait(max(0.0, first_s + self._idle_s - now_s))
                    continue
                self._changed.notify_all()
            for slot in ended:
                if slot.process is not None:
                    _log.debug("guest_worker_idle", ended=slot.process.end())

    def _is_due(self, slot: _Slot, now_s: float) -> bool:
        return slot.used_s + self._idle_s <= now_s or (slot.process is not None and slot.process.is_over)
