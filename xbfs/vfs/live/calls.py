"""System calls that Python's ``os`` does not have, and the error of a request that is refused. Keeps no state."""

from __future__ import annotations

import ctypes
import errno
import os
import zlib
from typing import Final

PUNCH_HOLE: Final = 0x02
KEEP_SIZE: Final = 0x01
ZERO_RANGE: Final = 0x10
"""Modes of fallocate(2), include/uapi/linux/falloc.h."""

_AT_EMPTY_PATH: Final = 0x1000
_HANDLE_BYTES_MAX: Final = 128  # MAX_HANDLE_SZ, include/linux/exportfs.h


class _FileHandle(ctypes.Structure):
    _fields_ = (
        ("handle_bytes", ctypes.c_uint),
        ("handle_type", ctypes.c_int),
        ("handle", ctypes.c_char * _HANDLE_BYTES_MAX),
    )


_libc = ctypes.CDLL(None, use_errno=True)
_fallocate = _libc.fallocate
_fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
_renameat2 = _libc.renameat2
_renameat2.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint)
_name_to_handle_at = _libc.name_to_handle_at
_name_to_handle_at.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int)


class Refused(OSError):
    """A request of a client that gets an errno: nothing is wrong with us."""

    errno: int


def refused(code: int) -> Refused:
    """The error with the usual words."""
    return Refused(code, os.strerror(code))


def path_of(fd: int) -> str:
    """A path to the very file of a descriptor, also one of O_PATH, whatever it is called by now (proc(5))."""
    return f"/proc/self/fd/{fd}"


def generation_of(fd: int) -> int:
    """32 bits that stay with a file and change when its inode number is used again: a sum over its handle.

    1 for all files where the file system has no handles (open_by_handle_at(2)).
    """
    handle = _FileHandle(handle_bytes=_HANDLE_BYTES_MAX)
    mount_id = ctypes.c_int()
    if _name_to_handle_at(fd, b"", ctypes.byref(handle), ctypes.byref(mount_id), _AT_EMPTY_PATH):
        return 1
    start = _FileHandle.handle.offset
    return zlib.crc32(bytes(handle)[start : start + handle.handle_bytes])


def rename(directory: int, name: bytes, new_directory: int, new_name: bytes, flags: int) -> None:
    """renameat2(2). Raises OSError."""
    if _renameat2(directory, name, new_directory, new_name, flags):
        raise _failure()


def allocate(fd: int, mode: int, offset: int, length: int) -> None:
    """fallocate(2), not glibc's emulation of it. Raises OSError."""
    if _fallocate(fd, mode, offset, length):
        raise _failure()


def _failure() -> OSError:
    number = ctypes.get_errno() or errno.EIO
    return OSError(number, os.strerror(number))
