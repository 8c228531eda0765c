"""Clock and randomness of tests: same seed, same run."""

from __future__ import annotations

from random import Random  # noqa: TID251 - seeded
from threading import Lock

from xbfs_engine.core.runtime import Runtime

START_NS = 1_790_000_000_000_000_000
"""2026-09-21T14:13:20Z."""


class FixedClock:
    """A clock that stands still but for ``set``, ``advance`` and ``step_ns`` per look at it. Any thread may call it."""

    def __init__(self, now_ns: int = START_NS, *, step_ns: int = 0) -> None:
        self._now_ns = now_ns
        self._monotonic_ns = 0
        self._step_ns = step_ns
        self._lock = Lock()

    def now_ns(self) -> int:
        with self._lock:
            now_ns = self._now_ns
            self._pass(self._step_ns)
            return now_ns

    def monotonic_s(self) -> float:
        with self._lock:
            monotonic_ns = self._monotonic_ns
            self._pass(self._step_ns)
            return monotonic_ns / 1e9

    def set(self, now_ns: int) -> None:
        """Set the wall clock, also back; monotonic time does not notice."""
        with self._lock:
            self._now_ns = now_ns

    def advance(self, seconds: float) -> None:
        """Let time pass."""
        assert seconds >= 0
        with self._lock:
            self._pass(int(seconds * 1e9))

    def _pass(self, ns: int) -> None:
        self._now_ns += ns
        self._monotonic_ns += ns


class SeededRandom:
    """Bytes that only look random. Any thread may call it."""

    def __init__(self, seed: int) -> None:
        self._random = Random(seed)
        self._lock = Lock()

    def token(self, size_bytes: int) -> bytes:
        with self._lock:
            return self._random.randbytes(size_bytes)


def test_runtime(seed: int) -> Runtime:
    """A fixed clock and seeded randomness."""
    return Runtime(FixedClock(), SeededRandom(seed))


test_runtime.__test__ = False  # type: ignore[attr-defined]  # pytest, this is no test
