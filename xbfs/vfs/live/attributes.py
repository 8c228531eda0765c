"""What stat(2) tells of a file in the live mount, and which inode numbers are whose. Pure."""

from __future__ import annotations

import os
from typing import Final, NamedTuple

ROOT: Final = 1
"""The inode number of the mount's root (FUSE_ROOT_ID, include/uapi/linux/fuse.h)."""
OWN: Final = 1 << 62
"""Numbers from here on are no backing file's. Below 2^63: some programs take them for signed."""


class Attributes(NamedTuple):
    """``generation`` tells apart files that have one inode number one after the other."""

    inode: int
    generation: int
    mode: int
    nlink: int
    uid: int
    gid: int
    rdev: int
    size_bytes: int
    blocks: int
    atime_ns: int
    mtime_ns: int
    ctime_ns: int


def backed(status: os.stat_result, generation: int) -> Attributes:
    """A file of the backing file system."""
    return Attributes(
        status.st_ino,
        generation,
        status.st_mode,
        status.st_nlink,
        status.st_uid,
        status.st_gid,
        status.st_rdev,
        status.st_size,
        status.st_blocks,
        status.st_atime_ns,
        status.st_mtime_ns,
        status.st_ctime_ns,
    )


def made_up(inode: int, mode: int, size_bytes: int, now_ns: int) -> Attributes:
    """A file that only this mount has, of whoever runs it."""
    blocks = -(-size_bytes // 512)
    return Attributes(inode, 1, mode, 1, os.getuid(), os.getgid(), 0, size_bytes, blocks, now_ns, now_ns, now_ns)
