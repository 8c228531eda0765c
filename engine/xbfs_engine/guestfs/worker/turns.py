"""A lock whose waiters get it in the order in which they came, and give up after a time. Any thread may call."""

from __future__ import annotations

from collections import deque
from threading import Event, Lock


class Turns:
    """One holder at a time, first come first served."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._is_taken = False
        self._waiting: deque[Event] = deque()

    def take(self, timeout_s: float) -> bool:
        """Wait for the turn; False if it has not come in time."""
        with self._lock:
            if not self._is_taken:
                self._is_taken = True
                return True
            turn = Event()
            self._waiting.append(turn)
        try:
            turn.wait(timeout_s)
        except BaseException:
            if not self._leave(turn):
                self.give()
            raise
        return not self._leave(turn)

    def give(self) -> None:
        """End of the turn: the next one's begins."""
        with self._lock:
            if self._waiting:
                self._waiting.popleft().set()
            else:
                self._is_taken = False

    def _leave(self, turn: Event) -> bool:
        """Stop waiting; False if the turn had come after all."""
        with self._lock:
            if turn.is_set():
                return False
            self._waiting.remove(turn)
            return True
