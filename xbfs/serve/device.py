"""Gives a mount that is made anew the device number that it had, so that NFS clients' file handles stay valid.

nfs-ganesha puts the device number of what it exports into every handle, and there is no other way to tell it which
file system is meant: a FUSE mount has no UUID, and statfs(2) of it no identifier. Such mounts get the lowest number
that is free. So, while the mount is made, file systems that nobody sees take all lower ones. Once, when there is no
number to keep, a high one is taken: what else is mounted meanwhile takes low ones. Linux 5.2, root. Keeps no state.
"""

from __future__ import annotations

import ctypes
import os
import time
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final

from xbfs_engine.core.errors import StorageError
from xbfs_engine.core.log import Logger
from xbfs_engine.storage.files import write_replace

if TYPE_CHECKING:
    from collections.abc import Iterator

_FSOPEN, _FSCONFIG, _FSMOUNT = 430, 431, 432
"""System calls, the same on all architectures: include/uapi/asm-generic/unistd.h."""
_CLOSE_ON_EXEC: Final = 1
_CREATE: Final = 6
"""FSOPEN_CLOEXEC, FSMOUNT_CLOEXEC; FSCONFIG_CMD_CREATE: include/uapi/linux/mount.h."""
_APART: Final = 256
"""How many lower numbers others find free; below the 1024 descriptors that a process may have open."""

_FREED_S: Final = 2.0
"""What a mount of a server that died gets to go: its last clients are being killed."""
_POLL_S: Final = 0.05

_log = Logger("xbfs.serve")


@contextmanager
def same_device(kept: Path, directory: Path) -> Iterator[None]:
    """What is mounted on ``directory`` inside ``with`` has the device number in the file ``kept``, made if need be.

    Does what it can: without rights, or if the number is taken, handles of before are stale, which is logged. May block
    for two seconds.
    """
    with ExitStack() as placeholders:
        wanted = _read(kept)
        try:
            until_s = time.monotonic() + _FREED_S
            while not _take_lower(placeholders, wanted) and time.monotonic() < until_s:
                time.sleep(_POLL_S)
        except OSError as exc:
            _log.info("device_numbers_can_not_be_kept", problem=str(exc))
        yield
    got = _mounted(directory)
    if got is None or got == wanted:
        return
    if wanted is not None:
        _log.warning("nfs_clients_have_to_mount_again", directory=str(directory), was=wanted, device=got)
    try:
        write_replace(kept, [str(got).encode()])
    except StorageError as exc:
        _log.warning("nfs_clients_will_have_to_mount_again", directory=str(directory), problem=str(exc))


def _read(kept: Path) -> int | None:
    with suppress(OSError, ValueError):
        return int(kept.read_text())
    return None


def _take_lower(placeholders: ExitStack, wanted: int | None) -> bool:
    """Leave ``wanted`` as the lowest free number, or some high one; whether it is. Raises OSError."""
    taken = 0
    while True:
        descriptor = _file_system()
        minor = os.minor(os.fstat(descriptor).st_dev)
        if (wanted is None and taken == _APART) or (wanted is not None and minor >= wanted):
            os.close(descriptor)
            return wanted is None or minor == wanted
        placeholders.callback(os.close, descriptor)
        taken += 1


def _file_system() -> int:
    """A descriptor of an empty file system that is mounted nowhere, and gone when it is closed. Raises OSError."""
    context = _call(_FSOPEN, b"tmpfs", _CLOSE_ON_EXEC)
    try:
        _call(_FSCONFIG, context, _CREATE, None, None, 0)
        return _call(_FSMOUNT, context, _CLOSE_ON_EXEC, 0)
    finally:
        os.close(context)


def _call(number: int, *arguments: int | bytes | None) -> int:
    result: int = ctypes.CDLL(None, use_errno=True).syscall(number, *arguments)
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def _mounted(directory: Path) -> int | None:
    """The minor number of the mount on ``directory``, by the kernel's table (proc(5), mountinfo): asks no server."""
    found = None
    for line in Path("/proc/self/mountinfo").read_bytes().splitlines():
        _, _, device, _, place, *_ = line.split()
        if place.decode("unicode_escape").encode("latin-1") == os.fsencode(directory):
            found = int(device.split(b":")[1])
    return found
