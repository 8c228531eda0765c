"""A storage that fails on purpose: by script (this call fails like that) or by seed (some calls fail somehow).

Wraps any Storage and counts its calls. Any thread may call it; ``release`` and the counters are for the test.
"""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass
from enum import Enum
from random import Random  # noqa: TID251 - seeded
from threading import Event, Lock
from typing import TYPE_CHECKING

from xbfs_engine.core.errors import StorageError, StorageUnavailable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from typing_extensions import Buffer

    from xbfs_engine.storage.base import BlobInfo, Storage

HANG_MAX_S = 60
"""A hang nobody releases fails its test after this time."""


class SimulatedCrash(BaseException):
    """The process died here: whoever catches this to go on has no test."""


class Kind(Enum):
    """Methods of a storage."""

    PUT = "put"
    GET = "get"
    READ = "read"
    SIZE = "size"
    LIST = "list_blobs"
    DELETE = "delete"


class Mode(Enum):
    """How a call fails."""

    BEFORE = "error, nothing done"
    AFTER = "done, then error"
    TORN = "put: some bytes travelled, nothing is visible, error"
    TRUNCATED = "put: the first half is visible as the blob, error"
    TRUNCATED_SILENT = "put: the first half is visible as the blob, success"
    STALE_LIST = "list: blobs put in the last `depth` calls are missing, success"
    LATENCY = "done after `delay_s`"
    HANG = "done when released"
    CRASH_BEFORE = "nothing done, the process dies"
    CRASH_AFTER = "done, then the process dies"


_PUT_MODES = frozenset({Mode.TORN, Mode.TRUNCATED, Mode.TRUNCATED_SILENT})
SEEDED_MODES = (Mode.BEFORE, Mode.AFTER, Mode.TORN, Mode.STALE_LIST, Mode.LATENCY)
"""What a random run meets: all that a storage which keeps its guarantees may do, and a list that lags."""


@dataclass(frozen=True, slots=True)
class Fault:
    """One line of a script: what happens at the ``nth`` (from 1; None: every) call of ``kind`` (None: any)."""

    mode: Mode
    kind: Kind | None = None
    nth: int | None = 1
    error: type[StorageError] = StorageUnavailable
    delay_s: float = 0.01
    depth: int = 10

    def __post_init__(self) -> None:
        if self.mode in _PUT_MODES:
            assert self.kind is Kind.PUT
        if self.mode is Mode.STALE_LIST:
            assert self.kind is Kind.LIST


class FaultyStorage:
    """``inner`` with the faults of ``script``, and with a random one at a share ``rate`` of all calls."""

    def __init__(
        self,
        inner: Storage,
        script: Sequence[Fault] = (),
        *,
        seed: int = 0,
        rate: float = 0.0,
        modes: Sequence[Mode] = SEEDED_MODES,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.inner = inner
        self.counts: Counter[Kind] = Counter()
        """Calls begun, by kind, failed ones too; ``counts.total()`` numbers them all."""
        self.injected: list[Fault] = []
        """Faults that happened, in order."""
        self.hanging = Event()
        """Set while or after a call hangs."""
        self._script = tuple(script)
        self._random = Random(seed)
        self._rate = rate
        self._modes = tuple(modes)
        self._sleep = sleep
        self._released = Event()
        self._crashed = False
        self._puts: dict[str, int] = {}
        self._lock = Lock()

    def release(self) -> None:
        """Let hanging calls go on, now and later."""
        self._released.set()

    def put(self, name: str, parts: Sequence[Buffer]) -> None:
        fault = self._begin(Kind.PUT, name)
        if fault is not None and fault.mode in _PUT_MODES:
            data = b"".join(parts)
            if fault.mode is not Mode.TORN:
                self.inner.put(name, [data[: len(data) // 2]])
            if fault.mode is not Mode.TRUNCATED_SILENT:
                raise _error(fault, f"put of {name}")
            return
        self.inner.put(name, parts)
        self._end(fault, f"put of {name}")

    def get(self, name: str) -> bytes:
        fault = self._begin(Kind.GET, name)
        data = self.inner.get(name)
        self._end(fault, f"get of {name}")
        return data

    def read(self, name: str, offset: int, length: int) -> bytes:
        fault = self._begin(Kind.READ, name)
        data = self.inner.read(name, offset, length)
        self._end(fault, f"read of {name}")
        return data

    def size(self, name: str) -> int:
        fault = self._begin(Kind.SIZE, name)
        size_bytes = self.inner.size(name)
        self._end(fault, f"size of {name}")
        return size_bytes

    def list_blobs(self, prefix: str) -> Iterator[BlobInfo]:
        fault = self._begin(Kind.LIST, prefix)
        hidden = self._recent(fault.depth) if fault is not None and fault.mode is Mode.STALE_LIST else frozenset()
        blobs = [blob for blob in self.inner.list_blobs(prefix) if blob.name not in hidden]
        self._end(fault, f"list of {prefix}")
        return iter(blobs)

    def delete(self, name: str) -> None:
        fault = self._begin(Kind.DELETE, name)
        self.inner.delete(name)
        self._end(fault, f"delete of {name}")

    def location(self) -> str:
        return f"faulty {self.inner.location()}"

    def _begin(self, kind: Kind, name: str) -> Fault | None:
        """Count the call, choose its fault and play the part that comes before the effect."""
        with self._lock:
            if self._crashed:
                raise SimulatedCrash(f"{kind.value} of {name} after the crash")
            self.counts[kind] += 1
            if kind is Kind.PUT:
                self._puts[name] = self.counts.total()
            fault = self._choose(kind)
            if fault is None:
                return None
            self.injected.append(fault)
            self._crashed = fault.mode is Mode.CRASH_BEFORE
        what = f"{kind.value} of {name}"
        match fault.mode:
            case Mode.BEFORE:
                raise _error(fault, what)
            case Mode.CRASH_BEFORE:
                raise SimulatedCrash(what)
            case Mode.LATENCY:
                self._sleep(fault.delay_s)
            case Mode.HANG:
                self.hanging.set()
                assert self._released.wait(HANG_MAX_S), f"nobody released the {what}"
        return fault

    def _end(self, fault: Fault | None, what: str) -> None:
        """Play the part of the fault that comes after the effect."""
        if fault is not None and fault.mode is Mode.AFTER:
            raise _error(fault, what)
        if fault is not None and fault.mode is Mode.CRASH_AFTER:
            with self._lock:
                self._crashed = True
            raise SimulatedCrash(what)

    def _choose(self, kind: Kind) -> Fault | None:
        for fault in self._script:
            number = self.counts.total() if fault.kind is None else self.counts[fault.kind]
            if fault.kind in (None, kind) and fault.nth in (None, number):
                return fault
        if self._random.random() >= self._rate:
            return None
        mode = self._random.choice(self._modes)
        fits = (mode not in _PUT_MODES or kind is Kind.PUT) and (mode is not Mode.STALE_LIST or kind is Kind.LIST)
        return Fault(mode if fits else Mode.BEFORE, kind, nth=None)

    def _recent(self, depth: int) -> frozenset[str]:
        with self._lock:
            oldest = self.counts.total() - depth  # the list itself is the newest call
            return frozenset(name for name, number in self._puts.items() if number >= oldest)


def _error(fault: Fault, what: str) -> StorageError:
    return fault.error(f"injected: {what}: {fault.mode.value}")
