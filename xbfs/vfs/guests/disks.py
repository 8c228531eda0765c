"""The disks of a restore point as the reader of its guest asks for them: through the mount's cache, read ahead.

One thread at a time reads a disk. What is not in memory is read by the pool, so a storage that hangs costs its
deadline, and then that thread is free for the next request.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import trio

from xbfs.vfs.handles import ReadAhead
from xbfs_engine.core.errors import SourceUnreadable, StorageTimeout

if TYPE_CHECKING:
    from xbfs.vfs.images import DiskImage
    from xbfs.vfs.pool import ReadPool


class PooledDisk:
    """A BlockSource over the raw image of a disk; for threads that are not the event loop's (``token``).

    ``timeout_s`` bounds a read.
    """

    def __init__(self, image: DiskImage, pool: ReadPool, token: trio.lowlevel.TrioToken, *, timeout_s: float) -> None:
        self._access = image.access
        self._ahead = ReadAhead(image, pool)
        self._pool = pool
        self._token = token
        self._timeout_s = timeout_s

    @property
    def size_bytes(self) -> int:
        """Size of the disk."""
        return self._access.size_bytes

    def read_at(self, offset: int, length: int) -> bytes:
        """Exactly these bytes. Raises IntegrityError, StorageError, SourceUnreadable if they are not within."""
        if offset < 0 or length < 0 or offset + length > self.size_bytes:
            raise SourceUnreadable(f"{length} bytes at {offset} are not within the disk's {self.size_bytes}")
        self._ahead.notice(offset, length)
        cached = self._access.read_cached(offset, length)
        if cached is not None:
            return bytes(cached)
        read = partial(self._access.read_at, offset, length)
        try:
            return trio.from_thread.run(self._pool.run, read, self._timeout_s, trio_token=self._token)
        except (trio.RunFinishedError, trio.Cancelled) as exc:
            raise StorageTimeout("the mount ends") from exc
