"""A disk that comes as one stream from its first byte to its last, as a source: what nobody wants is read over.

Worker threads ask in nearly ascending order. Whoever needs bytes that lie beyond those of another thread takes the
other's out of the stream too and keeps them for it: so nobody ever waits for a thread that waits. Any thread may read.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Final, Protocol

from xbfs_engine.core.errors import SourceUnreadable, TransferFailed
from xbfs_engine.core.limits import MIB, SEGMENT_SIZE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from xbfs_engine.source.base import Extent

_SKIP_SIZE: Final = 4 * MIB
_KEPT_MAX: Final = 16 * SEGMENT_SIZE
"""Bytes kept for other threads: each works on one segment, and there are at most four threads."""


class Stream(Protocol):
    """What is needed of a transfer (``source.xapi.http.RawStream``)."""

    def readinto(self, view: memoryview) -> int:
        """Fill ``view`` as far as the stream goes; less is the end."""
        ...


class StreamDisk:
    """Reads announced extents in order. ``finish`` is called by the thread that took the last byte of the disk, and
    raises if the sender says that the transfer failed.
    """

    def __init__(
        self,
        stream: Stream,
        size_bytes: int,
        extents: Callable[[], Iterator[Extent]] | None,
        finish: Callable[[], None],
    ) -> None:
        self._stream = stream
        self._size = size_bytes
        self._extents = extents
        self._finish = finish
        self._lock = threading.Lock()
        self._position = 0
        self._reads: Iterator[Extent] = iter(())
        self._next: Extent | None = None
        self._kept: dict[Extent, bytearray] = {}
        self._kept_bytes = 0

    @property
    def size_bytes(self) -> int:
        """Virtual size."""
        return self._size

    def data_extents(self) -> Iterator[Extent]:
        """What the caller knows of allocation, or all of the disk."""
        if self._extents is not None:
            yield from self._extents()
        elif self._size:
            yield 0, self._size

    def read_ahead(self, reads: Iterator[Extent]) -> None:
        """Hear what will be read, and in which order."""
        self._reads = reads
        self._next = next(reads, None)

    def read_into(self, offset: int, view: memoryview) -> None:
        """Fill ``view`` with an announced extent. Raises PoolError, SourceUnreadable."""
        wanted = (offset, len(view))
        with self._lock:
            kept = self._kept.pop(wanted, None)
            if kept is not None:
                self._kept_bytes -= len(kept)
                view[:] = kept
                return
            while self._next != wanted:
                if self._next is None:
                    raise SourceUnreadable(f"extent {wanted} was not announced: a stream can not be read again")
                self._keep(self._next)
                self._next = next(self._reads, None)
            self._next = next(self._reads, None)
            self._skip_to(offset)
            self._take(view)
            if self._next is None:
                self._end()

    def check_unchanged(self) -> None:
        """Do nothing: a snapshot does not change."""

    def close(self) -> None:
        """Do nothing: the stream belongs to whoever opened it."""

    def _keep(self, read: Extent) -> None:
        """Take the bytes of a read that another thread is about to ask for."""
        offset, length = read
        if self._kept_bytes + length > _KEPT_MAX:
            raise SourceUnreadable(f"extent {read} was announced and not asked for")
        self._skip_to(offset)
        buffer = bytearray(length)
        self._take(memoryview(buffer))
        self._kept[read] = buffer
        self._kept_bytes += length

    def _end(self) -> None:
        """After the last announced byte: read on to the disk's end, for only the sender knows whether all was well."""
        self._skip_to(self._size)
        if self._stream.readinto(memoryview(bytearray(1))):
            raise TransferFailed(f"the stream of the disk goes on behind its {self._size} bytes")
        self._finish()

    def _skip_to(self, offset: int) -> None:
        assert offset >= self._position
        waste = memoryview(bytearray(min(_SKIP_SIZE, offset - self._position)))
        while self._position < offset:
            self._take(waste[: offset - self._position])

    def _take(self, view: memoryview) -> None:
        count = self._stream.readinto(view)
        self._position += count
        if count != len(view):
            raise TransferFailed(f"the stream of the disk ended at {self._position} of {self._size} bytes")
