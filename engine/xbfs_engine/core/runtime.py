"""Clock and randomness, injected by constructor: the only module that reads the real ones."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from typing import Protocol


class Clock(Protocol):
    """Wall and monotonic time."""

    def now_ns(self) -> int:
        """Nanoseconds since 1970-01-01 UTC."""
        ...

    def monotonic_s(self) -> float:
        """Seconds from an arbitrary start that never go back."""
        ...


class RandomSource(Protocol):
    """Cryptographically strong random bytes."""

    def token(self, size_bytes: int) -> bytes:
        """``size_bytes`` fresh random bytes."""
        ...


class SystemClock:
    """The machine's clock."""

    def now_ns(self) -> int:
        """Nanoseconds since 1970-01-01 UTC."""
        return time.time_ns()

    def monotonic_s(self) -> float:
        """Monotonic seconds."""
        return time.monotonic()


class SystemRandom:
    """The kernel's random source."""

    def token(self, size_bytes: int) -> bytes:
        """Random bytes from getrandom(2)."""
        return os.urandom(size_bytes)


@dataclass(frozen=True, slots=True)
class Runtime:
    """What a repository needs from outside: clock and randomness."""

    clock: Clock
    random: RandomSource


def system_runtime() -> Runtime:
    """The real clock and randomness."""
    return Runtime(SystemClock(), SystemRandom())
