"""VHD layouts: sizes, places, identities, limits. What real readers make of them is tests/interop."""

from __future__ import annotations

import tracemalloc
import uuid
from itertools import pairwise

import numpy as np
import pytest

from tests.support.disks import TIMESTAMP_S, UUID16, VHD_BLOCK, MemoryDisk, dynamic_vhd, fixed_vhd
from tests.support.vhd_rules import RuleReader
from xbfs_engine.core.errors import ImageUnsupported
from xbfs_engine.core.ids import PointId
from xbfs_engine.core.limits import GIB, MIB
from xbfs_engine.formats.segments import DiskExtent, Literal, Zero
from xbfs_engine.formats.vhd import (
    VhdDynamicLayout,
    VhdFixedLayout,
    vhd_block_count,
    vhd_dynamic_size,
    vhd_timestamp_s,
    vhd_uuid,
)
from xbfs_engine.formats.vhd_records import VHD_SIZE_MAX

BLOCKS_MAX = 1_044_480


def dynamic(disk_size: int, present: slice | list[int]) -> VhdDynamicLayout:
    allocated = np.zeros(vhd_block_count(disk_size), np.bool_)
    allocated[present] = True
    return VhdDynamicLayout(disk_size, allocated, uuid16=UUID16, timestamp_s=TIMESTAMP_S)


@pytest.fixture(scope="module")
def largest() -> VhdDynamicLayout:
    return dynamic(VHD_SIZE_MAX, slice(None))


def table_entry(layout: VhdDynamicLayout, block: int) -> int:
    (literal,) = layout.segments(1536 + 4 * block, 4)
    assert isinstance(literal, Literal)
    return int.from_bytes(literal.data, "big")


def test_the_largest_disk_has_the_size_vhd_util_was_seen_to_accept(largest: VhdDynamicLayout) -> None:
    assert largest.size_bytes == 2_194_715_820_544
    assert vhd_dynamic_size(VHD_SIZE_MAX, BLOCKS_MAX) == largest.size_bytes
    assert table_entry(largest, BLOCKS_MAX - 1) == 4_286_550_239 < 0xFFFFFFFF


def test_the_largest_disk_obeys_all_rules(largest: VhdDynamicLayout) -> None:
    def read(offset: int, length: int) -> bytes:
        segments = list(largest.segments(offset, length))
        return b"".join(s.data if isinstance(s, Literal) else bytes(s.length) for s in segments)

    reader = RuleReader(read, largest.size_bytes)
    assert len(reader.blocks) == BLOCKS_MAX


def test_finding_a_place_in_the_largest_disk_needs_little(largest: VhdDynamicLayout) -> None:
    tracemalloc.start()
    try:
        for offset in range(0, largest.size_bytes, largest.size_bytes // 200):
            assert sum(1 for _ in largest.segments(offset, 131072)) <= 4
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < MIB


def test_above_2040_gib_is_refused_with_the_reason() -> None:
    size = VHD_SIZE_MAX + 1
    allocated = np.zeros(vhd_block_count(size), np.bool_)
    with pytest.raises(ImageUnsupported, match=f"at most 2040 GiB, this disk has {size} bytes"):
        VhdDynamicLayout(size, allocated, uuid16=UUID16, timestamp_s=0)
    with pytest.raises(ImageUnsupported, match="2040 GiB"):
        VhdFixedLayout(size, uuid16=UUID16, timestamp_s=0)
    with pytest.raises(ImageUnsupported) as raised:
        vhd_dynamic_size(size, 0)
    assert raised.value.hint == "use the raw image"


@pytest.mark.parametrize("disk_size", [0, 1, 511, 2 * MIB - 1, 2 * MIB])
def test_small_disks_become_2_mib(disk_size: int) -> None:
    for image in (dynamic_vhd(MemoryDisk.full(disk_size)), fixed_vhd(MemoryDisk.full(disk_size))):
        assert RuleReader(image.read_at, image.size_bytes).virtual_size == 2 * MIB


def test_a_disk_of_zeros_is_metadata_only() -> None:
    layout = dynamic(100 * GIB, [])
    table = 51_200 * 4
    assert layout.size_bytes == 1536 + table + 512 + 13 * 512 + 512
    assert not any(isinstance(segment, DiskExtent | Zero) for segment in layout.segments(0, layout.size_bytes))


def test_blocks_lie_one_pitch_apart_with_aligned_data() -> None:
    layout = dynamic(20 * MIB, [1, 4, 9])
    places = [table_entry(layout, block) for block in (1, 4, 9)]
    assert [after - before for before, after in pairwise(places)] == [4104, 4104]
    assert all((place + 1) % 8 == 0 for place in places)
    assert table_entry(layout, 0) == table_entry(layout, 8) == 0xFFFFFFFF
    assert layout.size_bytes == (places[-1] + 4097 + 1) * 512


def test_the_bat_reads_the_same_from_any_byte() -> None:
    layout = dynamic(700 * MIB, [0, 1, 4, 9, 300, 349])

    def literals(offset: int, length: int) -> bytes:
        return b"".join(part.data for part in layout.segments(offset, length) if isinstance(part, Literal))

    whole = literals(1536, 1536)
    assert whole.count(b"\xff\xff\xff\xff") == 350 - 6
    for start in range(1536):
        assert literals(1536 + start, 7) == (whole + literals(3072, 7))[start : start + 7]


def test_the_size_is_known_from_the_number_of_blocks_alone() -> None:
    for disk_size, present in ((0, []), (1, [0]), (20 * MIB - 1, [3, 9]), (9000 * MIB, [0, 4096, 4499])):
        assert vhd_dynamic_size(disk_size, len(present)) == dynamic(disk_size, present).size_bytes


def test_the_last_block_ends_with_the_disk() -> None:
    layout = dynamic(VHD_BLOCK + 700, [1])
    assert list(layout.segments(4096, layout.size_bytes)) == [
        DiskExtent(VHD_BLOCK, 700),
        Zero(VHD_BLOCK - 700),
        *layout.segments(0, 512),
    ]


@pytest.mark.parametrize("blocks", [4095, 4096, 4097, 4103, 4104, 8193])
def test_batmap_agrees_with_libvhd_where_it_rounds_down(blocks: int) -> None:
    """libvhd sums one sector for 4097..4103 blocks though the map needs two."""
    disk = MemoryDisk.holding(blocks * VHD_BLOCK, (0, 32 * (blocks - 1)))
    image = dynamic_vhd(disk)
    reader = RuleReader(image.read_at, image.size_bytes)
    assert set(reader.blocks) == {0, blocks - 1}


def test_uuids_are_stable_valid_and_distinct() -> None:
    point = PointId("ab" * 32)
    assert vhd_uuid(point, 0).hex() == "a4377d27333357a59f1aceac836a0617"
    many = [vhd_uuid(PointId(f"{number:064x}"), disk) for number in range(50) for disk in (0, 1, 11)]
    assert len(set(many)) == len(many)
    for raw in many:
        assert uuid.UUID(bytes=raw).variant == uuid.RFC_4122
        assert uuid.UUID(bytes=raw).version == 5


def test_timestamps_count_from_2000_and_stay_in_32_bits() -> None:
    assert vhd_timestamp_s(946_684_800) == 0
    assert vhd_timestamp_s(946_684_801) == 1
    assert vhd_timestamp_s(0) == 0
    assert vhd_timestamp_s(1 << 40) == 0xFFFFFFFF


def test_the_timestamp_and_uuid_are_in_the_footer() -> None:
    for image in (dynamic_vhd(MemoryDisk.full(5)), fixed_vhd(MemoryDisk.full(5))):
        fields = RuleReader(image.read_at, image.size_bytes).fields
        assert (fields["timestamp"], fields["uuid"]) == (TIMESTAMP_S, UUID16)
