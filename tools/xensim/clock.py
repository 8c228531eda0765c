"""The simulated clock: delays shrink by a factor and whole hours can be skipped. Safe to call from any thread."""

from __future__ import annotations

import threading
import time
from datetime import UTC, datetime, timedelta


class SimClock:
    """Dates are the machine's, plus what was skipped by ``advance``; delays last ``time_scale`` times their length."""

    def __init__(self, time_scale: float = 1.0) -> None:
        if time_scale <= 0:
            raise ValueError("time_scale must be positive")
        self.time_scale = time_scale
        self._start = time.monotonic()
        self._skipped_s = 0.0
        self._moved = threading.Condition()

    def now(self) -> datetime:
        """The date, in whole seconds as XAPI keeps it."""
        return datetime.now(UTC).replace(microsecond=0) + timedelta(seconds=int(self._skipped_s))

    def monotonic(self) -> float:
        """Simulated seconds since the start: what delays, windows and timers are measured with."""
        return (time.monotonic() - self._start) / self.time_scale + self._skipped_s

    def sleep(self, seconds: float) -> None:
        """Wait ``seconds`` of simulated time; never call it with the lock of the database held."""
        until = self.monotonic() + seconds
        with self._moved:
            while (left := until - self.monotonic()) > 0:
                self._moved.wait(left * self.time_scale)

    def advance(self, seconds: float) -> None:
        """Skip ``seconds`` at once; who sleeps past its time wakes up."""
        with self._moved:
            self._skipped_s += seconds
            self._moved.notify_all()
