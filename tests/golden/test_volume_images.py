"""Arrays and volume groups that Linux made (tools/make_volume_images): every byte of every volume, and what is lost
with each disk that is missing."""

from __future__ import annotations

import pytest

from tests.support import guest_golden
from tests.support.volume_images import by_name, content, golden_disks, pattern, scan
from xbfs_engine.core.errors import XbfsError
from xbfs_engine.guestfs.volumes import VolumeStatus

MD = golden_disks("md")
MIRRORS = golden_disks("md_mirrors")
LVM = golden_disks("lvm")


def only(disks: dict[int, bytes], *numbers: int) -> dict[int, bytes]:
    return {number: disks[number] for number in numbers}


@pytest.mark.parametrize(
    ("name", "tag", "size", "members"),
    [
        ("md1", 1, 10_485_760, (0, 1, 2)),
        ("md-far", 2, 4_194_304, (3, 4, 5, 6)),
        ("md-offset", 3, 3_145_728, (7, 8, 9)),
        ("md-near", 4, 3_145_728, (10, 11, 12)),
        ("md-linear", 5, 3_145_728, (13, 14)),
    ],
)
def test_an_array_reads_as_the_kernel_wrote_it(name: str, tag: int, size: int, members: tuple[int, ...]):
    array = by_name(scan(only(MD, *members)))[name]
    assert array.size_bytes == size
    assert content(array) == pattern(tag, size)


def test_all_arrays_are_found_side_by_side_each_by_its_own_members():
    found = by_name(scan(MD))
    assert {"md1", "md-far", "md-offset", "md-near", "md-linear"} <= set(found)
    assert all(found[str(number)].status is VolumeStatus.PART for number in MD)


@pytest.mark.parametrize(
    ("name", "tag", "members"),
    [
        ("md-far", 2, (4, 5, 6)),
        ("md-far", 2, (3, 5)),
        ("md-far", 2, (4, 6)),
        ("md-offset", 3, (7, 8)),
        ("md-offset", 3, (7, 9)),
        ("md-offset", 3, (8, 9)),
        ("md-near", 4, (10, 11)),
        ("md-near", 4, (10, 12)),
        ("md-near", 4, (11, 12)),
    ],
)
def test_an_array_with_all_data_on_fewer_members_is_whole(name: str, tag: int, members: tuple[int, ...]):
    array = by_name(scan(only(MD, *members)))[name]
    assert content(array) == pattern(tag, array.size_bytes)
    assert "members are there" in array.reason


@pytest.mark.parametrize(
    ("name", "members", "reason"),
    [
        ("md1", (0, 1), "raid0 needs all 3 members; missing: place 2"),
        ("md-linear", (14,), "linear needs all 2 members; missing: place 0"),
        ("md-far", (3, 4), "all copies"),
        ("md-far", (3, 6), "all copies"),
        ("md-near", (12,), "all copies"),
        ("md-offset", (8,), "all copies"),
    ],
)
def test_an_array_that_lacks_data_says_so(name: str, members: tuple[int, ...], reason: str):
    array = by_name(scan(only(MD, *members)))[name]
    assert array.status is VolumeStatus.UNREADABLE
    assert array.source is None
    assert reason in array.reason


def test_of_a_mirror_only_what_is_up_to_date_is_read():
    array = by_name(scan(only(MIRRORS, 0, 1)))["md6"]
    assert content(array) == pattern(6, array.size_bytes)
    assert "1 of 2 members" in array.reason
    alone = by_name(scan(only(MIRRORS, 1)))["md6"]
    assert content(alone) == pattern(106, alone.size_bytes)


def test_a_member_that_is_being_rebuilt_is_not_read():
    array = by_name(scan(only(MIRRORS, 10, 11)))["md-rebuilt"]
    assert content(array) == pattern(10, array.size_bytes)
    assert "being rebuilt" in array.reason
    assert by_name(scan(only(MIRRORS, 11)))["md-rebuilt"].status is VolumeStatus.UNREADABLE


@pytest.mark.parametrize("members", [(2, 3), (2,), (3,)])
def test_partitions_in_an_array_are_its_own_not_the_disks(members: tuple[int, ...]):
    found = by_name(scan(only(MIRRORS, *members)))
    assert set(found) == {*map(str, members), "md-partedp1", "md-partedp2"}
    part = found["md-partedp1"]
    assert content(part) == pattern(7, part.size_bytes, 131072)


@pytest.mark.parametrize("members", [(4, 5, 6), (4,), (5, 6), (6,)])
def test_a_mirror_of_three_reads_from_any(members: tuple[int, ...]):
    array = by_name(scan(only(MIRRORS, *members)))["md-three"]
    assert content(array) == pattern(8, array.size_bytes)


def test_what_is_not_read_says_so_and_hides_nothing():
    found = by_name(scan(MIRRORS))
    assert found["md-five"].status is VolumeStatus.UNREADABLE
    assert "raid5 is not read here" in found["md-five"].reason
    assert found["md-three"].source is not None


def test_members_with_the_oldest_superblock_are_chained_too():
    array = by_name(scan(only(MIRRORS, 12, 13)))["md11"]
    assert content(array) == pattern(11, array.size_bytes)


TAGS = {"striped": 12, "mirror": 13, "core": 14, "raid1": 15, "raid10": 16, "raid0": 17}


@pytest.mark.parametrize("name", TAGS)
def test_a_logical_volume_reads_as_the_kernel_wrote_it(name: str):
    volume = by_name(scan(LVM))[f"vg0-{name}"]
    assert volume.size_bytes == 1 << 20
    assert content(volume) == pattern(TAGS[name], 1 << 20)


def test_a_linear_volume_over_two_disks_has_what_was_written_after_its_snapshot():
    want = bytearray(pattern(11, 2 << 20))
    want[65536:131072] = pattern(21, 65536, 65536)
    assert content(by_name(scan(LVM))["vg0-linear"]) == want


def test_a_thin_volume_and_its_snapshot_each_have_their_own():
    found = by_name(scan(LVM))
    want = bytearray(8 << 20)
    want[: 1 << 20] = pattern(19, 1 << 20)
    want[4 << 20 : (4 << 20) + 524288] = pattern(19, 524288, 4 << 20)
    assert content(found["vg0-thinsnap"]) == want
    want[65536 : 65536 + 131072] = pattern(20, 131072, 65536)
    assert content(found["vg0-thin"]) == want


def test_each_logical_volume_is_listed_once_and_the_hidden_ones_are_not():
    found = scan(LVM)
    names = [volume.name for volume in found.volumes if volume.name.startswith("vg0")]
    kinds = "core cow linear mirror other pool raid0 raid1 raid10 raid5 striped thin thinsnap"
    assert names == [f"vg0-{name}" for name in kinds.split()]
    rows = by_name(found)
    assert rows["vg0-raid5"].reason == "segments of type raid5 are not read here"
    assert rows["vg0-pool"].status is VolumeStatus.PART
    assert "volume group vg0" in rows["0"].reason


@pytest.mark.parametrize(
    ("missing", "whole"),
    [
        (0, "mirror raid0 raid1 raid10 thin thinsnap"),
        (1, "mirror core raid0 raid1 raid10 thin thinsnap other"),
        (2, "mirror core raid1 raid10 thin thinsnap other linear striped"),
        (3, "mirror core raid1 raid10 other linear striped"),
    ],
)
def test_with_a_disk_missing_a_volume_is_whole_or_says_why_not(missing: int, whole: str):
    complete = by_name(scan(LVM))
    found = scan({number: data for number, data in LVM.items() if number != missing})
    assert any("is missing" in note for note in found.notes)
    same = set()
    for name, volume in by_name(found).items():
        if not name.startswith("vg0-") or volume.status is VolumeStatus.PART:
            continue
        try:
            if volume.source is not None and content(volume) == content(complete[name]):
                same.add(name.removeprefix("vg0-"))
        except XbfsError as error:
            assert "is not there" in error.message  # noqa: PT017 - a volume may be readable in part
        if volume.source is None:
            assert volume.reason
    assert same == set(whole.split())


def test_a_linear_volume_is_readable_where_its_disk_is_there():
    volume = by_name(scan({number: data for number, data in LVM.items() if number != 1}))["vg0-linear"]
    assert volume.source is not None
    assert volume.source.read_at(0, 65536) == pattern(11, 65536)
    with pytest.raises(XbfsError, match="is not there"):
        volume.source.read_at(1 << 20, 4096)
    assert "not there" in volume.reason


def test_two_disks_that_claim_to_be_one_are_both_not_used():
    found = scan({**LVM, 9: LVM[0]})
    assert any("none is used" in note for note in found.notes)
    rows = by_name(found)
    assert rows["vg0-striped"].source is None
    assert content(rows["vg0-raid0"]) == pattern(17, 1 << 20)


def test_a_disk_that_is_there_twice_is_never_half_of_each():
    """As when two restore points' disks were mixed up: an array or a filesystem is put together of one set only."""
    for disks, name in ((MD | {20: MD[1]}, "md1"), (MIRRORS | {20: MIRRORS[5]}, "md-three")):
        array = by_name(scan(disks))[name]
        assert array.source is None
        assert "two members claim place 1" in array.reason
    twice = guest_golden.image("btrfs")
    data = twice.read_at(0, twice.size_bytes)
    volumes = by_name(scan({0: data, 1: data}))
    assert volumes["0"].uuid == volumes["1"].uuid
    assert all(volume.status is VolumeStatus.FILESYSTEM for volume in volumes.values())
