"""The image files of a disk: which there are, how big they are, and opening one.

Sizes come from the manifest alone. A DiskImage holds nothing that changes; any thread may read it.
"""

from __future__ import annotations

from enum import IntEnum
from typing import TYPE_CHECKING, Final

from xbfs.view.disk import PointDisk
from xbfs.view.sparse import SparseMap
from xbfs.view.synthetic import SyntheticImage
from xbfs_engine.catalog.blockmap import BlockMap
from xbfs_engine.core.errors import ImageUnsupported
from xbfs_engine.formats.segments import DiskExtent
from xbfs_engine.formats.vhd import vhd_dynamic_size, vhd_virtual_size
from xbfs_engine.formats.vhd_records import BLOCK_SIZE
from xbfs_engine.restore import layouts

if TYPE_CHECKING:
    from xbfs.view.base import RandomAccess
    from xbfs_engine.catalog.blockmap import NodeStore
    from xbfs_engine.catalog.restore_point import DiskRecord, RestorePoint
    from xbfs_engine.formats.segments import Layout
    from xbfs_engine.store.cache import ChunkCache


class ImageFormat(IntEnum):
    """Files a disk can have. Numbers are part of inode numbers: never reused. 15 is the last."""

    RAW = 0
    VHD = 1
    VHD_REFUSED = 2

    @property
    def suffix(self) -> str:
        """What follows the disk's number in the file name."""
        return _SUFFIXES[self]


_SUFFIXES: Final = {
    ImageFormat.RAW: ".raw",
    ImageFormat.VHD: ".vhd",
    ImageFormat.VHD_REFUSED: ".vhd.unavailable.txt",
}


def image_formats(disk: DiskRecord) -> tuple[ImageFormat, ...]:
    """The files of a disk: an image, or the reason why there is none."""
    return ImageFormat.RAW, ImageFormat.VHD_REFUSED if vhd_refusal(disk) else ImageFormat.VHD


def vhd_refusal(disk: DiskRecord) -> str | None:
    """Why there is no VHD of a disk, or None."""
    try:
        vhd_virtual_size(disk.size_bytes)
    except ImageUnsupported as exc:
        return f"{exc.message}\n{exc.hint}\n"
    return None


def image_size(disk: DiskRecord, image_format: ImageFormat) -> tuple[int, int]:
    """Size of an image file and the bytes of it that are not holes, both in bytes."""
    if image_format is ImageFormat.RAW:
        return disk.size_bytes, disk.data_bytes
    assert image_format is ImageFormat.VHD
    present = int(layouts.allocated_blocks(disk).sum())
    size = vhd_dynamic_size(disk.size_bytes, present)
    return size, size - max(present * BLOCK_SIZE - disk.data_bytes, 0)


class DiskImage:
    """One disk of a point in one format."""

    __slots__ = ("__weakref__", "_disk", "_layout", "_sparse", "access")

    def __init__(self, disk: PointDisk, layout: Layout | None, sparse: SparseMap) -> None:
        self._disk = disk
        self._layout = layout
        self._sparse = sparse
        self.access: RandomAccess = disk if layout is None else SyntheticImage(layout, disk)

    def seek(self, offset: int, *, data: bool) -> int | None:
        """Where data, or else a hole, begins at or behind ``offset``; None at the end or where no more data is."""
        return self._sparse.data_from(offset) if data else self._sparse.hole_from(offset)

    def warm(self, offset: int, length: int) -> None:
        """Decode what a range of the image needs into the cache. May block; raises as ``read_at``."""
        if self._layout is None:
            self._disk.warm(offset, length)
            return
        for segment in self._layout.segments(offset, length):
            if isinstance(segment, DiskExtent):
                self._disk.warm(segment.offset, segment.length)


def open_image(
    point: RestorePoint, disk: DiskRecord, image_format: ImageFormat, nodes: NodeStore, cache: ChunkCache
) -> DiskImage:
    """The image of a disk; reads nothing. Raises MapCorrupt if the manifest's root does not fit the disk."""
    block_map = BlockMap(nodes, disk.root, disk.chunks)
    access = PointDisk(block_map, cache, size_bytes=disk.size_bytes, chunk_size=disk.chunk_size)
    if image_format is ImageFormat.RAW:
        return DiskImage(access, None, SparseMap.of_disk(disk.data_map.bits(), disk.size_bytes))
    assert image_format is ImageFormat.VHD
    layout = layouts.image_layout(point, disk, layouts.ImageFormat.VHD)
    return DiskImage(access, layout, SparseMap.solid(layout.size_bytes))
