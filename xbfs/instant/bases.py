"""What sessions lie over: the disks of restore points, read through one cache.

Any thread may use it. Reads of a storage that hangs fail or park as in the read-only mount (``vfs.gate``).
"""

from __future__ import annotations

import os
from contextlib import suppress
from typing import TYPE_CHECKING, Final

from xbfs.instant.session import DiskFormat
from xbfs.vfs.gate import Gate
from xbfs.vfs.images import ImageFormat, open_image, vhd_refusal
from xbfs.vfs.live.tree import READ_DEADLINE_S
from xbfs_engine.catalog.blockmap import NodeStore
from xbfs_engine.core.errors import ImageUnsupported, PointNotFound, StorageError
from xbfs_engine.core.limits import GIB, MIB
from xbfs_engine.store.cache import ChunkCache
from xbfs_engine.store.reader import ChunkReader

if TYPE_CHECKING:
    from xbfs.instant.session import Session
    from xbfs.view.base import RandomAccess
    from xbfs_engine.catalog.catalog import Catalog
    from xbfs_engine.catalog.restore_point import RestorePoint
    from xbfs_engine.core.ids import PointId
    from xbfs_engine.store.reader import Locator
    from xbfs_engine.store.repository import Repository

CACHE_MIN_BYTES: Final = 128 * MIB
CACHE_MAX_BYTES: Final = GIB
CACHE_SHARE: Final = 8
"""Decoded chunks kept for all sessions together: this part of the machine's memory, within those bounds. A VM reads
4 KiB where a chunk is 64 KiB: what is not kept is decoded again for each of them."""


def cache_bytes(memory_bytes: int) -> int:
    """How much of a machine's memory decoded chunks may take."""
    return min(max(memory_bytes // CACHE_SHARE, CACHE_MIN_BYTES), CACHE_MAX_BYTES)


class Bases:
    """Over one repository."""

    def __init__(self, repository: Repository, catalog: Catalog, locator: Locator) -> None:
        self.catalog = catalog
        gate = Gate(repository.storage, repository.runtime.clock, deadline_s=READ_DEADLINE_S)
        reader = ChunkReader(gate, repository.keys, locator)
        self._nodes = NodeStore(reader)
        self._cache = ChunkCache(reader, cache_bytes(_memory_bytes()))

    def point(self, point_id: PointId) -> RestorePoint:
        """A point of this repository, also one that was made since. Raises PointNotFound, IntegrityError."""
        with suppress(PointNotFound):
            return self.catalog.find(point_id)
        with suppress(StorageError):
            self.catalog.refresh()
        return self.catalog.find(point_id)

    def of(self, session: Session) -> dict[str, RandomAccess]:
        """What a session's disks lie over, by key; reads no data.

        Raises PointNotFound if the point or a disk of it is not there, ImageUnsupported, IntegrityError.
        """
        point = self.point(session.point)
        found: dict[str, RandomAccess] = {}
        for disk in session.disks:
            record = point.disk(disk.number)
            if record is None:
                raise PointNotFound(f"restore point {point.id[:12]} has no disk {disk.number}")
            image_format = ImageFormat.VHD if disk.format is DiskFormat.VHD else ImageFormat.RAW
            if image_format is ImageFormat.VHD and vhd_refusal(record):
                raise ImageUnsupported(f"disk {disk.number} is too big for a VHD", hint="boot it as --format raw")
            found[disk.key] = open_image(point, record, image_format, self._nodes, self._cache).access
        return found


def _memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
