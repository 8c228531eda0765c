"""Group commit: callers who come while a round runs share the next one. Any thread may call it."""

from __future__ import annotations

from threading import Condition, Lock
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable


class Rounds:
    """Runs ``work``, one round at a time, each under ``alone``: who else takes that lock keeps rounds from running."""

    __slots__ = ("_changed", "_done", "_is_running", "_started", "_work", "alone")

    def __init__(self, work: Callable[[], None]) -> None:
        self._work = work
        self._changed = Condition(Lock())
        self._is_running = False
        self._started = 0
        self._done = 0
        self.alone = Lock()

    def run(self) -> None:
        """Return when a round that began after this call has ended well.

        Raises what ``work`` raises in a round of this thread; who shared a round that failed runs one of its own.
        """
        with self._changed:
            wanted = self._started + 1
            while self._is_running and self._done < wanted:
                self._changed.wait()
            if self._done >= wanted:
                return
            self._is_running = True
            self._started += 1
            number = self._started
        succeeded = False
        try:
            with self.alone:
                self._work()
            succeeded = True
        finally:
            with self._changed:
                self._is_running = False
                if succeeded:
                    self._done = number
                self._changed.notify_all()
