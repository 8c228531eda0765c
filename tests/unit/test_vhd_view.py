"""A synthetic image adds nothing to what the disk does: its buffers, its cache, its holes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.support.disks import CHUNK, VHD_BLOCK, MemoryDisk, dynamic_vhd, fixed_vhd
from xbfs.view.base import Extent, joined
from xbfs.view.synthetic import SyntheticImage
from xbfs_engine.core.errors import ChunkCorrupt
from xbfs_engine.formats.raw import RawLayout

if TYPE_CHECKING:
    from collections.abc import Iterator

DATA_AT = 4096
"""Where the first block's data lies in a small dynamic VHD: metadata ends at 3072."""


class OneBuffer:
    """A disk of one chunk that always gives the same objects, and never copies."""

    size_bytes = CHUNK
    buffer = bytes(range(256)) * (CHUNK // 256)
    cached = memoryview(buffer)

    def parts_at(self, offset: int, length: int) -> list[bytes]:
        assert (offset, length) == (0, CHUNK)
        return [self.buffer]

    def parts_cached(self, offset: int, length: int) -> list[memoryview]:
        assert (offset, length) == (0, CHUNK)
        return [self.cached]

    def read_at(self, offset: int, length: int) -> bytes:
        return joined(self.parts_at(offset, length))

    def read_cached(self, offset: int, length: int) -> memoryview:
        return self.parts_cached(offset, length)[0]

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        yield Extent(offset, length, True)


def test_one_disk_extent_is_the_disks_own_buffer() -> None:
    disk = OneBuffer()
    image = SyntheticImage(RawLayout(CHUNK), disk)
    assert image.parts_at(0, CHUNK)[0] is disk.buffer
    assert image.parts_cached(0, CHUNK) == [disk.cached]
    assert image.read_at(0, CHUNK) is disk.buffer
    assert image.read_cached(0, CHUNK) is disk.cached


def test_a_cold_chunk_makes_only_its_ranges_uncached() -> None:
    disk = MemoryDisk.holding(2 * VHD_BLOCK, (0, 1, 2))
    image = dynamic_vhd(disk)
    disk.cold = {1}
    cold_from, cold_to = DATA_AT + CHUNK, DATA_AT + 2 * CHUNK
    assert image.read_cached(0, cold_from) == image.read_at(0, cold_from)
    assert image.read_cached(0, cold_from + 1) is None
    assert image.read_cached(cold_from, 1) is None
    assert image.read_cached(cold_to - 1, 1) is None
    assert image.read_cached(cold_to, CHUNK) == image.read_at(cold_to, CHUNK)
    assert image.read_cached(image.size_bytes - 512, 512) == image.read_at(0, 512)
    disk.cold = set()
    assert image.read_cached(cold_from, CHUNK) == image.read_at(cold_from, CHUNK)


def test_damage_of_the_disk_reaches_the_reader() -> None:
    class Damaged(MemoryDisk):
        def parts_at(self, offset: int, length: int) -> list[bytes]:
            raise ChunkCorrupt(f"chunk at {offset}")

    image = fixed_vhd(Damaged(VHD_BLOCK, {}))
    with pytest.raises(ChunkCorrupt):
        image.read_at(VHD_BLOCK - 1, 513)
    assert image.read_at(VHD_BLOCK, 8) == b"conectix"


def test_holes_of_the_disk_are_holes_of_the_image() -> None:
    disk = MemoryDisk.holding(4 * VHD_BLOCK, (0, 1, 5, 64))
    image = dynamic_vhd(disk)
    second = DATA_AT + VHD_BLOCK + 4096
    found = [extent[:2] for extent in image.extents(0, image.size_bytes) if extent.is_data]
    assert found == [
        (0, 3072),  # footer copy, header, BAT, batmap
        (DATA_AT - 512, 512 + 2 * CHUNK),  # sector bitmap, chunks 0 and 1
        (DATA_AT + 5 * CHUNK, CHUNK),
        (second - 512, 512 + CHUNK),  # sector bitmap, chunk 64
        (image.size_bytes - 512, 512),
    ]


def test_tail_behind_the_disk_is_a_hole_and_asks_nothing_of_the_disk() -> None:
    disk = MemoryDisk.full(CHUNK + 100)
    image = fixed_vhd(disk)
    assert list(image.extents(0, image.size_bytes)) == [
        Extent(0, CHUNK + 100, True),
        Extent(CHUNK + 100, VHD_BLOCK - CHUNK - 100, False),
        Extent(VHD_BLOCK, 512, True),
    ]
    assert image.read_at(CHUNK + 99, 3)[1:] == b"\0\0"
