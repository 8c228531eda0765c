"""The seam to a restore point's guest as a whole: its volumes, what is in them, and how the guest puts them together.

Who reads guests (the mount, `get`, the file index) knows only `Guest`. Behind it the readers run in a sandboxed
process of their own (`guestfs.worker`), or in this one (`guestfs.reading`), which is for tests and for that process.

Every method blocks, raises only XbfsError, and is bounded by what it returns.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence

    from xbfs_engine.guestfs.base import DirEntry, FileExtent, NodeId, NodeStat, VolumeInfo, Xattr
    from xbfs_engine.guestfs.volumes import VolumeStatus

PAGE_ENTRIES_MAX: Final = 1024
"""Entries or extents in one answer."""

XATTRS_MAX: Final = 1024
"""Attributes of one file that are looked at."""
XATTRS_BYTES_MAX: Final = 8 << 20
"""Names and values of one file's attributes together; the kernel lists at most 64 KiB of names."""


class VolumeRow(NamedTuple):
    """A volume as the search found it; what each field means is said by `volumes.Volume`."""

    name: str
    kind: str
    label: str
    uuid: str
    size_bytes: int
    place: str
    within: tuple[str, ...]
    status: VolumeStatus
    reason: str
    part_uuid: str = ""
    part_label: str = ""
    part_start_bytes: int = 0
    crypt_uuid: str = ""


class VolumeRows(NamedTuple):
    """All volumes of a restore point, and what is not as it should be on its disks, in sentences."""

    rows: tuple[VolumeRow, ...]
    notes: tuple[str, ...]


class Listed(NamedTuple):
    """A directory entry with the metadata of what it names; ``stat`` is None if that can not be read."""

    entry: DirEntry
    stat: NodeStat | None


class Page(NamedTuple):
    """A part of a listing. It goes on after the last entry's cookie unless ``is_last``."""

    entries: tuple[Listed, ...]
    is_last: bool


class ExtentPage(NamedTuple):
    """A part of a file's extent map, in order without gaps; it goes on where the last one ends unless ``is_last``."""

    extents: tuple[FileExtent, ...]
    is_last: bool


class GuestMount(NamedTuple):
    """A directory of a volume that the guest shows at ``path``."""

    path: bytes
    """Within the guest: absolute, without ``.``, ``..``, double or closing slashes; ``/`` for the root. For Windows
    ``/C:`` and so on."""
    volume: str
    node: NodeId
    over: tuple[str, NodeId] | None
    """The directory (volume, node) it hides; None for the root, and where no directory is there: then ``path`` has one
    component and the root gets one more name."""
    source: str
    """What the guest calls it (``UUID=…``, ``/dev/vg/lv``), for people."""


class GuestTree(NamedTuple):
    """How the guest puts its volumes together. Mounts come parents first; without any there is no such tree."""

    kind: str
    """``unix``, ``windows`` or empty."""
    mounts: tuple[GuestMount, ...]
    """For ``unix`` the first one is the root. For ``windows`` none is: the root holds nothing but the drives."""
    notes: tuple[str, ...]
    """Sentences on what the guest mounts but is not there, or why there is no tree."""


class Guest(Protocol):
    """A restore point's guest. Any thread may call; calls may wait for one another.

    ``volume`` is a row's name. GuestNotFound: there is none of that name. GuestLocked: it needs a key.
    GuestUnsupported, GuestDamaged: it holds no files, or can not be read; the message gives the reason.
    """

    def volumes(self) -> VolumeRows:
        """What lies on the disks."""
        ...

    def tree(self) -> GuestTree:
        """How the guest puts it together."""
        ...

    def info(self, volume: str) -> VolumeInfo:
        """What a filesystem says about itself, and in which state it is."""
        ...

    def root(self, volume: str) -> NodeId:
        """The topmost directory of a filesystem."""
        ...

    def lookup(self, volume: str, node: NodeId, name: bytes) -> Listed | None:
        """The entry of that exact name, or None."""
        ...

    def list(self, volume: str, node: NodeId, cookie: int = 0) -> Page:
        """Entries from the start or after ``cookie``. An error in the midst of a directory comes with the next page."""
        ...

    def stat(self, volume: str, node: NodeId) -> NodeStat:
        """Metadata."""
        ...

    def read(self, volume: str, node: NodeId, offset: int, length: int) -> bytes:
        """As `GuestFilesystem.read`: at most READ_BYTES_MAX."""
        ...

    def extents(self, volume: str, node: NodeId, offset: int = 0) -> ExtentPage:
        """As `GuestFilesystem.extents`."""
        ...

    def readlink(self, volume: str, node: NodeId) -> bytes:
        """The target exactly as stored."""
        ...

    def xattrs(self, volume: str, node: NodeId) -> Sequence[Xattr]:
        """All extended attributes. GuestUnsupported if there are more than XATTRS_BYTES_MAX."""
        ...
