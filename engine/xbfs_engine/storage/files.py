"""Durable writing of files: the one place that does temporary file, fsync, link or rename, fsync of the directory.

Owns how a file becomes visible, what a crashed writer leaves behind (see ``is_temporary``), and the one table from
errno to StorageError. Knows nothing about blobs. The functions keep no state and may be called by any thread; an
AtomicOutput may be written by several threads, but is entered, committed and left by one.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import stat
from collections import deque
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final, Self

from xbfs_engine.core.errors import (
    BlobExists,
    BlobNotFound,
    StorageDenied,
    StorageError,
    StorageFull,
    StorageUnavailable,
    TargetExists,
    TargetUnwritable,
)
from xbfs_engine.core.runtime import SystemRandom

if TYPE_CHECKING:
    from collections.abc import Sequence

    from typing_extensions import Buffer

FILE_MODE: Final = 0o600
DIRECTORY_MODE: Final = 0o700

_IOV_MAX: Final = 1024
"""Buffers per writev(2): UIO_MAXIOV of Linux, include/uapi/linux/uio.h."""

_TEMPORARY = re.compile(r"\..+\.xbfs-partial-[0-9]+-[0-9a-f]{16}", re.DOTALL)
_TEMPORARY_STEM_MAX: Final = 50
"""Characters of the final name in a temporary one: 4 bytes each and the suffix still fit NAME_MAX of 255 bytes."""

_AT_FDCWD: Final = -100
_RENAME_NOREPLACE: Final = 1
"""Arguments of renameat2(2), include/uapi/linux/fcntl.h and fs.h."""

_LINK_REFUSED: Final = frozenset({errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS})
"""What link(2) says on file systems without hard links (FAT: EPERM; FUSE: ENOSYS; SMB: EOPNOTSUPP)."""

_ERRORS: Final[dict[int, type[StorageError]]] = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), StorageFull),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), StorageDenied),
    **dict.fromkeys((errno.ENOENT, errno.ENOTDIR, errno.ELOOP), BlobNotFound),
    errno.EEXIST: BlobExists,
    **dict.fromkeys(
        (
            *(errno.EIO, errno.EREMOTEIO, errno.ESTALE, errno.ETIMEDOUT, errno.EBUSY, errno.EAGAIN),
            *(errno.ENOTCONN, errno.ECONNRESET, errno.ECONNABORTED, errno.ECONNREFUSED, errno.ESHUTDOWN, errno.EPIPE),
            *(errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETDOWN, errno.ENETUNREACH),
            *(errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS, errno.ENOLCK),
        ),
        StorageUnavailable,
    ),
}
_HINTS: Final = {errno.EFBIG: "the file system or a limit of the process (ulimit -f) does not allow files of this size"}


def storage_error(exc: OSError, what: str) -> StorageError:
    """The typed error for an OSError; ``what`` says what was being done to what."""
    number = exc.errno or 0
    return _ERRORS.get(number, StorageError)(f"{what}: {exc.strerror or exc}", hint=_HINTS.get(number))


def write_new(path: Path, parts: Sequence[Buffer], *, temporary_in: Path | None = None) -> None:
    """Write the concatenation of ``parts`` as a new file: durable, complete or absent, never over an existing one.

    The temporary file lies in ``temporary_in``, a directory of the same file system, else beside ``path``. Holds
    against other processes and other NFS clients. BlobExists means that the existing file's name is durable; any
    other error leaves the name absent, or (the last fsync failed) complete: a second try then gives BlobExists.
    Raises BlobExists, StorageFull, StorageDenied, StorageUnavailable.
    """
    _write(path, parts, temporary_in or path.parent, replace=False)


def write_replace(path: Path, parts: Sequence[Buffer]) -> None:
    """Write the concatenation of ``parts`` to ``path``, durably; readers see the old file or the new one.

    Raises StorageFull, StorageDenied, StorageUnavailable.
    """
    _write(path, parts, path.parent, replace=True)


def write_changed(path: Path, data: bytes) -> None:
    """``write_replace``, unless that is in the file already: then it needs no room. Raises the same."""
    with suppress(OSError):
        if path.read_bytes() == data:
            return
    write_replace(path, [data])


def make_directories(path: Path) -> None:
    """Create ``path`` and its missing parents, accessible to the owner only, durably. Raises StorageError."""
    if path.is_dir():
        return
    make_directories(path.parent)
    make_directory(path)


def make_directory(path: Path) -> None:
    """Have the directory ``path`` in its existing parent, durably, whoever created it. Raises StorageError."""
    try:
        path.mkdir(DIRECTORY_MODE, exist_ok=True)
        _sync_directory(path.parent)
    except FileExistsError as exc:
        raise StorageError(f"{path} is not a directory") from exc
    except OSError as exc:
        raise _write_error(exc, path) from exc


def remove(path: Path) -> None:
    """Remove a file, durably. Raises BlobNotFound, StorageDenied, StorageUnavailable."""
    try:
        path.unlink()
        _sync_directory(path.parent)
    except OSError as exc:
        raise storage_error(exc, f"remove {path}") from exc


def is_temporary(file_name: str) -> bool:
    """Whether a file of this name (no directory) is what a writer of this module leaves when it is killed."""
    return _TEMPORARY.fullmatch(file_name) is not None


class AtomicOutput:
    """A big file written piece by piece: nothing under its name before ``commit``, nothing left if left without.

    ``path`` may be a symbolic link, also to a file that does not exist yet. An existing file is replaced only with
    ``overwrite``, and only a regular file: never a device or directory. The file is accessible to its owner only.
    Entering and ``commit`` raise TargetExists; both and the writing methods raise TargetUnwritable, StorageFull.
    """

    def __init__(self, path: Path, *, overwrite: bool) -> None:
        self._path = Path(os.path.realpath(path))
        self._overwrite = overwrite
        self._temporary = _Temporary(self._path.parent, self._path.name)
        self._committed = False

    def __enter__(self) -> Self:
        self._check_target()
        try:
            self._temporary.__enter__()
        except OSError as exc:
            raise _target_error(exc, self._path) from exc
        return self

    def __exit__(self, *_: object) -> None:
        self._temporary.__exit__()

    @property
    def fd(self) -> int:
        """Descriptor of the temporary file, open for reading and writing. OSErrors of its use are the user's."""
        return self._temporary.fd

    def write_at(self, offset: int, data: Buffer) -> None:
        """Write all of ``data`` at ``offset``; ranges never written read as zeros. Any thread may call this."""
        self.write_all_at(offset, [data])

    def write_all_at(self, offset: int, parts: Sequence[Buffer]) -> None:
        """Write ``parts`` (at most 1024) one behind the other from ``offset``. Any thread may call this."""
        left = deque(memoryview(part).cast("B") for part in parts)
        try:
            while left:
                written = os.pwritev(self.fd, left, offset)
                offset += written
                while left and written >= left[0].nbytes:
                    written -= left.popleft().nbytes
                if written:
                    left[0] = left[0][written:]
        except OSError as exc:
            raise _target_error(exc, self._path) from exc

    def set_size(self, size_bytes: int) -> None:
        """Cut or extend the file, with a hole, to ``size_bytes``."""
        try:
            os.ftruncate(self.fd, size_bytes)
        except OSError as exc:
            raise _target_error(exc, self._path) from exc

    def commit(self) -> None:
        """Make the file durable and visible under its name. Once; nothing may be written afterwards."""
        assert not self._committed
        self._check_target()
        try:
            self._temporary.publish(self._path, replace=self._overwrite)
        except OSError as exc:
            raise _target_error(exc, self._path) from exc
        self._committed = True

    def _check_target(self) -> None:
        try:
            mode = self._path.lstat().st_mode
        except FileNotFoundError:
            return
        except OSError as exc:
            raise _target_error(exc, self._path) from exc
        if not stat.S_ISREG(mode):
            raise TargetUnwritable(f"{self._path} is not a regular file", hint="choose another name")
        if not self._overwrite:
            raise TargetExists(f"{self._path} already exists")


class _Temporary:
    """A new file under a temporary name that is published, or removed on leaving. Raises OSError."""

    def __init__(self, directory: Path, final_name: str) -> None:
        token = SystemRandom().token(8).hex()
        self._path = directory / f".{final_name[:_TEMPORARY_STEM_MAX]}.xbfs-partial-{os.getpid()}-{token}"
        self.fd = -1

    def __enter__(self) -> Self:
        self.fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, FILE_MODE)
        return self

    def __exit__(self, *_: object) -> None:
        # Published or not, the outcome stands: a temporary name that can not be removed is swept later.
        with suppress(OSError):
            os.close(self.fd)
        self.fd = -1
        with suppress(OSError):
            self._path.unlink()

    def publish(self, final: Path, *, replace: bool) -> None:
        os.fsync(self.fd)
        if replace:
            self._path.replace(final)
        else:
            self._publish_new(final)
        _sync_directory(final.parent)

    def _publish_new(self, final: Path) -> None:
        try:
            try:
                final.hardlink_to(self._path)
            except OSError as exc:
                if exc.errno not in _LINK_REFUSED:
                    raise
                _rename_new(self._path, final)
        except FileExistsError:
            # An NFS server whose reply was lost executes the repeated link and finds the first one's.
            if os.path.samestat(final.lstat(), os.fstat(self.fd)):
                return
            # Whoever wrote it may not have come to this yet, and our caller will rely on the file.
            _sync_directory(final.parent)
            raise


def _write(path: Path, parts: Sequence[Buffer], directory: Path, *, replace: bool) -> None:
    try:
        with _Temporary(directory, path.name) as temporary:
            _write_all(temporary.fd, parts)
            temporary.publish(path, replace=replace)
    except OSError as exc:
        raise _write_error(exc, path) from exc


def _write_all(fd: int, parts: Sequence[Buffer]) -> None:
    views = [memoryview(part) for part in parts]
    pending = [view.cast("B") for view in views if view.nbytes]
    first = 0
    while first < len(pending):
        written = os.writev(fd, pending[first : first + _IOV_MAX])
        while first < len(pending) and written >= pending[first].nbytes:
            written -= pending[first].nbytes
            first += 1
        if written:
            pending[first] = pending[first][written:]


def _rename_new(source: Path, target: Path) -> None:
    """Rename unless ``target`` exists, atomically."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.renameat2(_AT_FDCWD, os.fsencode(source), _AT_FDCWD, os.fsencode(target), _RENAME_NOREPLACE) == 0:
        return
    number = ctypes.get_errno()
    if number in {errno.EINVAL, errno.ENOSYS}:
        raise OSError(errno.EOPNOTSUPP, "the file system has neither hard links nor exclusive rename")
    raise OSError(number, os.strerror(number))


def _sync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    except OSError as exc:
        # Some network and user-space file systems know no fsync of a directory and say so: nothing more can be done.
        if exc.errno not in {errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS}:
            raise
    finally:
        os.close(fd)


def _write_error(exc: OSError, path: Path) -> StorageError:
    if exc.errno == errno.ENOENT:
        hint = "is the storage still mounted there?"
        return StorageUnavailable(f"write {path}: its directory or temporary file has gone", hint=hint)
    return storage_error(exc, f"write {path}")


def _target_error(exc: OSError, path: Path) -> StorageError:
    what = f"write {path}: {exc.strerror or exc}"
    match _ERRORS.get(exc.errno or 0):
        case kind if kind is StorageFull:
            return StorageFull(what, hint=_HINTS.get(exc.errno or 0, "free space there, or choose another place"))
        case kind if kind is BlobExists:
            return TargetExists(f"{path} already exists")
        case kind if kind is BlobNotFound:
            return TargetUnwritable(what, hint="create the directory first")
        case _:
            return TargetUnwritable(what, hint="check owner and mode of the directory, or choose another place")
