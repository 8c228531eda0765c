"""Storage in a directory of this machine, also one mounted from NFS or SMB: blobs are files under their names.

Owns the directory tree below the root and a bounded set of open files; how a file becomes visible and durable is
``files``'s. Any thread and any number of processes may use one root at the same time. Calls block on the disk.

    root/<blob name>     complete blobs, mode 0600 in directories 0700
    root/tmp/            files being written; a killed writer's stay until ``sweep_temporary``

Anything else below the root is foreign: not listed, not read, not removed.
"""

from __future__ import annotations

import os
import stat
from collections import OrderedDict
from contextlib import suppress
from threading import Lock
from typing import TYPE_CHECKING, Final

from xbfs_engine.core.errors import BlobNotFound
from xbfs_engine.storage import files
from xbfs_engine.storage.base import BlobInfo
from xbfs_engine.storage.files import storage_error
from xbfs_engine.storage.names import RESERVED, check_name, check_prefix, check_range, is_name, is_prefix

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from typing_extensions import Buffer

    from xbfs_engine.core.runtime import Clock

OPEN_FILES_MAX: Final = 128
"""Blobs kept open for reading: an eighth of the usual limit of 1024 descriptors, 4 GiB of packs."""

_NS_PER_S: Final = 1_000_000_000


class LocalStorage:
    """Blobs as files below ``root``, which the first ``put`` creates."""

    def __init__(self, root: Path) -> None:
        self._root = root.absolute()
        self._temporary = self._root / RESERVED
        # Directories whose own entry is durable. Adding one twice is harmless, so no lock.
        self._durable: set[Path] = set()
        self._open_files = _OpenFiles()

    def put(self, name: str, parts: Sequence[Buffer]) -> None:
        """Write a new blob; see ``files.write_new``."""
        path = self._path(name)
        self._ensure_directory(self._temporary)
        self._ensure_directory(path.parent)
        files.write_new(path, parts, temporary_in=self._temporary)

    def get(self, name: str) -> bytes:
        """All bytes of a blob."""
        path = self._path(name)
        try:
            file = _OpenFile(path)
            return file.read(name, 0, file.size_bytes)
        except OSError as exc:
            raise storage_error(exc, f"read {path}") from exc

    def read(self, name: str, offset: int, length: int) -> bytes:
        """Exactly ``length`` bytes from ``offset``. Keeps the file open for the next read."""
        path = self._path(name)
        try:
            return self._open_files.get(path).read(name, offset, length)
        except OSError as exc:
            self._open_files.forget(path)  # a stale NFS handle stays stale: the next try opens anew
            raise storage_error(exc, f"read {path}") from exc

    def size(self, name: str) -> int:
        """Size of a blob in bytes."""
        path = self._path(name)
        try:
            status = path.lstat()
        except OSError as exc:
            raise storage_error(exc, f"size of {path}") from exc
        if not stat.S_ISREG(status.st_mode):
            raise BlobNotFound(f"{path} is not a regular file")
        return status.st_size

    def list_blobs(self, prefix: str) -> Iterator[BlobInfo]:
        """Blobs whose name starts with ``prefix``. Blobs put or deleted meanwhile may or may not be among them."""
        return self._walk(check_prefix(prefix))

    def delete(self, name: str) -> None:
        """Remove a blob, durably."""
        path = self._path(name)
        self.size(name)  # a directory of that name is no blob
        try:
            files.remove(path)
        finally:
            self._open_files.forget(path)

    def location(self) -> str:
        """The root directory."""
        return str(self._root)

    def sweep_temporary(self, older_than_s: float, clock: Clock) -> int:
        """Remove what killed writers left in ``tmp``, if last written more than ``older_than_s`` seconds ago.

        Returns how many files were removed. A writer slower than that loses its file and fails with
        StorageUnavailable. Raises StorageError.
        """
        before_ns = clock.now_ns() - int(older_than_s * _NS_PER_S)
        removed = 0
        for name, status in _scan(self._temporary):
            if files.is_temporary(name) and stat.S_ISREG(status.st_mode) and status.st_mtime_ns < before_ns:
                files.remove(self._temporary / name)
                removed += 1
        return removed

    def _path(self, name: str) -> Path:
        return self._root / check_name(name)

    def _ensure_directory(self, directory: Path) -> None:
        if directory in self._durable:
            return
        if directory == self._root:
            files.make_directories(directory)
        else:
            self._ensure_directory(directory.parent)
            files.make_directory(directory)
        self._durable.add(directory)

    def _walk(self, prefix: str) -> Iterator[BlobInfo]:
        """Foreign names are skipped unseen; the depth is bounded by that of a name."""
        for entry_name, status in _scan(self._root / prefix):
            name = prefix + entry_name
            if stat.S_ISDIR(status.st_mode) and is_prefix(name + "/"):
                yield from self._walk(name + "/")
            elif stat.S_ISREG(status.st_mode) and is_name(name):
                yield BlobInfo(name, status.st_size)


class _OpenFile:
    """A blob open for reading. The last reference closes it, so that nobody can close it under a reader."""

    def __init__(self, path: Path) -> None:
        self._fd = -1
        # O_NONBLOCK: a FIFO somebody put there must not hold us up.
        self._fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
        status = os.fstat(self._fd)
        if not stat.S_ISREG(status.st_mode):
            raise BlobNotFound(f"{path} is not a regular file")
        self.size_bytes = status.st_size

    def __del__(self) -> None:
        if self._fd >= 0:
            with suppress(OSError):  # nothing was written
                os.close(self._fd)

    def read(self, name: str, offset: int, length: int) -> bytes:
        """Exactly ``length`` bytes; raises StorageError if the file has less, OSError if it can not be read."""
        check_range(name, self.size_bytes, offset, length)
        pieces: list[bytes] = []
        end = offset + length
        while offset < end:
            piece = os.pread(self._fd, end - offset, offset)
            if not piece:
                check_range(name, os.fstat(self._fd).st_size, offset, end - offset)
            pieces.append(piece)
            offset += len(piece)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)


class _OpenFiles:
    """The blobs read last, kept open: a mount reads thousands of ranges of few packs. Any thread may call it."""

    def __init__(self) -> None:
        self._files: OrderedDict[Path, _OpenFile] = OrderedDict()
        self._forgotten = 0
        self._lock = Lock()

    def get(self, path: Path) -> _OpenFile:
        """The open file of ``path``. Raises OSError, BlobNotFound."""
        with self._lock:
            file = self._files.get(path)
            if file is not None:
                self._files.move_to_end(path)
                return file
            forgotten = self._forgotten
        file = _OpenFile(path)
        with self._lock:
            # Opened before a deletion and kept after it, the file would answer for a blob that is gone.
            if forgotten == self._forgotten:
                self._files[path] = file
                if len(self._files) > OPEN_FILES_MAX:
                    self._files.popitem(last=False)
        return file

    def forget(self, path: Path) -> None:
        """Open ``path`` anew at the next read."""
        with self._lock:
            self._forgotten += 1
            self._files.pop(path, None)


def _scan(directory: Path) -> Iterator[tuple[str, os.stat_result]]:
    """Names and status of a directory's entries, none if there is no such directory. Raises StorageError."""
    try:
        with os.scandir(directory) as entries:
            for entry in entries:
                with suppress(FileNotFoundError):  # removed since
                    yield entry.name, entry.stat(follow_symlinks=False)
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as exc:
        raise storage_error(exc, f"list {directory}") from exc
