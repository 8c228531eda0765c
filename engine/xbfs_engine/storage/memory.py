"""Storage in memory: the reference backend, for tests, demonstrations and dry runs. Any thread may call it."""

from __future__ import annotations

from threading import Lock
from typing import TYPE_CHECKING

from xbfs_engine.core.errors import BlobExists, BlobNotFound
from xbfs_engine.storage.base import BlobInfo
from xbfs_engine.storage.names import check_name, check_prefix, check_range

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from typing_extensions import Buffer


class MemoryStorage:
    """Blobs in a dictionary. Durable as long as the process, else all that ``Storage`` guarantees."""

    def __init__(self) -> None:
        self._blobs: dict[str, bytes] = {}
        self._lock = Lock()

    def put(self, name: str, parts: Sequence[Buffer]) -> None:
        """Store a new blob."""
        check_name(name)
        data = b"".join(parts)
        with self._lock:
            if name in self._blobs:
                raise BlobExists(f"blob {name} exists in {self.location()}")
            self._blobs[name] = data

    def get(self, name: str) -> bytes:
        """All bytes of a blob."""
        check_name(name)
        with self._lock:
            data = self._blobs.get(name)
        if data is None:
            raise BlobNotFound(f"no blob {name} in {self.location()}")
        return data

    def read(self, name: str, offset: int, length: int) -> bytes:
        """Exactly ``length`` bytes from ``offset``."""
        data = self.get(name)
        check_range(name, len(data), offset, length)
        return data[offset : offset + length]

    def size(self, name: str) -> int:
        """Size of a blob in bytes."""
        return len(self.get(name))

    def list_blobs(self, prefix: str) -> Iterator[BlobInfo]:
        """Blobs whose name starts with ``prefix``, as of this call."""
        check_prefix(prefix)
        with self._lock:
            return iter([BlobInfo(name, len(data)) for name, data in self._blobs.items() if name.startswith(prefix)])

    def delete(self, name: str) -> None:
        """Remove a blob."""
        check_name(name)
        with self._lock:
            if self._blobs.pop(name, None) is None:
                raise BlobNotFound(f"no blob {name} in {self.location()}")

    def location(self) -> str:
        """For people."""
        return "memory"
