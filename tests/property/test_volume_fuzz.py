"""Hostile disks: real tables, superblocks, metadata and headers, mutated, with their checksums made right again. Only
XbfsError comes out, and time, memory and reads stay bounded whatever the image claims."""

from __future__ import annotations

import json
import struct
import tracemalloc
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tests.support.volume_images import BytesSource, golden_disks, scan
from tests.support.volume_seal import (
    LUKS2,
    LVM,
    MD_CASES,
    PHYSICAL,
    TEXT,
    THIN,
    ebr_disk,
    gpt_disk,
    luks1_disk,
    luks2_disk,
    seal_gpt,
    seal_md1,
    seal_thin,
)
from xbfs_engine.core.errors import GuestDamaged, XbfsError
from xbfs_engine.formats.partitions import read_partitions
from xbfs_engine.guestfs.volumes import VolumeKey, VolumeStatus
from xbfs_engine.guestfs.volumes.luks.header import find_luks
from xbfs_engine.guestfs.volumes.luks.unlock import unlock
from xbfs_engine.guestfs.volumes.lvm.group import VolumeGroup
from xbfs_engine.guestfs.volumes.lvm.metadata import parse_metadata
from xbfs_engine.guestfs.volumes.lvm.text import parse_lvm_text
from xbfs_engine.guestfs.volumes.lvm.thin import ThinPool
from xbfs_engine.guestfs.volumes.probe import probe

if TYPE_CHECKING:
    from collections.abc import Sequence

SETTINGS = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
MEMORY_MAX = 24 << 20
MD = golden_disks("md_mirrors")
SPECIAL = (0, 1, 2, 7, 0x7F, 0x80, 0xFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 1 << 62, (1 << 64) - 1)
EDITS = st.lists(
    st.tuples(
        st.integers(0, 1 << 16), st.sampled_from((1, 2, 4, 8)), st.sampled_from(SPECIAL) | st.integers(0, 1 << 64)
    ),
    min_size=1,
    max_size=5,
)


def edit(data: bytearray, edits: Sequence[tuple[int, int, int]], start: int, length: int) -> None:
    """Overwrite whole words within a range, aligned to their size, where formats have their fields."""
    for at, size, value in edits:
        place = start + at % length // size * size
        data[place : place + size] = (value % (1 << 8 * size)).to_bytes(size, "little")


def survives(disks: dict[int, bytes], keys: tuple[VolumeKey, ...] = ()) -> None:
    """Find all volumes and read a little of each at its beginning, middle and end."""
    tracemalloc.start()
    try:
        found = scan(disks, keys)
        assert len({volume.name for volume in found.volumes}) == len(found.volumes)
        for volume in found.volumes:
            assert volume.name not in ("", ".", "..")
            assert "/" not in volume.name
            assert volume.source is not None or volume.reason
            if volume.source is None:
                assert volume.status not in (VolumeStatus.FILESYSTEM, VolumeStatus.OTHER)
                continue
            assert volume.source.size_bytes == volume.size_bytes >= 0
            for at in (0, volume.size_bytes // 2, volume.size_bytes - 4096):
                if 0 <= at <= volume.size_bytes - 4096:
                    try:
                        assert len(volume.source.read_at(at, 4096)) == 4096
                    except XbfsError:
                        continue
        assert tracemalloc.get_traced_memory()[1] < MEMORY_MAX
    finally:
        tracemalloc.stop()


@SETTINGS
@given(edits=EDITS, place=st.sampled_from(("header", "entries", "mbr")))
def test_gpt(edits: list[tuple[int, int, int]], place: str):
    disk = gpt_disk()
    start, length = {"header": (512, 92), "entries": (1024, 256), "mbr": (440, 72)}[place]
    edit(disk, edits, start, length)
    seal_gpt(disk, 1)
    survives({0: bytes(disk)})
    table = read_partitions(BytesSource(disk))
    if table is not None:
        for part in table.partitions:
            assert part.size_bytes >= 0
            assert part.start_bytes + part.size_bytes <= len(disk) or not part.size_bytes


def test_a_chain_of_logical_drives_that_comes_back_ends():
    disk = ebr_disk()
    assert [part.number for part in read_partitions(BytesSource(disk)).partitions] == [1, 5, 6, 7]
    disk[300 * 512 + 446 + 16 : 300 * 512 + 446 + 32] = struct.pack("<BxxxBxxxII", 0, 5, 100, 100)
    table = read_partitions(BytesSource(disk))
    assert [part.number for part in table.partitions] == [1, 5, 6, 7]
    assert "comes back" in table.notes[0]


@SETTINGS
@given(edits=EDITS, sector=st.sampled_from((0, 100, 200, 300)))
def test_mbr(edits: list[tuple[int, int, int]], sector: int):
    disk = ebr_disk()
    edit(disk, edits, sector * 512 + 446, 64)
    survives({0: bytes(disk)})


@SETTINGS
@given(edits=EDITS, case=st.sampled_from(sorted(MD_CASES)), all_members=st.booleans(), roles=st.booleans())
def test_md(edits: list[tuple[int, int, int]], case: str, all_members: bool, roles: bool):
    name, numbers, at = MD_CASES[case]
    disks = {number: golden_disks(name)[number] for number in numbers}
    for number in numbers if all_members else numbers[:1]:
        disk = bytearray(disks[number])
        edit(disk, edits, at + (256 if roles else 72), 16 if roles else 156)
        seal_md1(disk, at)
        disks[number] = bytes(disk)
    survives(disks)


@SETTINGS
@given(edits=EDITS, number=st.sampled_from((12, 13)))
def test_md_090(edits: list[tuple[int, int, int]], number: int):
    disk = bytearray(MD[number])
    at = (len(disk) // 65536 - 1) * 65536
    edit(disk, [(place % 1024 if place & 1 else 3968 + place % 128, *rest) for place, *rest in edits], at, 4096)
    struct.pack_into("<I", disk, at + 152, 0)
    total = sum(struct.unpack_from("<1024I", disk, at))
    struct.pack_into("<I", disk, at + 152, ((total & 0xFFFFFFFF) + (total >> 32)) & 0xFFFFFFFF)
    survives({12: MD[12], 13: MD[13], number: bytes(disk)})


WORDS = [
    b"0", b"1", b"2", b"-1", b"18446744073709551615", b"4294967296", b'"pv0"', b'"linear"', b'"raid1_rimage_0"',
    b'"vg0"', b"[", b"]", b"{", b"}", b"=", b"striped", b'"raid10"', b'"thin"', b'"mirror"', b"1.5", b"#", b'"', b"",
]  # fmt: skip


@settings(SETTINGS, max_examples=400)
@given(edits=st.lists(st.tuples(st.integers(0, len(TEXT)), st.sampled_from(WORDS), st.integers(0, 40)), max_size=4))
def test_lvm_metadata(edits: list[tuple[int, bytes, int]]):
    text = TEXT
    for at, word, cut in edits:
        end = next((n for n in range(at, len(text)) if text[n : n + 1] in b" \n\t,]["), at) if cut < 30 else at + cut
        text = text[:at] + word + text[end:]
    try:
        metadata = parse_metadata(text)
        for volume in VolumeGroup(metadata, PHYSICAL).volumes():
            assert volume.source is not None or volume.reason
            if volume.source is not None and volume.size_bytes >= 4096:
                volume.source.read_at(volume.size_bytes - 4096, 4096)
    except XbfsError:
        pass


@pytest.mark.parametrize("word", [b"0", b"1", b"-1", b"18446744073709551615", b'"x"', b"[]", b"[1, 2]", b"{ }"])
def test_each_value_of_lvm_metadata_replaced(word: bytes):
    """Every ``key = value`` in turn: what is left is read or refused, one by one."""
    lines = TEXT.split(b"\n")
    for index, line in enumerate(lines):
        key, equals, _ = line.partition(b" = ")
        if not equals:
            continue
        changed = key + (b" " + word if word == b"{ }" else b" = " + word)
        try:
            metadata = parse_metadata(b"\n".join([*lines[:index], changed, *lines[index + 1 :]]))
            VolumeGroup(metadata, PHYSICAL).volumes()
        except XbfsError:
            continue


def test_lvm_text_that_nests_or_repeats_without_end_is_refused_in_time():
    with pytest.raises(GuestDamaged, match="nested too deep"):
        parse_lvm_text(b"a {" * 100_000)
    with pytest.raises(GuestDamaged):
        parse_lvm_text(b"a = [" + b"1," * 100_000)
    with pytest.raises(GuestDamaged):
        parse_lvm_text(b'a = "' + b"\\x" * 100_000)


def test_logical_volumes_made_of_themselves_and_each_other_are_refused():
    text = TEXT.replace(b'"raid1_rimage_0"', b'"raid1"').replace(b'"core_mimage_0"', b'"core_mimage_1"')
    rows = {volume.name: volume for volume in VolumeGroup(parse_metadata(text), PHYSICAL).volumes()}
    assert rows["striped"].source is not None
    layers = b"".join(
        b"l%d { id = \"i\" status = [\"VISIBLE\"] segment_count = 2 %s }\n"
        % (n, b"".join(
            b'segment%d { start_extent = %d extent_count = 1 type = "striped" stripe_count = 1 stripes = ["l%d", 0] }'
            % (part + 1, part, n + 1) for part in (0, 1)
        )) for n in range(14)
    )  # fmt: skip
    text = b'v { id = "v" seqno = 1 extent_size = 8 logical_volumes { ' + layers + b"} }"
    assert all(volume.source is None for volume in VolumeGroup(parse_metadata(text), {}).volumes())


@SETTINGS
@given(edits=EDITS, block=st.integers(0, 40), key=st.integers(0, 1 << 64))
@example(edits=[(16, 4, 0xFFFFFFFF)], block=1, key=0)
def test_thin_metadata(edits: list[tuple[int, int, int]], block: int, key: int):
    data = bytearray(THIN)
    edit(data, edits, 4096 * block + 4, 508)
    seal_thin(data, block)
    try:
        pool = ThinPool(BytesSource(data), BytesSource(bytes(1 << 20)))
        volume = pool.volume(1, 1 << 40, None)
        volume.read_at(min(key, (1 << 40) - 4096), 4096)
        volume.read_at(0, 4096)
    except XbfsError:
        pass


def test_a_tree_of_a_thin_pool_that_leads_back_into_itself_is_refused():
    data = bytearray(THIN)
    root = struct.unpack_from("<Q", data, 320)[0]
    at = root * 4096
    flags, count = 1, struct.unpack_from("<I", data, at + 16)[0]
    struct.pack_into("<I", data, at + 4, flags)
    values = at + 32 + 8 * struct.unpack_from("<I", data, at + 20)[0]
    for index in range(count):
        struct.pack_into("<Q", data, values + 8 * index, root)
    seal_thin(data, root)
    with pytest.raises(GuestDamaged, match="deeper than"):
        ThinPool(BytesSource(data), BytesSource(bytes(1 << 20))).volume(1, 1 << 20, None)


def paths(value: object, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    found = [path]
    if isinstance(value, dict):
        for key, inner in value.items():
            found += paths(inner, (*path, key))
    return found


ODD: tuple[object, ...] = (
    None, True, -1, 0, 1, 7, 1 << 70, 1.5, "", "0", "-1", "18446744073709551616", "9" * 5000, "sha1", "aes-xts-plain64",
    "aes-cbc-essiv:sha256", "aes-cbc-essiv:md5", "argon2id", "x" * 100, "c2FsdA==", "ä", [], ["0"], [[]], {}, {"0": {}},
)  # fmt: skip


@pytest.mark.parametrize("path", paths(LUKS2)[1:], ids="/".join)
def test_each_value_of_a_luks2_header_replaced(path: tuple[str, ...]):
    for odd in ODD:
        header = json.loads(json.dumps(LUKS2))
        node = header
        for key in path[:-1]:
            node = node[key]
        node[path[-1]] = odd
        source = BytesSource(luks2_disk(json.dumps(header).encode()))
        found = find_luks(source)
        assert found is not None
        try:
            assert unlock(source, found, b"secret") is None
        except XbfsError as error:
            assert error.message  # noqa: PT017 - either answer is right


@pytest.mark.parametrize("text", [b"", b"[" * 11000, b'{"a":' * 2000, b"\xff\xfe", b"null", b"[]", b"9" * 10000, b"{}"])
def test_a_luks2_header_that_is_no_json_is_refused(text: bytes):
    found = find_luks(BytesSource(luks2_disk(text)))
    assert found is not None
    assert found.problem


@SETTINGS
@given(edits=EDITS, payload=st.binary(max_size=64))
def test_luks1(edits: list[tuple[int, int, int]], payload: bytes):
    disk = luks1_disk()
    # Iterations are left alone: a header may ask for a minute of work, and get it.
    edit(
        disk, [edit_ for edit_ in edits if not 160 <= edit_[0] % 256 < 172 and not 208 <= edit_[0] % 256 < 216], 8, 248
    )
    disk[164:168] = (1000).to_bytes(4, "big")
    disk[212:216] = (1000).to_bytes(4, "big")
    disk[4096 : 4096 + len(payload)] = payload
    survives({0: bytes(disk)}, (VolumeKey(b"secret"),))


@SETTINGS
@given(data=st.binary(max_size=2048), at=st.sampled_from((0, 3, 510, 512, 1024, 4086, 4096, 32768, 65536, 65588)))
def test_anything_at_all(data: bytes, at: int):
    disk = bytearray(1 << 17)
    disk[at : at + len(data)] = data
    survives({0: bytes(disk)})


@SETTINGS
@given(
    mark=st.sampled_from(
        (
            (3, b"NTFS    "),
            (3, b"EXFAT   "),
            (0, b"\xebX\x90mkfs"),
            (1080, b"\x53\xef"),
            (0, b"XFSB"),
            (65600, b"_BHRfS_M"),
        )
    ),
    edits=EDITS,
)
def test_first_sight_of_filesystems(mark: tuple[int, bytes], edits: list[tuple[int, int, int]]):
    disk = bytearray(1 << 17)
    disk[510:512] = b"\x55\xaa"
    disk[11:64] = struct.pack("<HBHBHHBHHHIIIxxxxI", 512, 1, 32, 2, 512, 256, 0xF8, 8, 1, 1, 0, 0, 64, 2).ljust(
        53, b"\1"
    )
    disk[mark[0] : mark[0] + len(mark[1])] = mark[1]
    base = mark[0] // 512 * 512
    edit(disk, edits, base + 11 if base == 0 else base, 400)
    disk[mark[0] : mark[0] + len(mark[1])] = mark[1]
    source = BytesSource(disk)
    found = probe(source).signature
    assert found.kind
    assert source.read_bytes < 1 << 20
    survives({0: bytes(disk)})


@pytest.mark.parametrize("size", [0, 1, 511, 512, 513, 1024, 4095, 4096, 5000, 65536, 131071])
def test_devices_of_any_size_are_looked_at(size: int):
    survives({0: bytes(size), 1: b"\xff" * size})
    survives({0: LVM[0][:size], 1: MD[4][:size], 2: bytes(gpt_disk()[:size])})


def test_more_volumes_than_any_vm_has_are_cut_short():
    disk = bytearray(1 << 20)
    entries = b"".join(
        struct.pack("<16s16sQQQ72s", b"k" * 16, number.to_bytes(16, "little"), 200 + number, 200 + number, 0, b"")
        for number in range(1024)
    )
    disk[1024 : 1024 + len(entries)] = entries
    disk[512:604] = struct.pack(
        "<8sIIIIQQQQ16sQIII", b"EFI PART", 0x10000, 92, 0, 0, 1, 2047, 34, 2000, b"d" * 16, 2, 1024, 128, 0
    )
    seal_gpt(disk, 1)
    found = scan({number: bytes(disk) for number in range(5)})
    assert len(found.volumes) == 4096
    assert found.notes[-1] == "only the first 4096 volumes are listed"
