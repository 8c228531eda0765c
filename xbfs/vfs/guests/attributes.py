"""What ``stat`` shows of guests' files. Pure."""

from __future__ import annotations

import os
import stat
from enum import Enum
from typing import TYPE_CHECKING, Final, NamedTuple

from xbfs_engine.guestfs.base import Kind

if TYPE_CHECKING:
    from xbfs_engine.guestfs.base import NodeStat

_BLOCK: Final = 512
_TYPES: Final = {
    Kind.FILE: stat.S_IFREG,
    Kind.DIRECTORY: stat.S_IFDIR,
    Kind.SYMLINK: stat.S_IFLNK,
    Kind.BLOCK_DEVICE: stat.S_IFBLK,
    Kind.CHARACTER_DEVICE: stat.S_IFCHR,
    Kind.FIFO: stat.S_IFIFO,
    Kind.SOCKET: stat.S_IFSOCK,
    Kind.UNKNOWN: stat.S_IFREG,
}
_DEVICES: Final = (Kind.BLOCK_DEVICE, Kind.CHARACTER_DEVICE)
_MAJOR_MAX, _MINOR_MAX = (1 << 12) - 1, (1 << 20) - 1
"""Linux: include/linux/kdev_t.h, MKDEV; FUSE carries no more."""
_NLINK_MAX: Final = (1 << 32) - 1
OWNERLESS: Final = frozenset(("ntfs", "vfat", "exfat"))
"""Filesystems that know no owners in the sense of Unix."""


class Ownership(Enum):
    """Whose files are."""

    GUEST = "guest"
    """Owners, groups and modes as the guest has them, as numbers."""
    OPERATOR = "operator"
    """All belong to whoever mounted, and he may read all."""


class Lasting(Enum):
    """How long attributes stay true."""

    FOR_EVER = 0
    """As long as the restore point exists."""
    BRIEFLY = 1
    """A key may change it."""
    UNKNOWN = 2
    """They are a guess: asking costs more than a listing may."""


class GuestAttributes(NamedTuple):
    """Fields of stat(2); ``mode`` with the type, ``blocks`` of 512 bytes."""

    inode: int
    mode: int
    nlink: int
    uid: int
    gid: int
    rdev: int
    size_bytes: int
    blocks: int
    mtime_ns: int
    atime_ns: int
    ctime_ns: int
    lasting: Lasting


class Appearance:
    """How guests' files look to this mount's user."""

    def __init__(self, ownership: Ownership | None, *, for_others: bool) -> None:
        self._uid, self._gid = os.getuid(), os.getgid()
        default = Ownership.OPERATOR if self._uid else Ownership.GUEST
        self.ownership = ownership or default
        self._ours_directory = 0o555 if for_others else 0o500
        self._ours_file = 0o444 if for_others else 0o400

    def of(self, inode: int, status: NodeStat, *, ownerless: bool) -> GuestAttributes:
        """A file of a guest; ``ownerless``: its filesystem knows no owners."""
        mode, uid, gid = status.mode, status.uid, status.gid
        if ownerless or self.ownership is Ownership.OPERATOR:
            mode |= 0o500 if status.kind is Kind.DIRECTORY else 0o400
            uid, gid = self._uid, self._gid
        mtime_ns = status.mtime_ns
        rdev = 0
        if status.kind in _DEVICES:
            # Numbers beyond what Linux has are of no device: they had better be none than another one.
            known = status.rdev_major <= _MAJOR_MAX and status.rdev_minor <= _MINOR_MAX
            rdev = os.makedev(status.rdev_major, status.rdev_minor) if known else 0
        return GuestAttributes(
            inode,
            _TYPES[status.kind] | mode & 0o7777,
            min(status.nlink, _NLINK_MAX),
            uid,
            gid,
            rdev,
            status.size_bytes,
            -(-status.allocated_bytes // _BLOCK),
            mtime_ns,
            mtime_ns if status.atime_ns is None else status.atime_ns,
            mtime_ns if status.ctime_ns is None else status.ctime_ns,
            Lasting.FOR_EVER,
        )

    def unknown(self, inode: int, kind: Kind, time_ns: int) -> GuestAttributes:
        """A guess at something that was not, or can not be, looked at."""
        ours = self._ours_directory if kind is Kind.DIRECTORY else self._ours_file
        return self._ours(inode, _TYPES[kind] | ours, 0, time_ns, Lasting.UNKNOWN)

    def text(self, inode: int, size_bytes: int, time_ns: int, *, final: bool) -> GuestAttributes:
        """A small file of our own."""
        lasting = Lasting.FOR_EVER if final else Lasting.BRIEFLY
        return self._ours(inode, stat.S_IFREG | self._ours_file, size_bytes, time_ns, lasting)

    def _ours(self, inode: int, mode: int, size_bytes: int, time_ns: int, lasting: Lasting) -> GuestAttributes:
        blocks = -(-size_bytes // _BLOCK)
        return GuestAttributes(
            inode, mode, 1, self._uid, self._gid, 0, size_bytes, blocks, time_ns, time_ns, time_ns, lasting
        )
