"""A gate before the storage that keeps a blob which does not answer from eating the mount's threads.

Owns which reads are under way and since when. A read of a blob whose oldest read is under way for longer than
``patience_s`` is turned back with BlobStalled, so that its thread can do something else and come back (``park``); from
``deadline_s`` on it fails at once. Other blobs are not touched. Any thread may call it.
"""

from __future__ import annotations

import threading
from abc import abstractmethod
from typing import TYPE_CHECKING, Final

from xbfs_engine.core.errors import StorageTimeout

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from typing_extensions import Buffer

    from xbfs_engine.core.runtime import Clock
    from xbfs_engine.storage.base import BlobInfo, Storage

PATIENCE_S: Final = 2.0
"""Slow disks and networks answer within this; a blob that does not is asked by nobody else meanwhile."""


class Parked(StorageTimeout):
    """Waiting now would only hold a thread: come back when ``park`` says so."""

    @abstractmethod
    def park(self, resume: Callable[[], None]) -> None:
        """Have ``resume`` called, from any thread, when it is worth another try; maybe at once."""


class BlobStalled(Parked):
    """A read of this blob is under way for too long: come back when it has ended."""

    def __init__(self, gate: Gate, name: str) -> None:
        super().__init__(f"{name}: an earlier read of it has not been answered yet")
        self._gate = gate
        self._name = name

    def park(self, resume: Callable[[], None]) -> None:
        """Have ``resume`` called, from any thread, once no read of the blob hangs; at once if none does."""
        self._gate.park(self._name, resume)


class _Blob:
    """Reads of one blob that are under way, by number with their start, and who waits for the slow ones."""

    __slots__ = ("parked", "reads")

    def __init__(self) -> None:
        self.reads: dict[int, float] = {}
        self.parked: list[Callable[[], None]] = []


class Gate:
    """A Storage over ``storage``."""

    def __init__(self, storage: Storage, clock: Clock, *, deadline_s: float, patience_s: float = PATIENCE_S) -> None:
        self._storage = storage
        self._clock = clock
        self._deadline_s = deadline_s
        self._patience_s = min(patience_s, deadline_s)
        self._blobs: dict[str, _Blob] = {}
        self._count = 0
        self._lock = threading.Lock()

    def read(self, name: str, offset: int, length: int) -> bytes:
        """``Storage.read``. Raises BlobStalled, StorageTimeout."""
        number = self._enter(name)
        try:
            return self._storage.read(name, offset, length)
        finally:
            self._leave(name, number)

    def size(self, name: str) -> int:
        """``Storage.size``. Raises BlobStalled, StorageTimeout."""
        number = self._enter(name)
        try:
            return self._storage.size(name)
        finally:
            self._leave(name, number)

    def get(self, name: str) -> bytes:
        """``Storage.get``. Raises BlobStalled, StorageTimeout."""
        number = self._enter(name)
        try:
            return self._storage.get(name)
        finally:
            self._leave(name, number)

    def put(self, name: str, parts: Sequence[Buffer]) -> None:
        """``Storage.put``."""
        self._storage.put(name, parts)

    def list_blobs(self, prefix: str) -> Iterator[BlobInfo]:
        """``Storage.list_blobs``."""
        return self._storage.list_blobs(prefix)

    def delete(self, name: str) -> None:
        """``Storage.delete``."""
        self._storage.delete(name)

    def location(self) -> str:
        """``Storage.location``."""
        return self._storage.location()

    def park(self, name: str, resume: Callable[[], None]) -> None:
        """Call ``resume`` once no read of the blob hangs, or now."""
        with self._lock:
            if self._stalled_s(name) >= self._patience_s:
                self._blobs[name].parked.append(resume)
                return
        resume()

    def stalled(self) -> dict[str, float]:
        """Blobs that do not answer, with the seconds their oldest read is under way."""
        with self._lock:
            ages = {name: self._stalled_s(name) for name in self._blobs}
        return {name: age for name, age in ages.items() if age >= self._patience_s}

    def _stalled_s(self, name: str) -> float:
        blob = self._blobs.get(name)
        if blob is None:
            return 0.0
        return self._clock.monotonic_s() - next(iter(blob.reads.values()))

    def _enter(self, name: str) -> int:
        with self._lock:
            waited_s = self._stalled_s(name)
            if waited_s >= self._deadline_s:
                raise StorageTimeout(f"{name}: the storage has not answered a read of it for {waited_s:.0f} s")
            if waited_s >= self._patience_s:
                raise BlobStalled(self, name)
            self._count += 1
            self._blobs.setdefault(name, _Blob()).reads[self._count] = self._clock.monotonic_s()
            return self._count

    def _leave(self, name: str, number: int) -> None:
        parked: list[Callable[[], None]] = []
        with self._lock:
            blob = self._blobs[name]
            del blob.reads[number]
            if not blob.reads:
                del self._blobs[name]
            if self._stalled_s(name) < self._patience_s:
                parked, blob.parked = blob.parked, []
        for resume in parked:
            resume()
