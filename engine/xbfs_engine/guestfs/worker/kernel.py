"""System calls that Python 3.11 does not know, by ctypes. Each raises OSError as functions of `os` do."""

from __future__ import annotations

import ctypes
import os
from functools import cache
from typing import Final

_MS_REC: Final = 0x4000
_MS_PRIVATE: Final = 0x40000
_MNT_DETACH: Final = 2
"""Linux uapi/linux/mount.h and mount(2)."""


def prctl(option: int, value: int) -> None:
    """prctl(2) with one number."""
    _checked(_libc().prctl(ctypes.c_int(option), ctypes.c_ulong(value), *(ctypes.c_ulong(0),) * 3))


def unshare(flags: int) -> None:
    """unshare(2)."""
    _checked(_libc().unshare(ctypes.c_int(flags)))


def detach_mounts() -> None:
    """Leave this mount namespace, which must be of this process alone, without any mount: no path leads anywhere."""
    _checked(_libc().mount(None, b"/", None, ctypes.c_ulong(_MS_REC | _MS_PRIVATE), None))
    _checked(_libc().umount2(b"/", ctypes.c_int(_MNT_DETACH)))


def syscall(number: int, *arguments: int | bytes | None) -> int:
    """syscall(2) with numbers and pointers to bytes; what it gives."""
    return _checked(
        _libc().syscall(
            ctypes.c_long(number),
            *(ctypes.c_long(argument) if isinstance(argument, int) else argument for argument in arguments),
        )
    )


@cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _checked(result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result
