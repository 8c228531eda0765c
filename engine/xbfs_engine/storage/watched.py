"""A storage that knows how long its calls are under way, so that somebody can stop waiting. Any thread may call."""

from __future__ import annotations

import threading
from contextlib import contextmanager
from itertools import count
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from typing_extensions import Buffer

    from xbfs_engine.core.runtime import Clock
    from xbfs_engine.storage.base import BlobInfo, Storage


class WatchedStorage:
    """A Storage over ``storage``."""

    def __init__(self, storage: Storage, clock: Clock) -> None:
        self._storage = storage
        self._clock = clock
        self._numbers = count()
        self._calls: dict[int, float] = {}
        self._lock = threading.Lock()

    def stalled_s(self) -> float:
        """Seconds since the oldest call that is under way began; 0 if there is none."""
        with self._lock:
            oldest = next(iter(self._calls.values()), None)
        return 0.0 if oldest is None else self._clock.monotonic_s() - oldest

    def put(self, name: str, parts: Sequence[Buffer]) -> None:
        """``Storage.put``."""
        with self._under_way():
            self._storage.put(name, parts)

    def get(self, name: str) -> bytes:
        """``Storage.get``."""
        with self._under_way():
            return self._storage.get(name)

    def read(self, name: str, offset: int, length: int) -> bytes:
        """``Storage.read``."""
        with self._under_way():
            return self._storage.read(name, offset, length)

    def size(self, name: str) -> int:
        """``Storage.size``."""
        with self._under_way():
            return self._storage.size(name)

    def list_blobs(self, prefix: str) -> Iterator[BlobInfo]:
        """``Storage.list_blobs``; each step counts as a call."""
        listed = self._storage.list_blobs(prefix)
        while True:
            with self._under_way():
                blob = next(listed, None)
            if blob is None:
                return
            yield blob

    def delete(self, name: str) -> None:
        """``Storage.delete``."""
        with self._under_way():
            self._storage.delete(name)

    def location(self) -> str:
        """``Storage.location``."""
        return self._storage.location()

    @contextmanager
    def _under_way(self) -> Iterator[None]:
        with self._lock:
            number = next(self._numbers)
            self._calls[number] = self._clock.monotonic_s()
        try:
            yield
        finally:
            with self._lock:
                del self._calls[number]
