"""Traps of single formats, on kept images with fields changed: what must be refused, what must be zeros, what must not
be listed."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

import pytest

from tests.support import guest_golden
from tests.support.guest_places import exfat_sets, ntfs_attribute, seal_exfat
from tests.support.guest_tree import content, node_of
from tests.support.xfs_images import pattern
from xbfs_engine.core.errors import GuestDamaged, GuestUnsupported
from xbfs_engine.guestfs.base import Kind
from xbfs_engine.guestfs.crc32c import crc32c
from xbfs_engine.guestfs.explorer.btrfs import open_btrfs
from xbfs_engine.guestfs.explorer.exfat import open_exfat
from xbfs_engine.guestfs.explorer.ext import open_ext
from xbfs_engine.guestfs.explorer.ntfs import open_ntfs

if TYPE_CHECKING:
    from tests.support.guest_sources import SparseSource

NO_FAT_CHAIN = 0x02
ELSEWHERE = {
    "deduplicated": 0x8000_0013,
    "in the cloud (OneDrive)": 0x9000_001A,
    "in the cloud (another provider)": 0x9000_601A,
    "archived (HSM)": 0xC000_0004,
    "virtual (ProjFS)": 0x9000_001C,
    "of nobody that is known": 0x0000_ABCD,
}


@pytest.mark.parametrize("tag", ELSEWHERE.values(), ids=ELSEWHERE)
def test_a_file_kept_elsewhere_is_refused_and_says_its_tag(tag: int) -> None:
    source = guest_golden.image("ntfs")
    node = node_of(open_ntfs(source), "links/deduplicated")
    at = ntfs_attribute(source, open_ntfs(source).stat(node).inode, 0xC0)
    at += struct.unpack("<H", source.read_at(at + 20, 2))[0]
    source.write_at(at, struct.pack("<I", tag))
    volume = open_ntfs(source)
    assert volume.stat(node).size_bytes == 5000
    with pytest.raises(GuestUnsupported, match=f"{tag:#x}"):
        volume.read(node, 0, 5000)
    with pytest.raises(GuestUnsupported, match=f"{tag:#x}"):
        list(volume.extents(node))
    reparse = {x.name: x.value for x in volume.xattrs(node)}[b"user.ntfs.reparse"]
    assert reparse[:4] == struct.pack("<I", tag)


def test_a_very_fragmented_file_has_an_attribute_list_and_no_part_of_it_may_be_missing() -> None:
    source = guest_golden.image("ntfs")
    volume = open_ntfs(source)
    node = node_of(volume, "files/fragmented")
    record = volume.stat(node).inode
    assert ntfs_attribute(source, record, 0x20)
    for piece in (0, 1, 200, 399):
        assert volume.read(node, piece * (2 << 16), 2 << 16) == pattern(4096).ljust(
            4096 if piece == 399 else 2 << 16, b"\0"
        )
    parts = extension_records(source, record)
    assert parts
    for part in parts:
        # No longer in use: what Windows leaves of a record that it has freed.
        source.write_at(part + 22, b"\0\0")
        source.write_at(part, b"BAAD")
    with pytest.raises(GuestDamaged):
        open_ntfs(source).read(node, 200 * (2 << 16), 4096)


def extension_records(source: SparseSource, base: int) -> list[int]:
    """MFT records that say they belong to ``base``."""
    return [
        number * 4096 + at
        for number, data in source.chunks.items()
        for at in range(0, 4096, 1024)
        if data[at : at + 4] == b"FILE" and int.from_bytes(data[at + 32 : at + 38], "little") == base
    ]


def test_exfat_reads_contiguous_files_without_the_table() -> None:
    source = guest_golden.image("exfat")
    at = exfat_sets(source)["of100001"]
    flags, first = source.read_at(at + 33, 1)[0], struct.unpack("<I", source.read_at(at + 52, 4))[0]
    node = node_of(open_exfat(source), "of100001")
    table = struct.unpack("<I", source.read_at(80, 4))[0] << source.read_at(108, 1)[0]
    # What the table says of a file marked NoFatChain has no meaning.
    source.write_at(table + 4 * first, struct.pack("<I", 0xFFFF_FFF7))
    source.write_at(at + 33, bytes([flags | NO_FAT_CHAIN]))
    seal_exfat(source, at)
    assert content(open_exfat(source), node) == pattern(100_001)
    source.write_at(at + 33, bytes([flags & ~NO_FAT_CHAIN]))
    seal_exfat(source, at)
    with pytest.raises(GuestDamaged):
        content(open_exfat(source), node)


@pytest.mark.parametrize("valid", [0, 1, 5000, 99_999])
def test_exfat_bytes_behind_what_was_written_are_zeros(valid: int) -> None:
    source = guest_golden.image("exfat")
    at = exfat_sets(source)["of100001"]
    node = node_of(open_exfat(source), "of100001")
    source.write_at(at + 40, struct.pack("<Q", valid))
    seal_exfat(source, at)
    volume = open_exfat(source)
    assert content(volume, node) == pattern(valid).ljust(100_001, b"\0")
    assert sum(extent.length for extent in volume.extents(node) if extent.is_data) == valid


def test_exfat_names_are_as_written_whatever_its_case_table_says() -> None:
    source = guest_golden.image("exfat")
    before = open_exfat(source)
    names = {entry.name for entry in before.list(before.root)}
    for number, data in list(source.chunks.items()):
        # The entry of the table is not looked at: its cluster may be anything.
        for at in range(0, 4096, 32):
            if data[at : at + 4] == b"\x82\0\0\0":
                source.write_at(number * 4096 + at + 20, struct.pack("<I", 0xFFFF_0000))
    volume = open_exfat(source)
    assert {entry.name for entry in volume.list(volume.root)} == names
    assert volume.lookup(volume.root, b"UPPER.TXT") is not None
    assert volume.lookup(volume.root, b"upper.txt") is None
    assert volume.lookup(volume.root, "日本語".encode()) is not None


PSEUDO = (b"$", b"\0", b"GOLDEN", b"golden", b".", b"..", b"System Volume")


@pytest.mark.parametrize("name", guest_golden.NAMES)
def test_no_volume_label_and_no_pseudo_files_are_listed(name: str) -> None:
    volume = guest_golden.opened(name)
    assert not [e.name for e in volume.list(volume.root) if e.name in (b".", b"..") or e.name.startswith(PSEUDO)]
    for pseudo in (b"$MFT", b"$MBR", b"$FAT1", b"$OrphanFiles", b"$Extend", b"GOLDEN", b"golden", b".", b".."):
        assert volume.lookup(volume.root, pseudo) is None
    if name in ("fat", "exfat", "ntfs"):
        assert volume.info.label.lower() == "golden"


ZONED, STRIPE_TREE, EXTENT_TREE_V2, UNKNOWN = 0x1000, 0x4000, 0x2000, 1 << 40


@pytest.mark.parametrize("feature", [ZONED, STRIPE_TREE, EXTENT_TREE_V2, UNKNOWN], ids=hex)
def test_btrfs_features_that_are_not_read_are_refused(feature: int) -> None:
    source = guest_golden.image("btrfs")
    superblock = bytearray(source.read_at(65_536, 4096))
    flags = struct.unpack_from("<Q", superblock, 0xBC)[0]
    struct.pack_into("<Q", superblock, 0xBC, flags | feature)
    superblock[:4] = crc32c(superblock[32:]).to_bytes(4, "little")
    source.write_at(65_536, bytes(superblock))
    with pytest.raises(GuestUnsupported):
        open_btrfs(source)


@pytest.mark.parametrize("feature", [0x1, 0x8, 0x1000, 1 << 30], ids=["compression", "journal", "dirdata", "unknown"])
def test_ext_features_that_are_not_read_are_refused(feature: int) -> None:
    source = guest_golden.image("ext4")
    flags = struct.unpack("<I", source.read_at(1024 + 0x60, 4))[0]
    source.write_at(1024 + 0x60, struct.pack("<I", flags | feature))
    guest_golden.seal("ext4", source, 0)
    with pytest.raises(GuestUnsupported):
        open_ext(source)


def test_the_reader_of_ext_lists_what_was_lost_and_found_by_its_own_name_only() -> None:
    volume = guest_golden.opened("ext4")
    kinds = {entry.name: entry.kind for entry in volume.list(volume.root)}
    assert kinds[b"lost+found"] is Kind.DIRECTORY
