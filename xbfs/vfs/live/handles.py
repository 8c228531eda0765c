"""Open files of the live mount: a disk, a foreign file of the backing directory, an image that is shown for a commit.

Each is what the data plane reads from and writes to (``vfs.handles.OpenFile``, ``WritableFile``). Any thread may call
them until they are closed.
"""

from __future__ import annotations

import errno
import os
import stat
from abc import ABC, abstractmethod
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Final, Protocol

import trio

from xbfs.vfs.handles import OpenFile
from xbfs.vfs.live.calls import allocate, path_of, refused
from xbfs.vfs.live.disks import sought
from xbfs.view.overlay.unitmap import UNIT
from xbfs_engine.core.log import Logger

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from xbfs.vfs.live.disks import LiveDisk
    from xbfs.vfs.live.nodes import ShownSession
    from xbfs.vfs.live.passing import Backings
    from xbfs.view.base import Part, RandomAccess
    from xbfs_engine.core.errors import XbfsError

LOCAL_S: Final = float("inf")
"""How long a local file system may take: for ever, as for any program."""
_PRIVILEGED: Final = stat.S_ISUID | stat.S_ISGID

_log = Logger("xbfs.live")


class WritableFile(OpenFile, Protocol):
    """What the data plane changes a file through. All may block; all raise XbfsError, Refused."""

    def write_limit_s(self, offset: int, length: int) -> float:
        """How long this write may take: it may need bytes of the restore point."""
        ...

    def write_now(self, offset: int, data: bytes | memoryview) -> int:
        """Write; how many bytes of it were."""
        ...

    def flush_now(self, *, data_only: bool) -> None:
        """Have all that was written before survive any crash."""
        ...

    def allocate_now(self, mode: int, offset: int, length: int) -> None:
        """fallocate(2)."""
        ...

    def drop_privileges(self) -> None:
        """The set-user and set-group bits go, as somebody else writes."""
        ...


class Opened(ABC):
    """What all open files have in common. ``session``: whose file it is; ``label``: what the log calls it."""

    __slots__ = ("failed", "label", "seek_waits", "session", "timeout_s")

    def __init__(self, session: ShownSession | None, label: str, timeout_s: float) -> None:
        self.session = session
        self.label = label
        self.timeout_s = timeout_s
        self.seek_waits = True
        self.failed: Callable[[int, int, XbfsError], None] = self._log_failure

    @abstractmethod
    def parts_cached(self, offset: int, size: int) -> Sequence[Part] | None:
        """The bytes of [offset, offset+size), clipped at the end, if they are in memory. Never blocks."""
        ...

    @abstractmethod
    def parts_now(self, offset: int, size: int) -> Sequence[Part]:
        """The same, wherever they are. May block. Raises XbfsError, Refused."""
        ...

    @abstractmethod
    def seek(self, offset: int, *, data: bool) -> int | None:
        """Where data, or else a hole, begins at or behind ``offset``; None if there is none (lseek(2), ENXIO)."""
        ...

    def read_cached(self, offset: int, size: int) -> bytes | memoryview | None:
        """``parts_cached`` as one."""
        parts = self.parts_cached(offset, size)
        return None if parts is None else b"".join(parts)

    async def read(self, offset: int, size: int) -> bytes:
        """``parts_now`` as one, in a thread."""
        return b"".join(await trio.to_thread.run_sync(self.parts_now, offset, size))

    @abstractmethod
    def close(self) -> None:
        """Nobody reads any more."""
        ...

    def _log_failure(self, offset: int, size: int, problem: XbfsError) -> None:
        _log.warning("a disk failed", file=self.label, offset=offset, size=size, problem=str(problem))


class OpenImage(Opened):
    """An image that only shows itself."""

    __slots__ = ("_image",)

    def __init__(self, image: RandomAccess, session: ShownSession | None, label: str, timeout_s: float) -> None:
        super().__init__(session, label, timeout_s)
        self._image = image

    def parts_cached(self, offset: int, size: int) -> Sequence[Part] | None:
        """The bytes if they are in memory."""
        return self._image.parts_cached(offset, size)

    def parts_now(self, offset: int, size: int) -> Sequence[Part]:
        """The bytes."""
        return self._image.parts_at(offset, size)

    def seek(self, offset: int, *, data: bool) -> int | None:
        """Where data, or else a hole, begins at or behind ``offset``."""
        return sought(self._image, offset, data=data)

    def close(self) -> None:
        """The image is whoever shows it's."""


class OpenDisk(Opened):
    """An overlay disk."""

    __slots__ = ("_disk",)

    def __init__(self, disk: LiveDisk, session: ShownSession | None, label: str, timeout_s: float) -> None:
        super().__init__(session, label, timeout_s)
        self._disk = disk

    def parts_cached(self, offset: int, size: int) -> Sequence[Part] | None:
        """The bytes if they are in memory."""
        return self._disk.parts_cached(offset, size)

    def parts_now(self, offset: int, size: int) -> Sequence[Part]:
        """The bytes."""
        return self._disk.parts_at(offset, size)

    def seek(self, offset: int, *, data: bool) -> int | None:
        """Where data, or else a hole, begins at or behind ``offset``."""
        return self._disk.seek(offset, data=data)

    def write_limit_s(self, offset: int, length: int) -> float:
        """Only units that are written in part may have to be filled from the restore point."""
        return LOCAL_S if (offset | length) % UNIT == 0 else self.timeout_s

    def write_now(self, offset: int, data: bytes | memoryview) -> int:
        """All or nothing is acknowledged."""
        self._disk.write_at(offset, data, len(data))
        return len(data)

    def flush_now(self, *, data_only: bool) -> None:
        """Flush the overlay."""
        self._disk.flush()

    def allocate_now(self, mode: int, offset: int, length: int) -> None:
        """Holes and zeros."""
        self._disk.allocate(mode, offset, length)

    def drop_privileges(self) -> None:
        """A disk is no program."""

    def begin(self, flags: int, backings: Backings) -> int | None:
        """Open it, where all openings are counted: the number of the file that the kernel uses, None if it asks us.

        May block. Raises as ``Overlay.resize``, Refused.
        """
        assert self.session is not None, "a disk is a session's"
        self.session.opened.add(self)
        try:
            if flags & os.O_TRUNC:
                self._disk.resize(0)
            return self._disk.opened(backings)
        except BaseException:
            self.session.opened.discard(self)
            raise

    def close(self) -> None:
        """The times are told at the latest now."""
        with suppress(OSError):
            self._disk.settle()
        if self._disk.passing is not None:
            self._disk.passing.close()


class OpenForeign(Opened):
    """A file of the backing directory; owns its descriptor."""

    __slots__ = ("fd",)

    def __init__(self, fd: int, session: ShownSession | None, label: str) -> None:
        super().__init__(session, label, LOCAL_S)
        self.fd = fd

    def parts_cached(self, offset: int, size: int) -> Sequence[Part] | None:
        """The bytes if the kernel has them in memory."""
        buffer = bytearray(size)
        try:
            found = os.preadv(self.fd, [buffer], offset, os.RWF_NOWAIT)
        except OSError:
            return None
        return (memoryview(buffer),) if found == size else None

    def parts_now(self, offset: int, size: int) -> Sequence[Part]:
        """The bytes."""
        with _as_refusal():
            return (os.pread(self.fd, size, offset),)

    def seek(self, offset: int, *, data: bool) -> int | None:
        """lseek(2)."""
        try:
            return os.lseek(self.fd, offset, os.SEEK_DATA if data else os.SEEK_HOLE)
        except OSError as exc:
            if exc.errno == errno.ENXIO:
                return None
            raise refused(exc.errno or errno.EIO) from exc

    def write_limit_s(self, offset: int, length: int) -> float:
        """As long as it takes."""
        return LOCAL_S

    def write_now(self, offset: int, data: bytes | memoryview) -> int:
        """As much as fits the disk."""
        with _as_refusal():
            return os.pwrite(self.fd, data, offset)

    def flush_now(self, *, data_only: bool) -> None:
        """fsync(2), fdatasync(2)."""
        with _as_refusal():
            (os.fdatasync if data_only else os.fsync)(self.fd)

    def allocate_now(self, mode: int, offset: int, length: int) -> None:
        """fallocate(2)."""
        with _as_refusal():
            allocate(self.fd, mode, offset, length)

    def drop_privileges(self) -> None:
        """As the kernel does it for who is not root."""
        with _as_refusal():
            mode = os.fstat(self.fd).st_mode
            if mode & _PRIVILEGED:
                os.chmod(path_of(self.fd), stat.S_IMODE(mode) & ~_PRIVILEGED)  # noqa: PTH101 - no path of a file

    def close(self) -> None:
        """Let go of the file: what it could not write it has told at fsync, or never."""
        with suppress(OSError):
            os.close(self.fd)


@contextmanager
def _as_refusal() -> Iterator[None]:
    try:
        yield
    except OSError as exc:
        raise refused(exc.errno or errno.EIO) from exc
