"""The four files of an overlay, and the lock on them: the seam to the file system, where OSErrors become typed.

Owns how the files come to be and how a failed system call is told; what is in them is others'. ``StateFile`` is what
a test puts a model of a disk behind. Any thread may call a file until it is closed, which nobody may do during a call.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
from contextlib import suppress
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol

from xbfs.view.overlay.leases import has_writers
from xbfs_engine.core.errors import (
    BlobNotFound,
    IntegrityError,
    OverlayInUse,
    StorageDenied,
    StorageError,
    StorageFull,
    TargetUnwritable,
)

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from typing_extensions import Buffer

HEADER, DATA, MAP, RECENT = "header", "data", "map", "recent"
"""Names of the files."""
DIRECTORY_MODE: Final = 0o700
FILE_MODE: Final = 0o600

_IOV_MAX: Final = 1024
"""Buffers per pwritev(2): UIO_MAXIOV of Linux, include/uapi/linux/uio.h."""
_KEEP_SIZE_PUNCH_HOLE: Final = 0x01 | 0x02
"""Mode of fallocate(2), include/uapi/linux/falloc.h."""
_FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_DENIED: Final = frozenset({errno.EACCES, errno.EPERM, errno.EROFS})
_FULL_HINT: Final = "free space where the overlay lies (or raise ulimit -f); everything acknowledged is still there"
_fallocate = ctypes.CDLL(None, use_errno=True).fallocate
_fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


class StateFile(Protocol):
    """A file of the overlay. Every method raises StorageError: StorageFull where there is no room for the bytes."""

    def read_at(self, offset: int, length: int) -> bytes:
        """The bytes of [offset, offset+length); fewer only at the end of the file."""
        ...

    def read_now(self, offset: int, length: int) -> bytes | None:
        """The same if it is in memory, else None. Never blocks, never raises."""
        ...

    def write_at(self, offset: int, buffers: Sequence[Buffer]) -> None:
        """Write the buffers one behind the other, all of them; an error leaves any part of them."""
        ...

    def punch(self, offset: int, length: int) -> bool:
        """Give the room of a range back, so that it reads as zeros; False if the file system can not do it."""
        ...

    def reserve(self, offset: int, length: int) -> None:
        """Have room for a range: writing it later does not give StorageFull. What is in it does not change."""
        ...

    def truncate(self, size_bytes: int) -> None:
        """Cut or extend with zeros."""
        ...

    def size(self) -> int:
        """Size in bytes."""
        ...

    def next_data(self, offset: int) -> int | None:
        """The first byte at or behind ``offset`` that is not known to be in a hole; None if there is none."""
        ...

    def sync(self) -> None:
        """All that was done to the file before is durable (fdatasync)."""
        ...

    def room(self) -> tuple[int, int]:
        """Bytes that the file system has left for this process, and bytes it has in all."""
        ...

    def fileno(self) -> int:
        """Its descriptor."""
        ...

    def unnamed(self) -> StateFile:
        """A new, empty file without a name on the same file system: gone when it is closed or the process ends."""
        ...

    def close(self) -> None:
        """Let go of the file."""
        ...


class StateFiles(NamedTuple):
    """The files of one overlay; whoever has them holds its lock until ``header`` is closed."""

    header: StateFile
    data: StateFile
    map: StateFile
    recent: StateFile

    def close(self) -> None:
        """Close all, the one with the lock last."""
        for file in (self.data, self.map, self.recent, self.header):
            file.close()


def make_files(directory: Path) -> StateFiles:
    """The files in ``directory``, made where they are missing, with durable names, and locked.

    The directory is made in its existing parent. Raises OverlayInUse, StorageError.
    """
    try:
        directory.mkdir(DIRECTORY_MODE, exist_ok=True)
        _sync_directory(directory.parent)
    except FileExistsError as exc:
        raise TargetUnwritable(f"{directory} is not a directory", hint="choose another place") from exc
    except OSError as exc:
        raise _error(exc, f"create {directory}") from exc
    files = _open_all(directory, os.O_CREAT)
    try:
        _sync_directory(directory)
    except OSError as exc:
        files.close()
        raise _error(exc, f"sync {directory}") from exc
    return files


def existing_files(directory: Path) -> StateFiles:
    """The files in ``directory``, locked. Raises as ``make_files``; BlobNotFound, IntegrityError if one is lost."""
    return _open_all(directory, 0)


def is_open(directory: Path) -> bool:
    """Whether a process has the overlay in ``directory`` open; not if there is none. Raises StorageError."""
    try:
        file = _open(directory / HEADER, os.O_RDWR)
    except BlobNotFound:
        return False
    try:
        file.lock()
    except OverlayInUse:
        return True
    finally:
        file.close()
    return False


def header_content(directory: Path, length: int) -> bytes:
    """The beginning of the header file, without the lock. Raises BlobNotFound, StorageError."""
    file = _open(directory / HEADER, os.O_RDONLY)
    try:
        return file.read_at(0, length)
    finally:
        file.close()


def _open_all(directory: Path, flags: int) -> StateFiles:
    files: list[_File] = []
    try:
        files.append(_open(directory / HEADER, os.O_RDWR | flags))
        files[0].lock()
        try:
            _refuse_writers(directory / DATA)
            files += [_open(directory / name, os.O_RDWR | flags) for name in (DATA, MAP)]
        except BlobNotFound as exc:
            raise IntegrityError(exc.message, hint="a file of the overlay was removed: begin a new one") from exc
        # Tells nothing when the machine was down, so it may well have been lost then.
        files.append(_open(directory / RECENT, os.O_RDWR | os.O_CREAT))
        return StateFiles(*files)
    except BaseException:
        for file in files:
            file.close()
        raise


def _refuse_writers(path: Path) -> None:
    """Raises OverlayInUse if the kernel still writes to the file for a program that a server passed it through to."""
    with suppress(OSError):  # there is none yet, or it is told when it is opened
        if has_writers(path):
            message = f"a program still writes to the overlay {path.parent}, which its server had passed through to it"
            raise OverlayInUse(message, hint="end the program that had the disk open when its server ended")


def _open(path: Path, flags: int) -> _File:
    try:
        return _File(os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, FILE_MODE), path)
    except FileNotFoundError as exc:
        raise BlobNotFound(f"{path} is not there", hint="is this the state directory of an overlay?") from exc
    except OSError as exc:
        raise _error(exc, f"open {path}") from exc


class _File:
    """An open file of the file system."""

    __slots__ = ("_fd", "_path")

    def __init__(self, fd: int, path: Path) -> None:
        self._fd = fd
        self._path = path

    def lock(self) -> None:
        """Be the only one who has this file open. Raises OverlayInUse, StorageError."""
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as exc:
            raise OverlayInUse(f"the overlay {self._path.parent} is in use") from exc
        except OSError as exc:
            raise _error(exc, f"lock {self._path}") from exc

    def read_at(self, offset: int, length: int) -> bytes:
        try:
            data = os.pread(self._fd, length, offset)
            while 0 < len(data) < length:
                more = os.pread(self._fd, length - len(data), offset + len(data))
                if not more:
                    break
                data += more
        except OSError as exc:
            raise _error(exc, f"read {self._path} at {offset}") from exc
        return data

    def read_now(self, offset: int, length: int) -> bytes | None:
        buffer = bytearray(length)
        try:
            found = os.preadv(self._fd, [buffer], offset, os.RWF_NOWAIT)
        except OSError:
            return None
        return bytes(buffer) if found == length else None

    def write_at(self, offset: int, buffers: Sequence[Buffer]) -> None:
        try:
            left = sum(memoryview(part).nbytes for part in buffers)
            written = os.pwritev(self._fd, buffers[:_IOV_MAX], offset)
            if written != left:
                self._write_rest(offset, buffers, written)
        except OSError as exc:
            raise _error(exc, f"write {self._path} at {offset}") from exc

    def _write_rest(self, offset: int, buffers: Sequence[Buffer], written: int) -> None:
        """Go on after ``written`` bytes: the disk is nearly full, or there are many buffers. Raises OSError."""
        for part in buffers:
            view = memoryview(part).cast("B")
            skipped = min(written, view.nbytes)
            written -= skipped
            offset += skipped
            view = view[skipped:]
            while view:
                done = os.pwrite(self._fd, view, offset)
                offset += done
                view = view[done:]

    def punch(self, offset: int, length: int) -> bool:
        if _fallocate(self._fd, _KEEP_SIZE_PUNCH_HOLE, offset, length) != 0:
            number = ctypes.get_errno()
            if number not in {errno.EOPNOTSUPP, errno.ENOSYS}:
                raise _error(OSError(number, os.strerror(number)), f"punch {self._path} at {offset}")
            return False
        return True

    def reserve(self, offset: int, length: int) -> None:
        try:
            os.posix_fallocate(self._fd, offset, length)
        except OSError as exc:
            if exc.errno not in {errno.EOPNOTSUPP, errno.EINVAL}:
                raise _error(exc, f"extend {self._path}") from exc

    def truncate(self, size_bytes: int) -> None:
        try:
            os.ftruncate(self._fd, size_bytes)
        except OSError as exc:
            raise _error(exc, f"resize {self._path} to {size_bytes} bytes") from exc

    def size(self) -> int:
        try:
            return os.fstat(self._fd).st_size
        except OSError as exc:
            raise _error(exc, f"stat {self._path}") from exc

    def next_data(self, offset: int) -> int | None:
        try:
            return os.lseek(self._fd, offset, os.SEEK_DATA)
        except OSError as exc:
            if exc.errno == errno.ENXIO:
                return None
            if exc.errno == errno.EINVAL:
                return offset
            raise _error(exc, f"seek in {self._path}") from exc

    def sync(self) -> None:
        try:
            os.fdatasync(self._fd)
        except OSError as exc:
            raise _error(exc, f"sync {self._path}") from exc

    def room(self) -> tuple[int, int]:
        try:
            found = os.fstatvfs(self._fd)
        except OSError as exc:
            raise _error(exc, f"stat the file system of {self._path}") from exc
        return found.f_bavail * found.f_frsize, found.f_blocks * found.f_frsize

    def fileno(self) -> int:
        return self._fd

    def unnamed(self) -> _File:
        directory = self._path.parent
        try:
            fd = os.open(directory, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, FILE_MODE)
        except OSError as exc:
            raise _error(exc, f"create a file in {directory}") from exc
        return _File(fd, directory / "(unnamed)")

    def close(self) -> None:
        # What must be durable was synced: close has nothing to tell that matters.
        with suppress(OSError):
            os.close(self._fd)
        self._fd = -1


def _sync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _error(exc: OSError, what: str) -> StorageError:
    message = f"{what}: {exc.strerror or exc}"
    if exc.errno in _FULL:
        return StorageFull(message, hint=_FULL_HINT)
    if exc.errno in _DENIED:
        return StorageDenied(message, hint="check owner and mode of the overlay's directory")
    return StorageError(message)
