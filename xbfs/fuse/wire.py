"""The FUSE records that the data plane reads and writes itself; libfuse does all others. Pure.

Layouts and numbers: Linux, include/uapi/linux/fuse.h; everything is in the machine's byte order.
"""

from __future__ import annotations

import struct
from typing import Final

IN_HEADER: Final = struct.Struct("=IIQQIIII")
"""Length, opcode, unique, nodeid, uid, gid, pid, extensions."""
OUT_HEADER: Final = struct.Struct("=IiQ")
"""Length, negative errno or 0, unique."""
READ_IN: Final = struct.Struct("=QQI")
"""File handle, offset, size: what begins fuse_read_in and is all that matters of it."""
LSEEK_IN: Final = struct.Struct("=QQI")
"""File handle, offset, whence."""
LSEEK_OUT: Final = struct.Struct("=Q")
WRITE_IN: Final = struct.Struct("=QQIIQII")
"""File handle, offset, size, flags of the write, lock owner, flags of the file, nothing; the bytes follow."""
WRITE_OUT: Final = struct.Struct("=II")
"""Size, nothing."""
FSYNC_IN: Final = struct.Struct("=QII")
"""File handle, flags, nothing."""
GETXATTR_IN: Final = struct.Struct("=II")
"""Size, nothing; the name follows, with a zero byte."""
FALLOCATE_IN: Final = struct.Struct("=QQQII")
"""File handle, offset, length, mode, nothing."""
ATTR_OUT: Final = struct.Struct("=QIIQQQQQQIIIIIIIIII")
"""Valid for (seconds, nanoseconds), nothing; then fuse_attr: inode, size, blocks, seconds of atime, mtime, ctime,
their nanoseconds, mode, links, owner, group, device, block size, flags."""
OPEN_IN: Final = struct.Struct("=II")
"""Flags of open(2), flags of FUSE's own."""
OPEN_OUT: Final = struct.Struct("=QIi")
"""File handle, flags, number of the file that the kernel reads and writes instead."""

GETATTR: Final = 3
READLINK: Final = 5
OPEN: Final = 14
READ: Final = 15
WRITE: Final = 16
FSYNC: Final = 20
GETXATTR: Final = 22
OPENDIR: Final = 27
INTERRUPT: Final = 36
FALLOCATE: Final = 43
LSEEK: Final = 46

KEPT_LISTING: Final = 1 << 1 | 1 << 3
"""FOPEN_KEEP_CACHE and FOPEN_CACHE_DIR: the kernel keeps what a directory lists, also over its openings."""
PASSED_THROUGH: Final = 1 << 7
"""FOPEN_PASSTHROUGH. Together with FOPEN_KEEP_CACHE the kernel refuses it."""

WRITE_DROPS_PRIVILEGES: Final = 1 << 2
"""FUSE_WRITE_KILL_SUIDGID, of the flags of a write."""
FSYNC_DATA: Final = 1 << 0
"""FUSE_FSYNC_FDATASYNC."""

INIT_AUTO_INVAL_DATA: Final = 1 << 12
INIT_CACHE_SYMLINKS: Final = 1 << 23
INIT_KILLPRIV_V2: Final = 1 << 28
INIT_PASSTHROUGH: Final = 1 << 37
"""FUSE_AUTO_INVAL_DATA and so on, of the flags of INIT's answer; kernels ignore what they do not know."""

REQUEST_MAX: Final = (1 << 20) + 8192
"""Less is refused by read(2): room for a write of libfuse's max_write (1 MiB) with its headers."""

assert IN_HEADER.size == 40
assert OUT_HEADER.size == 16
assert WRITE_IN.size == 40
assert ATTR_OUT.size == 104
assert FALLOCATE_IN.size == 32


def answer(unique: int, size_bytes: int) -> bytes:
    """The header of an answer with ``size_bytes`` of payload."""
    return OUT_HEADER.pack(OUT_HEADER.size + size_bytes, 0, unique)


def refusal(unique: int, errno: int) -> bytes:
    """A whole answer that says why not."""
    return OUT_HEADER.pack(OUT_HEADER.size, -errno, unique)
