"""An NFS client in user space: libnfs (Debian's libnfs13) by ctypes, for the simulator's SM and for tests of exports.

One client is one connection and one mount; one thread at a time uses it. Errors are OSErrors with the server's errno.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import os
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, NamedTuple, Self

if TYPE_CHECKING:
    from types import TracebackType

_NAME = ctypes.util.find_library("nfs")


_PIECE = 1 << 20
_PIECE_V4 = 2048
"""Bytes of one write: libnfs 4.0 encodes calls of NFSv4 into 4 KiB."""


class _Url(ctypes.Structure):
    _fields_ = (("server", ctypes.c_char_p), ("path", ctypes.c_char_p), ("file", ctypes.c_char_p))


class _Stat(ctypes.Structure):
    _fields_ = tuple(
        (name, ctypes.c_uint64)
        for name in (
            *("dev", "ino", "mode", "nlink", "uid", "gid", "rdev", "size", "blksize", "blocks"),
            *("atime", "mtime", "ctime", "atime_nsec", "mtime_nsec", "ctime_nsec", "used"),
        )
    )


class _Entry(ctypes.Structure):
    """The beginning of struct nfsdirent."""


_Entry._fields_ = (("next", ctypes.POINTER(_Entry)), ("name", ctypes.c_char_p), ("inode", ctypes.c_uint64))


class _Handle(ctypes.Structure):
    """struct nfs_fh of libnfs 4."""

    _fields_ = (("size", ctypes.c_int), ("bytes", ctypes.POINTER(ctypes.c_char)))


class _StatVfs(ctypes.Structure):
    """struct statvfs of x86_64."""

    _fields_ = (
        *(
            (name, ctypes.c_ulong)
            for name in "bsize frsize blocks bfree bavail files ffree favail fsid flag namemax".split()  # noqa: SIM905 - as a header has them
        ),
        ("spare", ctypes.c_int * 6),
    )


class Attributes(NamedTuple):
    """Of a file. ``blocks`` of 512 bytes; ``mtime_ns`` since 1970."""

    inode: int
    mode: int
    nlink: int
    uid: int
    size: int
    blocks: int
    mtime_ns: int


class Room(NamedTuple):
    """Of the file system, in bytes."""

    total: int
    available: int


def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(_NAME)
    library.nfs_init_context.restype = ctypes.c_void_p
    library.nfs_get_error.restype = ctypes.c_char_p
    library.nfs_readdir.restype = ctypes.POINTER(_Entry)
    library.nfs_parse_url_dir.restype = ctypes.POINTER(_Url)
    library.nfs_get_fh.restype = ctypes.POINTER(_Handle)
    return library


class _Closing(ABC):
    """What is closed when its context is left."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @abstractmethod
    def close(self) -> None:
        """Let go of it."""


class NfsClient(_Closing):
    """A mount of ``nfs://server/path``, by NFS ``version`` 3 or 4. Ports are asked of rpcbind if they are 0.

    ``timeout_s``: for one call; a lost connection is made again and the call sent again, as by a kernel's mount.
    """

    def __init__(
        self, server: str, path: str, *, version: int = 3, port: int = 0, mount_port: int = 0, timeout_s: float = 25
    ) -> None:
        self._library = _library()
        self.piece = _PIECE if version == 3 else _PIECE_V4
        self._context = ctypes.c_void_p(self._library.nfs_init_context())
        ports = f"nfsport={port}" if port else ""
        ports += f"&mountport={mount_port}" if mount_port else ""
        url = self._library.nfs_parse_url_dir(
            self._context, f"nfs://{server}{path}?version={version}&uid=0&gid=0&{ports}".rstrip("&").encode()
        )
        try:
            self._check(0 if url else -22)
            self._library.nfs_set_timeout(self._context, int(timeout_s * 1000))
            self._library.nfs_set_autoreconnect(self._context, -1)
            self._check(self._library.nfs_mount(self._context, url.contents.server, url.contents.path))
        except OSError:
            self.close()
            raise
        finally:
            if url:
                self._library.nfs_destroy_url(url)

    def close(self) -> None:
        """Leave; open files are forgotten."""
        if self._context:
            self._library.nfs_destroy_context(self._context)
            self._context = ctypes.c_void_p(None)

    def open(self, path: str, flags: int = os.O_RDWR, mode: int = 0o644) -> NfsFile:
        """As open(2), with O_CREAT, O_EXCL, O_TRUNC; O_SYNC: writes are stable."""
        handle = ctypes.c_void_p()
        reference = ctypes.byref(handle)
        if flags & os.O_CREAT and (flags & os.O_EXCL or not self.exists(path)):
            self._check(self._library.nfs_open2(self._context, path.encode(), flags, mode, reference), path)
        else:  # libnfs's NFSv4 takes O_CREAT for O_CREAT | O_EXCL
            self._check(self._library.nfs_open(self._context, path.encode(), flags & ~os.O_CREAT, reference), path)
        return NfsFile(self, handle)

    def write_file(self, path: str, data: bytes) -> None:
        """Make or replace a small file."""
        with self.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC) as file:
            file.write(0, data)

    def read_file(self, path: str) -> bytes:
        """All of a small file."""
        with self.open(path, os.O_RDONLY) as file:
            return file.read(0, file.attributes().size)

    def attributes(self, path: str) -> Attributes:
        """As lstat(2)."""
        found = _Stat()
        self._check(self._library.nfs_lstat64(self._context, path.encode(), ctypes.byref(found)), path)
        return _attributes(found)

    def exists(self, path: str) -> bool:
        """Whether there is such a name."""
        try:
            self.attributes(path)
        except FileNotFoundError:
            return False
        return True

    def room(self, path: str = "/") -> Room:
        """As df shows it."""
        found = _StatVfs()
        self._check(self._library.nfs_statvfs(self._context, path.encode(), ctypes.byref(found)), path)
        return Room(found.frsize * found.blocks, found.frsize * found.bavail)

    def listing(self, path: str = "/") -> dict[str, int]:
        """The names in a directory, but for . and .., with inode numbers."""
        directory = ctypes.c_void_p()
        self._check(self._library.nfs_opendir(self._context, path.encode(), ctypes.byref(directory)), path)
        try:
            names = {}
            while entry := self._library.nfs_readdir(self._context, directory):
                names[entry.contents.name.decode()] = entry.contents.inode
        finally:
            self._library.nfs_closedir(self._context, directory)
        return {name: inode for name, inode in names.items() if name not in {".", ".."}}

    def link(self, old: str, new: str) -> None:
        """As link(2)."""
        self._check(self._library.nfs_link(self._context, old.encode(), new.encode()), new)

    def rename(self, old: str, new: str) -> None:
        """As rename(2): what was there is replaced."""
        self._check(self._library.nfs_rename(self._context, old.encode(), new.encode()), new)

    def symlink(self, target: str, path: str) -> None:
        """As symlink(2)."""
        self._check(self._library.nfs_symlink(self._context, target.encode(), path.encode()), path)

    def unlink(self, path: str) -> None:
        """As unlink(2)."""
        self._check(self._library.nfs_unlink(self._context, path.encode()), path)

    def truncate(self, path: str, size: int) -> None:
        """As truncate(2)."""
        self._check(self._library.nfs_truncate(self._context, path.encode(), ctypes.c_uint64(size)), path)

    def chmod(self, path: str, mode: int) -> None:
        """As chmod(2)."""
        self._check(self._library.nfs_chmod(self._context, path.encode(), mode), path)

    def make_directory(self, path: str) -> None:
        """As mkdir(2)."""
        self._check(self._library.nfs_mkdir(self._context, path.encode()), path)

    def remove_directory(self, path: str) -> None:
        """As rmdir(2)."""
        self._check(self._library.nfs_rmdir(self._context, path.encode()), path)

    def _check(self, result: int, path: str = "") -> int:
        if result < 0:
            text = (self._library.nfs_get_error(self._context) or b"").decode(errors="replace")
            raise OSError(-result, text or os.strerror(-result), path)
        return result


class NfsFile(_Closing):
    """An open file of a client: the server's handle is kept, over restarts of the server."""

    def __init__(self, client: NfsClient, handle: ctypes.c_void_p) -> None:
        self._client = client
        self._library, self._context, self._file = client._library, client._context, handle

    def close(self) -> None:
        """Commit what was written, and close."""
        if self._file:
            file, self._file = self._file, ctypes.c_void_p(None)
            self._client._check(self._library.nfs_close(self._context, file))

    def read(self, offset: int, size: int) -> bytes:
        """Up to ``size`` bytes; fewer at the end."""
        buffer = ctypes.create_string_buffer(size)
        arguments = (ctypes.c_uint64(offset), ctypes.c_uint64(size), buffer)
        got = self._client._check(self._library.nfs_pread(self._context, self._file, *arguments))
        return buffer.raw[:got]

    def write(self, offset: int, data: bytes) -> None:
        """All of ``data``; unstable until ``sync`` unless opened with O_SYNC."""
        at = 0
        while at < len(data):
            piece = data[at : at + self._client.piece]
            arguments = (ctypes.c_uint64(offset + at), ctypes.c_uint64(len(piece)), piece)
            at += self._client._check(self._library.nfs_pwrite(self._context, self._file, *arguments))

    def sync(self) -> None:
        """COMMIT."""
        self._client._check(self._library.nfs_fsync(self._context, self._file))

    def truncate(self, size: int) -> None:
        """As ftruncate(2)."""
        self._client._check(self._library.nfs_ftruncate(self._context, self._file, ctypes.c_uint64(size)))

    def attributes(self) -> Attributes:
        """As fstat(2)."""
        found = _Stat()
        self._client._check(self._library.nfs_fstat64(self._context, self._file, ctypes.byref(found)))
        return _attributes(found)

    def handle(self) -> bytes:
        """The server's file handle, opaque."""
        found = self._library.nfs_get_fh(self._file).contents
        return ctypes.string_at(found.bytes, found.size)


def _attributes(found: _Stat) -> Attributes:
    return Attributes(
        found.ino,
        found.mode,
        found.nlink,
        found.uid,
        found.size,
        found.blocks,
        found.mtime * 1_000_000_000 + found.mtime_nsec,
    )
