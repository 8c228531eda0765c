"""The disks of a restore point as the reader of its guest asks for them: through the mount's cache, read ahead.

One thread at a time reads a disk; it may wait as long as the mount lets a read of the storage wait.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from xbfs.vfs.gate import Parked
from xbfs.vfs.handles import ReadAhead
from xbfs_engine.core.errors import SourceUnreadable, StorageTimeout

if TYPE_CHECKING:
    from xbfs.vfs.images import DiskImage
    from xbfs.vfs.pool import ReadPool


class PatientDisk:
    """A BlockSource over the raw image of a disk. ``timeout_s`` bounds a read."""

    def __init__(self, image: DiskImage, pool: ReadPool, *, timeout_s: float) -> None:
        self._access = image.access
        self._ahead = ReadAhead(image, pool)
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
        while True:
            try:
                return self._access.read_at(offset, length)
            except Parked as exc:
                resumed = threading.Event()
                exc.park(resumed.set)
                if not resumed.wait(self._timeout_s):
                    raise StorageTimeout(exc.message) from exc
