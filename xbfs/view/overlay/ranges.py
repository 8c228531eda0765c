"""A lock on ranges of units: writers of the same unit take turns, others do not meet. Any thread may call it.

First come, first served: who waits for a wide range is not overtaken by narrow ones that lie in it. Holds as many
entries as there are threads in it.
"""

from __future__ import annotations

from threading import Condition, Lock


class RangeLock:
    """Ranges [first, last) that are held or waited for, in the order they were asked for. Not reentrant."""

    __slots__ = ("_changed", "_entries")

    def __init__(self) -> None:
        self._changed = Condition(Lock())
        self._entries: list[tuple[int, int]] = []

    def acquire(self, first: int, last: int) -> None:
        """Hold [first, last), not empty, alone; waits for everybody who asked earlier for a part of it."""
        entry = (first, last)
        with self._changed:
            self._entries.append(entry)
            try:
                while len(self._entries) > 1 and self._is_blocked(entry):
                    self._changed.wait()
            except BaseException:
                self._entries = [other for other in self._entries if other is not entry]
                self._changed.notify_all()
                raise

    def release(self, first: int, last: int) -> None:
        """Let go of a range that this thread acquired."""
        with self._changed:
            # Of equal entries the first holds the range: the others wait for it.
            self._entries.remove((first, last))
            if self._entries:
                self._changed.notify_all()

    def _is_blocked(self, entry: tuple[int, int]) -> bool:
        for other in self._entries:
            if other is entry:
                return False
            if other[0] < entry[1] and entry[0] < other[1]:
                return True
        raise AssertionError("the entry is not in the list")
