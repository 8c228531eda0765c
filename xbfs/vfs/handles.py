"""Open files: reading an image, noticing that it is read in order, and reading ahead.

Owns what an open file remembers between reads. Any thread may read: ``read`` is for an event loop and decodes in the
pool's threads, ``parts_now`` decodes in the caller's.
"""

from __future__ import annotations

import threading
from functools import partial
from typing import TYPE_CHECKING, Final, Protocol

from xbfs_engine.core.errors import XbfsError
from xbfs_engine.core.limits import MIB

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from xbfs.vfs.images import DiskImage
    from xbfs.vfs.pool import ReadPool
    from xbfs.view.base import Part

NEAR_BYTES: Final = 4 * MIB
"""Reads this close to where the last one ended still go on in order: kernel and qemu send several at once."""
STREAK_MIN: Final = 2
"""Reads in order before anything is read ahead: a random reader hits twice by chance once in 10^5 on a GiB."""
PIECE_BYTES: Final = 2 * MIB
"""What one thread reads ahead at a time: some milliseconds of decoding."""
WINDOW_MIN_BYTES: Final = 2 * MIB
WINDOW_MAX_BYTES: Final = 8 * MIB


class ReadAhead:
    """Notices that an image is read in order, and has what comes next decoded."""

    __slots__ = ("_ahead_to", "_image", "_lock", "_next", "_pool", "_streak", "_window")

    def __init__(self, image: DiskImage, pool: ReadPool) -> None:
        self._image = image
        self._pool = pool
        self._lock = threading.Lock()
        self._next = 0
        self._streak = 0
        self._window = 0
        self._ahead_to = 0

    def notice(self, offset: int, size: int) -> None:
        """Somebody reads [offset, offset+size): read ahead if reads come in order."""
        if -NEAR_BYTES <= offset - self._next <= NEAR_BYTES:
            self._streak += 1
            if self._streak >= STREAK_MIN and self._lock.acquire(blocking=False):
                try:
                    self._read_ahead(offset + size)
                finally:
                    self._lock.release()
        else:
            self._streak = 0
            self._window = 0
        self._next = offset + size

    def _read_ahead(self, end: int) -> None:
        """Have pieces decoded up to a window beyond ``end``; the window grows as long as reads stay in order."""
        if self._window == 0:
            self._window = WINDOW_MIN_BYTES
            self._ahead_to = end
        self._ahead_to = max(self._ahead_to, end)
        limit = min(end + self._window, self._image.access.size_bytes)
        while self._ahead_to < limit:
            piece_end = (self._ahead_to // PIECE_BYTES + 1) * PIECE_BYTES
            if not self._pool.offer(partial(self._image.warm, self._ahead_to, piece_end - self._ahead_to)):
                return
            self._ahead_to = piece_end
            self._window = min(2 * self._window, WINDOW_MAX_BYTES)


class OpenFile(Protocol):
    """What both planes of a mount read from. ``failed(offset, size, problem)`` is told of reads that fail."""

    failed: Callable[[int, int, XbfsError], None]
    timeout_s: float
    """A read without an answer after this time has failed."""
    seek_waits: bool
    """Whether ``seek`` may wait for storage."""

    def read_cached(self, offset: int, size: int) -> bytes | memoryview | None:
        """The bytes of [offset, offset+size), clipped at the end, if they are in memory; must come before ``read``."""
        ...

    def parts_cached(self, offset: int, size: int) -> Sequence[Part] | None:
        """``read_cached`` in pieces; must come before ``parts_now``."""
        ...

    def parts_now(self, offset: int, size: int) -> Sequence[Part]:
        """The same from storage, if need be, in this thread. Raises XbfsError; tells nobody."""
        ...

    def seek(self, offset: int, *, data: bool) -> int | None:
        """Where data, or else a hole, begins at or behind ``offset``; None if there is none (lseek(2), ENXIO)."""
        ...

    async def read(self, offset: int, size: int) -> bytes:
        """The same as ``parts_now`` from a thread. Raises XbfsError."""
        ...


class ImageHandle:
    """An open image. ``failed(offset, size, problem)`` is told of reads that fail; ``timeout_s`` bounds a read."""

    __slots__ = ("_access", "_ahead", "_image", "_pool", "failed", "seek_waits", "timeout_s")

    def __init__(
        self, image: DiskImage, pool: ReadPool, *, timeout_s: float, failed: Callable[[int, int, XbfsError], None]
    ) -> None:
        self._image = image
        self._access = image.access
        self._ahead = ReadAhead(image, pool)
        self._pool = pool
        self.timeout_s = timeout_s
        self.failed = failed
        self.seek_waits = False

    def read_cached(self, offset: int, size: int) -> bytes | memoryview | None:
        """The bytes of [offset, offset+size), clipped at the end, if they are in memory; must come before ``read``."""
        self._ahead.notice(offset, size)
        return self._access.read_cached(offset, size)

    def parts_cached(self, offset: int, size: int) -> Sequence[Part] | None:
        """``read_cached`` in pieces; must come before ``parts_now``."""
        self._ahead.notice(offset, size)
        return self._access.parts_cached(offset, size)

    def parts_now(self, offset: int, size: int) -> Sequence[Part]:
        """The same from storage, if need be, in this thread. Raises IntegrityError, StorageError; tells nobody."""
        return self._access.parts_at(offset, size)

    def seek(self, offset: int, *, data: bool) -> int | None:
        """Where data, or else a hole, begins at or behind ``offset``; None if there is none (lseek(2), ENXIO)."""
        return self._image.seek(offset, data=data)

    async def read(self, offset: int, size: int) -> bytes:
        """The same from a thread. Raises IntegrityError, StorageError."""
        try:
            return await self._pool.run(partial(self._access.read_at, offset, size), self.timeout_s)
        except XbfsError as exc:
            self.failed(offset, size, exc)
            raise
