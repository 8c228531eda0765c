"""A Guest whose readers run in this process: what a sandboxed worker serves, and what tests of readers use.

Owns the search for volumes, made once, and the filesystems that were opened. One lock: readers serve one thread at a
time. Never to be used on a guest's disks in a process that holds keys or serves others.
"""

from __future__ import annotations

import threading
from itertools import islice
from typing import TYPE_CHECKING, Final

from xbfs_engine.core.errors import GuestError, GuestLocked, GuestNotFound, GuestUnsupported
from xbfs_engine.guestfs.explorer.btrfs import BtrfsVolume
from xbfs_engine.guestfs.filesystems import open_filesystem
from xbfs_engine.guestfs.guest import (
    PAGE_ENTRIES_MAX,
    XATTRS_BYTES_MAX,
    XATTRS_MAX,
    ExtentPage,
    GuestTree,
    Listed,
    Page,
    VolumeRow,
    VolumeRows,
)
from xbfs_engine.guestfs.tree import put_together
from xbfs_engine.guestfs.volumes import VolumeStatus, find_volumes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from xbfs_engine.guestfs.base import DirEntry, GuestFilesystem, NodeId, NodeStat, VolumeInfo, Xattr
    from xbfs_engine.guestfs.volumes import Disk, Volume, VolumeKey

_ERRORS: Final = {VolumeStatus.LOCKED: GuestLocked}


class GuestReading:
    """The guest on ``disks``, all those of one restore point; ``keys`` open what is encrypted."""

    def __init__(self, disks: Sequence[Disk], keys: Sequence[VolumeKey] = ()) -> None:
        self._disks = disks
        self._keys = keys
        self._lock = threading.RLock()
        self._rows: VolumeRows | None = None
        self._volumes: dict[str, Volume] = {}
        self._opened: dict[str, GuestFilesystem | GuestError] = {}
        self._tree: GuestTree | None = None

    def volumes(self) -> VolumeRows:
        """What lies on the disks."""
        with self._lock:
            if self._rows is None:
                found = find_volumes(self._disks, self._keys)
                self._volumes = {volume.name: volume for volume in found.volumes}
                self._rows = VolumeRows(tuple(_row(volume) for volume in found.volumes), found.notes)
            return self._rows

    def tree(self) -> GuestTree:
        """How the guest puts it together."""
        with self._lock:
            if self._tree is None:
                self._tree = put_together(self)
            return self._tree

    def info(self, volume: str) -> VolumeInfo:
        """What a filesystem says about itself."""
        with self._lock:
            return self._filesystem(volume).info

    def root(self, volume: str) -> NodeId:
        """The topmost directory of a filesystem."""
        with self._lock:
            return self._filesystem(volume).root

    def lookup(self, volume: str, node: NodeId, name: bytes) -> Listed | None:
        """The entry of that exact name, or None."""
        with self._lock:
            filesystem = self._filesystem(volume)
            entry = filesystem.lookup(node, name)
            return None if entry is None else Listed(entry, filesystem.stat(entry.node))

    def list(self, volume: str, node: NodeId, cookie: int = 0) -> Page:
        """Entries from the start or after ``cookie``."""
        with self._lock:
            filesystem = self._filesystem(volume)
            found: list[Listed] = []
            try:
                for entry in islice(filesystem.list(node, cookie), PAGE_ENTRIES_MAX):
                    found.append(_listed(filesystem, entry))  # noqa: PERF401 - those before an error count
            except GuestError:
                if not found:
                    raise
                return Page(tuple(found), is_last=False)
            return Page(tuple(found), is_last=len(found) < PAGE_ENTRIES_MAX)

    def stat(self, volume: str, node: NodeId) -> NodeStat:
        """Metadata."""
        with self._lock:
            return self._filesystem(volume).stat(node)

    def read(self, volume: str, node: NodeId, offset: int, length: int) -> bytes:
        """Content of a file."""
        with self._lock:
            return self._filesystem(volume).read(node, offset, length)

    def extents(self, volume: str, node: NodeId, offset: int = 0) -> ExtentPage:
        """Data and holes of a file."""
        with self._lock:
            found = tuple(islice(self._filesystem(volume).extents(node, offset), PAGE_ENTRIES_MAX))
            return ExtentPage(found, is_last=len(found) < PAGE_ENTRIES_MAX)

    def readlink(self, volume: str, node: NodeId) -> bytes:
        """The target exactly as stored."""
        with self._lock:
            return self._filesystem(volume).readlink(node)

    def xattrs(self, volume: str, node: NodeId) -> Sequence[Xattr]:
        """All extended attributes."""
        with self._lock:
            found: list[Xattr] = []
            size = 0
            for xattr in self._filesystem(volume).xattrs(node):
                size += len(xattr.name) + len(xattr.value)
                found.append(xattr)
                if len(found) > XATTRS_MAX or size > XATTRS_BYTES_MAX:
                    raise GuestUnsupported(
                        f"the file has more than {XATTRS_MAX} attributes or {XATTRS_BYTES_MAX} bytes"
                    )
            return found

    def subvolume(self, volume: str, number: int) -> NodeId:
        """The topmost directory of a btrfs' subvolume; 0 is the one that is mounted when none is named."""
        with self._lock:
            filesystem = self._filesystem(volume)
            if not isinstance(filesystem, BtrfsVolume):
                raise GuestUnsupported(f"volume {volume} has no subvolumes")
            return filesystem.subvolume(number) if number else filesystem.default_subvolume

    def _filesystem(self, name: str) -> GuestFilesystem:
        """The opened filesystem. What could not be opened once is not tried again, unless that may help."""
        opened = self._opened.get(name)
        if opened is None:
            self.volumes()
            opened = self._opened[name] = self._open(name)
        if isinstance(opened, GuestError):
            raise opened
        return opened

    def _open(self, name: str) -> GuestFilesystem | GuestError:
        volume = self._volumes.get(name)
        if volume is None:
            raise GuestNotFound(f"there is no volume {name}", hint=f"there are: {', '.join(self._volumes) or 'none'}")
        if volume.status is not VolumeStatus.FILESYSTEM or volume.source is None:
            return _ERRORS.get(volume.status, GuestUnsupported)(f"volume {name} ({volume.kind}): {volume.reason}")
        try:
            return open_filesystem(volume.kind, volume.source)
        except GuestError as error:
            return error


def _listed(filesystem: GuestFilesystem, entry: DirEntry) -> Listed:
    try:
        return Listed(entry, filesystem.stat(entry.node))
    except GuestError:
        return Listed(entry, None)


def _row(volume: Volume) -> VolumeRow:
    return VolumeRow(*(getattr(volume, name) for name in VolumeRow._fields))
