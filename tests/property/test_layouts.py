"""Layouts over random disks: pieces equal the whole, segments tile, and a VHD decodes back to its disk."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.disks import CHUNK, TIMESTAMP_S, UUID16, VHD_BLOCK, MemoryDisk, dynamic_vhd, fixed_vhd
from tests.support.vhd_rules import RuleReader
from xbfs.view.synthetic import SyntheticImage
from xbfs_engine.formats.raw import RawLayout
from xbfs_engine.formats.segments import DiskExtent, Literal, Zero
from xbfs_engine.formats.vhd import VhdDynamicLayout, VhdFixedLayout, vhd_block_count
from xbfs_engine.formats.vhd_records import VHD_SIZE_MAX

if TYPE_CHECKING:
    from xbfs_engine.formats.segments import Layout


@st.composite
def disks(draw: st.DrawFn) -> MemoryDisk:
    """Up to 8 MiB, of any size, with a few chunks of data."""
    size = draw(st.integers(0, 8 << 20) | st.integers(0, 4).map(lambda blocks: blocks * VHD_BLOCK))
    chunks = -(-size // CHUNK)
    return MemoryDisk.holding(size, draw(st.sets(st.integers(0, chunks - 1), max_size=12)) if chunks else ())


@st.composite
def large_layouts(draw: st.DrawFn) -> tuple[Layout, int]:
    """Layouts of disks up to 2040 GiB, with their disk size."""
    size = draw(st.integers(0, VHD_SIZE_MAX) | st.integers(0, 1 << 30))
    if draw(st.booleans()):
        fixed = VhdFixedLayout(size, uuid16=UUID16, timestamp_s=0)
        return (fixed if draw(st.booleans()) else RawLayout(size)), size
    blocks = vhd_block_count(size)
    allocated = np.full(blocks, draw(st.booleans()))
    for block in draw(st.lists(st.integers(0, blocks - 1), max_size=20)) if blocks else ():
        allocated[block] ^= True
    return VhdDynamicLayout(size, allocated, uuid16=UUID16, timestamp_s=TIMESTAMP_S), size


@given(disk=disks(), data=st.data())
@settings(max_examples=40, deadline=None)
def test_pieces_put_together_are_the_whole(disk: MemoryDisk, data: st.DataObject) -> None:
    for image in (SyntheticImage(RawLayout(disk.size_bytes), disk), dynamic_vhd(disk), fixed_vhd(disk)):
        size = image.size_bytes
        cuts = sorted(data.draw(st.sets(st.integers(0, size), max_size=8)) | {0, size})
        pieces = [image.read_at(start, end - start) for start, end in pairwise(cuts)]
        assert b"".join(pieces) == image.read_at(0, size)


@given(disk=disks())
@settings(max_examples=40, deadline=None)
def test_an_independent_reader_finds_the_disk_and_zeros_behind(disk: MemoryDisk) -> None:
    for image in (dynamic_vhd(disk), fixed_vhd(disk)):
        reader = RuleReader(image.read_at, image.size_bytes)
        assert reader.virtual_size == max(vhd_block_count(disk.size_bytes), 1) * VHD_BLOCK
        expected = disk.read_at(0, disk.size_bytes).ljust(reader.virtual_size, b"\0")
        assert reader.disk(0, reader.virtual_size) == expected


@given(disk=disks())
@settings(max_examples=30, deadline=None)
def test_only_blocks_with_data_are_in_a_dynamic_vhd(disk: MemoryDisk) -> None:
    image = dynamic_vhd(disk)
    reader = RuleReader(image.read_at, image.size_bytes)
    assert sorted(reader.blocks) == np.flatnonzero(disk.allocated).tolist()


@given(made=large_layouts(), data=st.data())
@settings(max_examples=60, deadline=None)
def test_segments_tile_the_range_and_stay_inside_the_disk(made: tuple[Layout, int], data: st.DataObject) -> None:
    layout, disk_size = made
    near_ends = st.integers(0, 20_000) | st.integers(max(layout.size_bytes - 5 * VHD_BLOCK, 0), layout.size_bytes + 10)
    offset = data.draw(near_ends | st.integers(0, layout.size_bytes))
    length = data.draw(st.integers(0, 5 * VHD_BLOCK))
    position = offset
    for segment in layout.segments(offset, length):
        match segment:
            case Literal(content):
                size = len(content)
            case DiskExtent(start, size):
                assert 0 <= start <= start + size <= disk_size
            case Zero(size):
                pass
        assert size > 0
        position += size
    assert position == max(min(offset + length, layout.size_bytes), offset)


@given(made=large_layouts(), data=st.data())
@settings(max_examples=60, deadline=None)
def test_a_range_is_the_same_alone_or_within_a_larger_one(made: tuple[Layout, int], data: st.DataObject) -> None:
    layout, _ = made
    start = data.draw(st.integers(0, layout.size_bytes) | st.integers(0, 10_000))
    size = data.draw(st.integers(0, 3 * VHD_BLOCK))
    middle = start + data.draw(st.integers(0, size))
    whole = flat(layout, start, size)
    assert flat(layout, start, middle - start) + flat(layout, middle, start + size - middle) == whole


def flat(layout: Layout, offset: int, length: int) -> bytes:
    """What the range reads as: literals as they are, disk bytes told by their place, zeros."""
    parts = []
    for segment in layout.segments(offset, length):
        match segment:
            case Literal(content):
                parts.append(content)
            case DiskExtent(start, size):
                parts.append((np.arange(start, start + size, dtype=np.int64) % 251 + 1).astype(np.uint8).tobytes())
            case Zero(size):
                parts.append(bytes(size))
    return b"".join(parts)
