"""Guests of restore points for commands: every disk of a point, read by a sandboxed worker.

Owns only how a point's disks become what `GuestWorkers` reads. The mount has its own way (``vfs.guests.disks``), since
there reads must not wait for a storage that hangs. Any thread may call.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from xbfs.view.disk import PointDisk
from xbfs_engine.catalog.blockmap import BlockMap
from xbfs_engine.core.errors import SourceUnreadable
from xbfs_engine.guestfs.volumes import Disk

if TYPE_CHECKING:
    from collections.abc import Sequence

    from xbfs_engine.catalog.blockmap import NodeStore
    from xbfs_engine.catalog.restore_point import RestorePoint
    from xbfs_engine.guestfs.volumes import VolumeKey
    from xbfs_engine.guestfs.worker.client import GuestWorkers, SandboxedGuest
    from xbfs_engine.store.cache import ChunkCache


def open_guest(
    workers: GuestWorkers,
    point: RestorePoint,
    nodes: NodeStore,
    cache: ChunkCache,
    keys: Sequence[VolumeKey] = (),
) -> SandboxedGuest:
    """The guest of a restore point; reads nothing yet. ``keys`` open its encrypted volumes. Raises MapCorrupt."""
    return workers.open(f"restore point {point.id[:12]} ({point.vm_name})", guest_disks(point, nodes, cache), keys)


def guest_disks(point: RestorePoint, nodes: NodeStore, cache: ChunkCache) -> list[Disk]:
    """All disks of a point, by number, as readers of guests take them. Raises MapCorrupt."""
    return [
        Disk(
            str(disk.number),
            ExactDisk(
                PointDisk(
                    BlockMap(nodes, disk.root, disk.chunks),
                    cache,
                    size_bytes=disk.size_bytes,
                    chunk_size=disk.chunk_size,
                )
            ),
        )
        for disk in sorted(point.disks, key=lambda disk: disk.number)
    ]


class ExactDisk:
    """A BlockSource over a disk: what is not within it is an error, where the disk itself would clip."""

    __slots__ = ("_disk",)

    def __init__(self, disk: PointDisk) -> None:
        self._disk = disk

    @property
    def size_bytes(self) -> int:
        """Size of the disk."""
        return self._disk.size_bytes

    def read_at(self, offset: int, length: int) -> bytes:
        """Exactly these bytes; may block. Raises SourceUnreadable, IntegrityError, StorageError."""
        if offset < 0 or length < 0 or offset + length > self._disk.size_bytes:
            raise SourceUnreadable(f"{length} bytes at {offset} are not within the disk's {self._disk.size_bytes}")
        return self._disk.read_at(offset, length)
