"""A local image file or block device as a source. Reads only what is allocated; any thread may read."""

from __future__ import annotations

import errno
import os
import stat
from typing import TYPE_CHECKING

from xbfs_engine.core.errors import SourceChanged, SourceUnreadable
from xbfs_engine.core.limits import DISK_SIZE_MAX

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from xbfs_engine.source.base import Extent


class ImageSource:
    """A raw image. It must not be written to while it is read: a size change is detected, other changes are not."""

    def __init__(self, path: Path) -> None:
        """Open ``path``. Raises SourceUnreadable."""
        self._path = path
        try:
            # O_NONBLOCK: opening a FIFO must not wait for a writer; files and block devices do not care.
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as exc:
            raise SourceUnreadable(
                f"{path} can not be opened: {exc.strerror}", hint="check the path and that you may read it"
            ) from exc
        try:
            self._size = self._measure()
        except SourceUnreadable:
            os.close(self._fd)
            raise

    @property
    def size_bytes(self) -> int:
        """Size of the file or device."""
        return self._size

    def data_extents(self) -> Iterator[Extent]:
        """What the filesystem says is allocated; all of it where it can not say."""
        offset = 0
        while offset < self._size:
            try:
                start = os.lseek(self._fd, offset, os.SEEK_DATA)
                end = os.lseek(self._fd, start, os.SEEK_HOLE)
            except OSError as exc:
                if exc.errno == errno.ENXIO:
                    return
                if exc.errno in {errno.EINVAL, errno.ESPIPE, errno.ENOTSUP}:
                    yield offset, self._size - offset
                    return
                raise SourceUnreadable(f"{self._path}: {exc.strerror}") from exc
            end = min(end, self._size)
            if start < end:
                yield start, end - start
            offset = max(end, offset + 1)

    def read_ahead(self, reads: Iterator[Extent]) -> None:
        """Do nothing: the kernel reads ahead."""

    def read_into(self, offset: int, view: memoryview) -> None:
        """Fill ``view``."""
        done = 0
        while done < len(view):
            try:
                count = os.preadv(self._fd, [view[done:]], offset + done)
            except OSError as exc:
                raise SourceUnreadable(
                    f"{self._path} can not be read at offset {offset + done}: {exc.strerror}",
                    hint="check the disk below it (dmesg); no restore point was made",
                ) from exc
            if count == 0:
                raise SourceChanged(f"{self._path} ends at {offset + done}, it had {self._size} bytes at the start")
            done += count

    def check_unchanged(self) -> None:
        """Compare the size with the one at the start."""
        size = self._measure()
        if size != self._size:
            raise SourceChanged(f"{self._path} had {self._size} bytes at the start and has {size} now")

    def close(self) -> None:
        """Close the file."""
        os.close(self._fd)

    def _measure(self) -> int:
        mode = os.fstat(self._fd).st_mode
        if not stat.S_ISREG(mode) and not stat.S_ISBLK(mode):
            raise SourceUnreadable(f"{self._path} is neither a file nor a block device")
        try:
            size = os.lseek(self._fd, 0, os.SEEK_END)
        except OSError as exc:
            raise SourceUnreadable(f"{self._path}: its size can not be found: {exc.strerror}") from exc
        if size > DISK_SIZE_MAX:
            raise SourceUnreadable(f"{self._path} has {size} bytes, more than the {DISK_SIZE_MAX} supported")
        return size
