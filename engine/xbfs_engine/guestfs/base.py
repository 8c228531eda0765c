"""The seam that every reader of a guest filesystem implements, and the records that pass over it.

A reader is made over a BlockSource by its own ``open_…`` function, which raises GuestDamaged or GuestUnsupported when
the volume as a whole can not be read. Readers do no I/O but ``read_at``, know no clock and start no threads; they may
keep bounded caches, so one reader serves one thread at a time.

Every method raises only XbfsError: GuestDamaged, GuestUnsupported, GuestWrongKind, or what the source raises. A call
is bounded by what it returns, not by what the image claims: sizes are checked before anything is allocated, and
no call walks more than one directory, one file's extent map or one file's attributes.
"""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING, Final, NamedTuple, NewType, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterator

NodeId = NewType("NodeId", bytes)
"""Names a file of one volume: opaque, at most NODE_ID_MAX bytes, the same at every opening of the same volume.

Two names of one file (hardlinks) have the same id."""

NODE_ID_MAX: Final = 32

NAME_BYTES_MAX: Final = 255
"""Longest name in bytes that Linux takes (limits.h NAME_MAX). Names longer than this in UTF-8 (NTFS, exFAT: up to 765)
are for the adapter to make fit."""

READ_BYTES_MAX: Final = 1 << 20
"""Longest single read."""

XATTR_BYTES_MAX: Final = 64 << 10
"""Longest value of an attribute that Linux takes (limits.h XATTR_SIZE_MAX)."""


class VolumeState(Enum):
    """How far what is shown is what the guest would see."""

    CLEAN = "clean"
    """The guest unmounted it, or nothing was pending."""
    REPLAYED = "replayed"
    """It was mounted; its journal has been replayed in memory, as the guest would at its next mount."""
    DIRTY = "dirty"
    """It was mounted; changes that only its journal holds are missing."""
    LOCKED = "locked"
    """Encrypted, and no key was given."""
    UNSUPPORTED = "unsupported"
    """It is not read here."""


class VolumeInfo(NamedTuple):
    """What a volume says about itself."""

    type: str
    """As ``blkid`` names it: ext4, xfs, btrfs, ntfs, vfat, exfat."""
    label: str
    """Empty if there is none; bytes that are no UTF-8 are replaced."""
    uuid: str
    """As ``blkid`` writes it; empty if there is none."""
    size_bytes: int
    """What the filesystem claims; the source may be larger."""
    state: VolumeState
    reason: str
    """Why it is not clean, in a sentence; empty if it is clean."""


class Kind(Enum):
    """What a node is; the letters are those of ``find -type``."""

    FILE = "f"
    DIRECTORY = "d"
    SYMLINK = "l"
    BLOCK_DEVICE = "b"
    CHARACTER_DEVICE = "c"
    FIFO = "p"
    SOCKET = "s"
    UNKNOWN = "?"
    """Only in directory entries, where the filesystem does not store it there: ``stat`` tells."""


class DirEntry(NamedTuple):
    """One name in a directory: 1..NAME_BYTES_MAX bytes without NUL and slash, never ``.`` or ``..``."""

    name: bytes
    node: NodeId
    kind: Kind
    cookie: int
    """Where the listing goes on after this entry: 0 < cookie < 2^63; the same at every opening."""


class NodeStat(NamedTuple):
    """Metadata of a node. Times are ns since 1970 and may be negative; a time the filesystem does not store is None."""

    inode: int
    """The filesystem's own number, 0 < inode < 2^64."""
    kind: Kind
    mode: int
    """Permission bits with suid, sgid and sticky: 0..0o7777; the type is ``kind``."""
    uid: int
    gid: int
    nlink: int
    size_bytes: int
    allocated_bytes: int
    """What it occupies on the disk: 512 times st_blocks."""
    mtime_ns: int
    atime_ns: int | None
    ctime_ns: int | None
    btime_ns: int | None
    rdev_major: int
    rdev_minor: int


class FileExtent(NamedTuple):
    """A part of a file; a hole reads as zeros and nothing is stored for it."""

    offset: int
    length: int
    is_data: bool


class Xattr(NamedTuple):
    """An extended attribute as Linux shows it: name with its prefix (``user.``, ``security.`` …), POSIX ACLs as
    ``system.posix_acl_access`` and ``system.posix_acl_default`` in the kernel's version 2 layout (guestfs.acl)."""

    name: bytes
    value: bytes


class GuestFilesystem(Protocol):
    """A volume opened for reading. Nodes are named by ids only: nothing is open, nothing is to be closed."""

    @property
    def info(self) -> VolumeInfo:
        """What the volume is, and how far it can be trusted."""
        ...

    @property
    def root(self) -> NodeId:
        """The topmost directory."""
        ...

    def lookup(self, node: NodeId, name: bytes) -> DirEntry | None:
        """The entry of that exact name in a directory, or None; ``.`` and ``..`` are never found."""
        ...

    def list(self, node: NodeId, cookie: int = 0) -> Iterator[DirEntry]:
        """Entries of a directory in the filesystem's order, from the start or after the entry that had ``cookie``.

        Streamed: memory does not grow with the directory. Every name comes once. When a part of the directory can not
        be read, the error comes after the entries before it.
        """
        ...

    def stat(self, node: NodeId) -> NodeStat:
        """Metadata, without reading any content."""
        ...

    def read(self, node: NodeId, offset: int, length: int) -> bytes:
        """Content of a file from ``offset``: ``length`` bytes (0..READ_BYTES_MAX), fewer only at its end.

        Holes and what was allocated but never written read as zeros; what can not be read raises, and is never zeros.
        """
        ...

    def extents(self, node: NodeId, offset: int = 0) -> Iterator[FileExtent]:
        """A file's data and holes from ``offset`` up to its size, in order without gaps; the first may begin before."""
        ...

    def readlink(self, node: NodeId) -> bytes:
        """The target exactly as stored."""
        ...

    def xattrs(self, node: NodeId) -> Iterator[Xattr]:
        """All extended attributes; values are up to XATTR_BYTES_MAX bytes each, so they are streamed."""
        ...
