"""Mount points: what is mounted where, whether a directory will do, and unmounting from outside.

Owns no state; everything is read from the kernel at each call. Mount points are never touched by ``stat`` where they
may be dead: a killed server's mount answers everything with ENOTCONN.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import shutil
import subprocess
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final

from xbfs_engine.core.errors import (
    FuseMissing,
    MountFailed,
    MountPointInside,
    MountPointInvalid,
    MountPointNotEmpty,
    NotMounted,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

SUBTYPE: Final = "xbfs"
FILESYSTEM: Final = f"fuse.{SUBTYPE}"
FUSERMOUNT: Final = "fusermount3"
_FOLLOW_NO_LINKS: Final = 0x20 | 0x1000 | 0x100 | 0x2 | 0x4
"""MS_REMOUNT, MS_BIND, MS_NOSYMFOLLOW (Linux 5.10), MS_NOSUID, MS_NODEV: include/uapi/linux/mount.h."""
_DEVICE: Final = Path("/dev/fuse")
_MOUNTS: Final = Path("/proc/self/mountinfo")
_UNMOUNT_S: Final = 10.0
_WATCH: Final = 'read _; stat -f "$1" || "$0" -u -z -- "$1"'
"""Reads until the other end of the pipe is closed; asks like ``_is_dead``, as another server may be there already."""
_OCTAL: Final = re.compile(r"\\([0-7]{3})")


def mounts() -> Mapping[str, str]:
    """Mount points and the type of the filesystem on top of each (proc(5), mountinfo)."""
    found: dict[str, str] = {}
    for line in _MOUNTS.read_bytes().decode(errors="surrogateescape").splitlines():
        before, _, after = line.partition(" - ")
        found[_OCTAL.sub(lambda match: chr(int(match[1], 8)), before.split(" ")[4])] = after.split(" ")[0]
    return found


def check_installed() -> None:
    """Raise FuseMissing unless everything a mount needs is there."""
    try:
        import pyfuse3  # noqa: F401 - only whether it can be loaded
    except ImportError as exc:
        raise FuseMissing(f"the Python package pyfuse3 can not be loaded: {exc}") from exc
    if not os.access(_DEVICE, os.R_OK | os.W_OK):
        raise FuseMissing(f"{_DEVICE} is not there or may not be opened")
    if shutil.which(FUSERMOUNT) is None:
        raise FuseMissing(f"the program {FUSERMOUNT} is not installed")


def prepare(directory: Path, repository: str) -> Path:
    """The absolute path of a directory that can be mounted on; a dead mount there is taken away first.

    ``repository``: where the storage is. Raises MountPointInvalid, MountPointNotEmpty, MountPointInside, MountFailed.
    """
    path = resolved(directory)
    if mounts().get(str(path)) == FILESYSTEM and _is_dead(path):
        _fusermount(path, lazy=True)
    try:
        used = next(path.iterdir(), None)
    except OSError as exc:
        raise MountPointInvalid(f"{path} can not be used: {exc.strerror}") from exc
    if str(path) in mounts():
        raise MountPointNotEmpty(f"something is mounted on {path} already", hint=f"`xbfs umount {path}` first")
    if used is not None:
        raise MountPointNotEmpty(f"{path} is not empty: it holds {used.name!r}")
    _check_outside(path, repository)
    return path


def resolved(directory: Path) -> Path:
    """The absolute path, links resolved in all but the last component: that one may be a dead mount."""
    path = Path(os.path.normpath(directory.absolute()))
    try:
        parent = path.parent.resolve(strict=True)
    except (OSError, RuntimeError) as exc:
        raise MountPointInvalid(f"{path} can not be reached: {exc}") from exc
    path = parent / path.name
    return path.resolve() if os.path.islink(path) else path  # noqa: PTH114 - is_symlink raises on a dead mount


def umount(directory: Path) -> None:
    """Unmount what ``xbfs mount`` mounted. Raises NotMounted, MountPointInvalid, MountFailed (busy, not permitted)."""
    path = resolved(directory)
    if mounts().get(str(path)) != FILESYSTEM:
        raise NotMounted(f"no restore points are mounted on {path}")
    _fusermount(path, lazy=_is_dead(path))


def let_go(path: Path) -> None:
    """Unmount what this process serves, however busy it is; nothing if somebody else did already."""
    if mounts().get(str(path)) == FILESYSTEM:
        with suppress(MountFailed):
            _fusermount(path, lazy=True)


def follow_no_links(path: Path) -> None:
    """Have no symbolic link in the mount on ``path`` followed, for whoever; only root can. Raises MountFailed."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(None, os.fsencode(path), None, ctypes.c_ulong(_FOLLOW_NO_LINKS), None):
        why = os.strerror(ctypes.get_errno())
        raise MountFailed(f"links in {path} can not be kept from being followed: {why}", hint="Linux 5.10 can do it")


@contextmanager
def unmounted_after_death(path: Path) -> Iterator[None]:
    """While inside, a small process waits for this one to die and then takes the dead mount away.

    What libfuse's ``auto_unmount`` does for root only: for other users its helper (3.14) is refused by their mount.
    """
    reader, writer = os.pipe()
    nothing = subprocess.DEVNULL
    try:
        watcher = subprocess.Popen(
            ["sh", "-c", _WATCH, FUSERMOUNT, str(path)],
            stdin=reader,
            stdout=nothing,
            stderr=nothing,
            cwd="/",
            start_new_session=True,  # Ctrl-C is not for it
        )
    finally:
        os.close(reader)
    try:
        yield
    finally:
        os.close(writer)
        with suppress(subprocess.TimeoutExpired):
            watcher.wait(_UNMOUNT_S)


def _is_dead(path: Path) -> bool:
    try:
        os.statvfs(path)  # unlike stat never answered from the kernel's cache
    except OSError as exc:
        # ECONNABORTED: the server died while we asked.
        return exc.errno in (errno.ENOTCONN, errno.ECONNABORTED)
    return False


def _check_outside(path: Path, repository: str) -> None:
    place = Path(repository)
    if not place.is_absolute():
        return  # no directory of this machine
    place = place.resolve()
    if path == place or place in path.parents or path in place.parents:
        raise MountPointInside(f"mount point {path} and repository {place} lie inside each other")


def _fusermount(path: Path, *, lazy: bool) -> None:
    command = [FUSERMOUNT, "-u", *(["-z"] if lazy else []), "--", str(path)]
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_UNMOUNT_S, check=False
        )
    except FileNotFoundError as exc:
        raise FuseMissing(f"the program {FUSERMOUNT} is not installed") from exc
    except subprocess.TimeoutExpired as exc:
        raise MountFailed(f"unmounting {path} takes longer than {_UNMOUNT_S:.0f} s") from exc
    if done.returncode:
        raise MountFailed(
            f"{path} can not be unmounted: {done.stderr.strip() or f'{FUSERMOUNT} ended with {done.returncode}'}",
            hint=f"close what uses it (`fuser -m {path}` shows who), then try again",
        )
