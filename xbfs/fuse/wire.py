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
OPEN_OUT: Final = struct.Struct("=QII")
"""File handle, flags, nothing."""

READLINK: Final = 5
READ: Final = 15
OPENDIR: Final = 27
INTERRUPT: Final = 36
LSEEK: Final = 46

KEPT_LISTING: Final = 1 << 1 | 1 << 3
"""FOPEN_KEEP_CACHE and FOPEN_CACHE_DIR: the kernel keeps what a directory lists, also over its openings."""

REQUEST_MAX: Final = (1 << 20) + 8192
"""Less is refused by read(2): room for a write of libfuse's max_write (1 MiB) with its headers, though none comes."""

assert IN_HEADER.size == 40
assert OUT_HEADER.size == 16


def answer(unique: int, size_bytes: int) -> bytes:
    """The header of an answer with ``size_bytes`` of payload."""
    return OUT_HEADER.pack(OUT_HEADER.size + size_bytes, 0, unique)


def refusal(unique: int, errno: int) -> bytes:
    """A whole answer that says why not."""
    return OUT_HEADER.pack(OUT_HEADER.size, -errno, unique)
