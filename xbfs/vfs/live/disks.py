"""One overlay disk as the live mount shows it: reads and writes of its bytes, growth, and the times of its stub.

Owns nothing but the rules between a file and an ``Overlay``: writes behind the end make it longer, the stub's mtime
follows writes, and nobody is in the overlay any more once ``leave`` has returned. A disk that the kernel reads and
writes itself (``passing``) keeps its size. Any thread may call it.
"""

from __future__ import annotations

import errno
import os
import threading
import time
from typing import TYPE_CHECKING, Final

from xbfs.vfs.live.calls import KEEP_SIZE, PUNCH_HOLE, ZERO_RANGE, path_of, refused
from xbfs.view.overlay.unitmap import UNIT
from xbfs_engine.core.limits import DISK_SIZE_MAX

if TYPE_CHECKING:
    from collections.abc import Sequence

    from typing_extensions import Buffer

    from xbfs.vfs.live.passing import Backings, Passing
    from xbfs.view.base import Part, RandomAccess
    from xbfs.view.overlay import Overlay
    from xbfs_engine.core.runtime import Clock

LEAVE_S: Final = 5.0
"""What calls get to come back when a disk is taken away while files of it are open."""
_POLL_S: Final = 0.01
_BLOCK: Final = 512


class LiveDisk:
    """``stub`` is a descriptor (O_PATH) of the stub, which is the disk's from now on. ``passing``: None if the kernel
    shall never have its file; else all openings of the disk are told it."""

    __slots__ = ("_clock", "_growing", "_inside", "_is_gone", "_written", "overlay", "passing", "stub")

    def __init__(self, overlay: Overlay, stub: int, clock: Clock, passing: Passing | None = None) -> None:
        self.overlay = overlay
        self.stub = stub
        self.passing = passing
        self._clock = clock
        self._growing = threading.Lock()
        self._written = False
        self._is_gone = False
        # Threads that are in the overlay. Entering sets are atomic: a lock would cost as much as a cached read.
        self._inside: set[int] = set()

    @property
    def size_bytes(self) -> int:
        """The present size."""
        return self.overlay.size_bytes

    @property
    def blocks(self) -> int:
        """What the disk takes here, in 512 bytes. Never none: to GNU tar that says that all is zeros."""
        return (self.overlay.data_bytes + UNIT) // _BLOCK

    def opened(self, backings: Backings) -> int | None:
        """One opening more of a disk with ``passing``; raises Refused if it was taken away. May block."""
        assert self.passing is not None, "others are not counted"
        me = self._entered()
        try:
            return self.passing.open(backings)
        finally:
            self._inside.discard(me)

    def parts_cached(self, offset: int, size: int) -> Sequence[Part] | None:
        """The bytes if all are in memory, else None. Never blocks, never raises."""
        me = threading.get_ident()
        self._inside.add(me)
        try:
            return None if self._is_gone else self.overlay.parts_cached(offset, size)
        finally:
            self._inside.discard(me)

    def parts_at(self, offset: int, size: int) -> Sequence[Part]:
        """The bytes, clipped at the end. Raises as ``Overlay``, Refused if the disk was taken away."""
        me = self._entered()
        try:
            return self.overlay.parts_at(offset, size)
        finally:
            self._inside.discard(me)

    def write_at(self, offset: int, data: Buffer, length: int) -> None:
        """Write ``length`` bytes; behind the end the disk grows first, durably. Raises as ``Overlay``, Refused."""
        me = self._entered()
        try:
            if offset + length > self.overlay.size_bytes:
                self._grow(offset + length)
            self.overlay.write_at(offset, (data,))
            self._written = True
        finally:
            self._inside.discard(me)

    def allocate(self, mode: int, offset: int, length: int) -> None:
        """fallocate(2): holes and zeros are the overlay's; room is never reserved, as with any sparse file."""
        me = self._entered()
        try:
            if mode & ~(KEEP_SIZE | PUNCH_HOLE | ZERO_RANGE):
                raise refused(errno.EOPNOTSUPP)
            end = offset + length
            if not mode & KEEP_SIZE and end > self.overlay.size_bytes:
                self._grow(end)
            stop = min(end, self.overlay.size_bytes)
            if mode & (PUNCH_HOLE | ZERO_RANGE) and stop > offset:
                zero = self.overlay.discard if mode & PUNCH_HOLE else self.overlay.write_zeroes
                zero(offset, stop - offset)
            self._written = True
        finally:
            self._inside.discard(me)

    def resize(self, size_bytes: int) -> None:
        """ftruncate(2); durable. Raises as ``Overlay``, Refused."""
        me = self._entered()
        try:
            if size_bytes > DISK_SIZE_MAX:
                raise refused(errno.EFBIG)
            with self._growing:
                self.overlay.resize(size_bytes)
            self._written = True
        finally:
            self._inside.discard(me)

    def seek(self, offset: int, *, data: bool) -> int | None:
        """Where data, or else a hole, begins at or behind ``offset``; None if there is none (lseek(2), ENXIO)."""
        me = self._entered()
        try:
            return sought(self.overlay, offset, data=data)
        finally:
            self._inside.discard(me)

    def flush(self) -> None:
        """fsync(2). Raises as ``Overlay.flush``, Refused: also if the kernel wrote what can not stay."""
        self.settle()
        me = self._entered()
        try:
            self.overlay.flush()
            if self.passing is not None and self.passing.is_longer:
                raise refused(errno.EFBIG)
        finally:
            self._inside.discard(me)

    def settle(self) -> None:
        """Have the stub's mtime follow what was written since the last call: not a system call for each write.

        Raises OSError.
        """
        if not self._written and self.passing is None:
            return
        me = self._entered()
        try:
            if self.passing is not None:
                self._written |= self.passing.has_moved()
                self.passing.settle()
            if not self._written:
                return
            self._written = False
            os.utime(path_of(self.stub), ns=(os.fstat(self.stub).st_atime_ns, self._clock.now_ns()))
        finally:
            self._inside.discard(me)

    @property
    def is_quiet(self) -> bool:
        """Whether nobody is in the overlay now."""
        return not self._inside

    def leave(self) -> bool:
        """Nobody gets in from now on. Whether all came out within LEAVE_S; who waits for the storage may not."""
        self._is_gone = True
        for _ in range(int(LEAVE_S / _POLL_S)):
            if self.is_quiet:
                break
            time.sleep(_POLL_S)
        if self.passing is not None:
            self.passing.leave()
        return self.is_quiet

    def _entered(self) -> int:
        """This thread, noted; the caller takes the note away. Raises Refused: the look comes after the note."""
        me = threading.get_ident()
        self._inside.add(me)
        if self._is_gone:
            self._inside.discard(me)
            raise refused(errno.EIO)
        return me

    def _grow(self, size_bytes: int) -> None:
        if size_bytes > DISK_SIZE_MAX:
            raise refused(errno.EFBIG)
        with self._growing:
            if size_bytes > self.overlay.size_bytes:
                self.overlay.resize(size_bytes)


def sought(image: RandomAccess | Overlay, offset: int, *, data: bool) -> int | None:
    """Where data, or else a hole, begins at or behind ``offset``; None if there is none (lseek(2), ENXIO)."""
    size = image.size_bytes
    if not 0 <= offset < size:
        return None
    for extent in image.extents(offset, size - offset):
        if extent.is_data == data:
            return max(offset, extent.offset)
    return None if data else size
