"""A door before a guest that keeps one that hangs from eating the mount's threads.

A guest serves one request at a time, so threads beyond a few would only wait inside. Any thread may call it.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Final, TypeVar

from xbfs.vfs.gate import Parked

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")

INSIDE_MAX: Final = 8
"""Threads in one guest at once."""


class DoorShut(Parked):
    """Enough threads are inside: come back when one has left."""

    def __init__(self, door: Door) -> None:
        super().__init__("the guest's reader is busy with earlier requests")
        self._door = door

    def park(self, resume: Callable[[], None]) -> None:
        """Have ``resume`` called, from any thread, once somebody has left; at once if there is room."""
        self._door.park(resume)


class Door:
    """Lets at most ``inside_max`` threads through at once."""

    def __init__(self, inside_max: int = INSIDE_MAX) -> None:
        self._max = inside_max
        self._inside = 0
        self._parked: list[Callable[[], None]] = []
        self._lock = threading.Lock()

    def through(self, call: Callable[[], T]) -> T:
        """Make the call inside. Raises DoorShut, and what the call raises."""
        with self._lock:
            if self._inside >= self._max:
                raise DoorShut(self)
            self._inside += 1
        try:
            return call()
        finally:
            with self._lock:
                self._inside -= 1
                # All of them: whoever is woken may have given up meanwhile, and would wake nobody else.
                parked, self._parked = self._parked, []
            for resume in parked:
                resume()

    def park(self, resume: Callable[[], None]) -> None:
        """Call ``resume`` once somebody has left, or now if there is room."""
        with self._lock:
            if self._inside >= self._max:
                self._parked.append(resume)
                return
        resume()
