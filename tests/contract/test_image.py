"""Every RandomAccess keeps the promises of xbfs/view/base.py.

To try another implementation, add one line to IMAGES: how to make it of a disk in memory.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import pytest

from tests.support.disks import CHUNK, VHD_BLOCK, MemoryDisk, dynamic_vhd, fixed_vhd
from tests.support.overlays import frozen_overlay, hydrated_overlay, written_overlay
from tests.support.point_disks import point_disk
from xbfs.view.synthetic import SyntheticImage
from xbfs_engine.formats.raw import RawLayout

if TYPE_CHECKING:
    from collections.abc import Callable

    from xbfs.view.base import RandomAccess

IMAGES: dict[str, Callable[[MemoryDisk], RandomAccess]] = {
    "disk": lambda disk: disk,
    "raw": lambda disk: SyntheticImage(RawLayout(disk.size_bytes), disk),
    "dynamic VHD": dynamic_vhd,
    "fixed VHD": fixed_vhd,
    "restore point": point_disk,
    "overlay": written_overlay,
    "frozen overlay": frozen_overlay,
    "hydrated overlay": hydrated_overlay,
}
DISKS: dict[str, Callable[[], MemoryDisk]] = {
    "empty": lambda: MemoryDisk(0, {}),
    "one byte": lambda: MemoryDisk.full(1),
    "all hole": lambda: MemoryDisk(3 * VHD_BLOCK, {}),
    "full, odd size": lambda: MemoryDisk.full(VHD_BLOCK + CHUNK + 4097),
    "sparse, odd size": lambda: MemoryDisk.holding(5 * VHD_BLOCK - 511, (1, 2, 40, 64, 65, 159)),
    "data at both ends": lambda: MemoryDisk.holding(3 * VHD_BLOCK, (0, 95)),
}


@pytest.fixture(scope="module", params=list(itertools.product(IMAGES, DISKS)), ids=" of ".join)
def image(request: pytest.FixtureRequest) -> RandomAccess:
    kind, disk = request.param
    return IMAGES[kind](DISKS[disk]())


@pytest.fixture(scope="module")
def whole(image: RandomAccess) -> bytes:
    return image.read_at(0, image.size_bytes)


def ranges(size: int) -> list[tuple[int, int]]:
    """Ranges that meet every border a layout may have, and some that meet none."""
    chosen = [(0, size), (0, 1), (size - 1, 1), (size // 2, 0), (size - 512, 512), (size - 513, 514)]
    chosen += [(at - 3, 7) for at in (512, 1536, 2048, 4096, CHUNK, VHD_BLOCK, 2 * VHD_BLOCK + 4096)]
    lengths = (1, 511, 4096, 131072, 3 << 20)
    chosen += [(step * 1_000_003 % (size + 1), lengths[step % 5]) for step in range(40)]
    return [(offset, length) for offset, length in chosen if 0 <= offset <= size]


def test_a_whole_read_has_the_size(image: RandomAccess, whole: bytes) -> None:
    assert len(whole) == image.size_bytes


def test_pieces_are_slices_of_the_whole(image: RandomAccess, whole: bytes) -> None:
    for offset, length in ranges(image.size_bytes):
        assert image.read_at(offset, length) == whole[offset : offset + length], (offset, length)


def test_reads_are_bytes(image: RandomAccess) -> None:
    assert type(image.read_at(0, 4096)) is bytes


def test_reading_at_and_behind_the_end_gives_nothing(image: RandomAccess) -> None:
    size = image.size_bytes
    for offset, length in ((size, 1), (size, 0), (size + 1, 10), (size + (1 << 40), 1 << 20)):
        assert image.read_at(offset, length) == b""
        assert image.read_cached(offset, length) == b""
        assert list(image.extents(offset, length)) == []


def test_reading_over_the_end_is_clipped(image: RandomAccess, whole: bytes) -> None:
    start = max(image.size_bytes - 100, 0)
    assert image.read_at(start, 1 << 20) == whole[start:]
    assert sum(extent.length for extent in image.extents(start, 1 << 20)) == len(whole) - start


def test_zero_length(image: RandomAccess) -> None:
    assert image.read_at(0, 0) == b""
    assert image.read_cached(0, 0) == b""
    assert list(image.extents(0, 0)) == []


def test_read_cached_is_read_at_or_nothing(image: RandomAccess, whole: bytes) -> None:
    for offset, length in ranges(image.size_bytes):
        image.read_at(offset, length)
        assert b"".join(image.parts_at(offset, length)) == whole[offset : offset + length]
        parts = image.parts_cached(offset, length)
        cached = image.read_cached(offset, length)
        assert (None if parts is None else b"".join(parts)) == (None if cached is None else bytes(cached))
        assert cached is None or bytes(cached) == whole[offset : offset + length], (offset, length)


def test_extents_tile_alternate_and_holes_are_zero(image: RandomAccess, whole: bytes) -> None:
    for offset, length in ranges(image.size_bytes):
        position = offset
        before: bool | None = None
        for extent in image.extents(offset, length):
            assert extent.offset == position
            assert extent.length > 0
            assert extent.is_data is not before
            if not extent.is_data:
                assert not whole[position : position + extent.length].strip(b"\0")
            position += extent.length
            before = extent.is_data
        assert position == min(offset + length, image.size_bytes)


def test_extents_are_clipped_not_rounded(image: RandomAccess) -> None:
    everything = list(image.extents(0, image.size_bytes))
    for offset, length in ranges(image.size_bytes):
        end = min(offset + length, image.size_bytes)
        expected = [
            (max(extent.offset, offset), min(extent.offset + extent.length, end), extent.is_data)
            for extent in everything
            if max(extent.offset, offset) < min(extent.offset + extent.length, end)
        ]
        assert [(e.offset, e.offset + e.length, e.is_data) for e in image.extents(offset, length)] == expected
