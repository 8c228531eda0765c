"""What a volume says of its own state, and what is refused: kept images with single fields changed."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

import pytest

from tests.support import guest_golden
from tests.support.guest_places import ntfs_attribute
from tests.support.guest_tree import node_of
from tests.support.xfs_images import pattern
from xbfs_engine.core.errors import GuestDamaged, GuestLocked, GuestUnsupported
from xbfs_engine.guestfs.base import VolumeState
from xbfs_engine.guestfs.crc32c import crc32c
from xbfs_engine.guestfs.explorer.btrfs import open_btrfs
from xbfs_engine.guestfs.explorer.exfat import open_exfat
from xbfs_engine.guestfs.explorer.ext import open_ext
from xbfs_engine.guestfs.explorer.fat import open_fat
from xbfs_engine.guestfs.explorer.ntfs import open_ntfs

if TYPE_CHECKING:
    from tests.support.guest_sources import SparseSource


def value(source: SparseSource, at: int) -> int:
    return at + struct.unpack("<H", source.read_at(at + 20, 2))[0]


def test_ntfs_that_windows_would_check() -> None:
    source = guest_golden.image("ntfs")
    source.write_at(value(source, ntfs_attribute(source, 3, 0x70)) + 10, b"\1")
    info = open_ntfs(source).info
    assert info.state is VolumeState.DIRTY
    assert "checking" in info.reason


@pytest.mark.parametrize(
    ("used", "flags", "state"),
    [(0, 0, VolumeState.DIRTY), (0xFFFF, 0, VolumeState.CLEAN), (0, 2, VolumeState.CLEAN)],
)
def test_the_log_of_ntfs(used: int, flags: int, state: VolumeState) -> None:
    source = guest_golden.image("ntfs")
    run = ntfs_attribute(source, 2, 0x80)
    run += struct.unpack("<H", source.read_at(run + 32, 2))[0]
    lengths = source.read_at(run, 1)[0]
    raw = source.read_at(run + 1, (lengths & 15) + (lengths >> 4))
    first = int.from_bytes(raw[lengths & 15 :], "little") * 4096
    for page, (lsn, page_used, page_flags) in enumerate(((5, used, flags), (4, 0 if used else 0xFFFF, 0))):
        restart = bytearray(4096)
        struct.pack_into("<4sHHQIIH", restart, 0, b"RSTR", 0x1E, 9, 0, 4096, 4096, 0x30)
        struct.pack_into("<QHHHH", restart, 0x30, lsn, 1, 0xFFFF, page_used, page_flags)
        # Fixups: the last two bytes of each sector hold the number that stands before them.
        struct.pack_into("<H", restart, 0x1E, 7)
        for sector in range(8):
            struct.pack_into("<H", restart, sector * 512 + 510, 7)
        source.write_at(first + page * 4096, bytes(restart))
    assert open_ntfs(source).info.state is state


def test_encrypted_files_are_refused() -> None:
    source = guest_golden.image("ntfs")
    volume = open_ntfs(source)
    for path in ("files/of600", "files/of5000"):
        inode = volume.stat(node_of(volume, path)).inode
        at = value(source, ntfs_attribute(source, inode, 0x10)) + 32
        source.write_at(at, struct.pack("<I", 0x4020))
        fresh = open_ntfs(source)
        assert fresh.stat(node_of(fresh, path)).size_bytes == int(path.removeprefix("files/of"))
        with pytest.raises(GuestLocked, match="EFS"):
            fresh.read(node_of(fresh, path), 0, 100)


def test_bytes_behind_what_was_written_are_zeros() -> None:
    source = guest_golden.image("ntfs")
    volume = open_ntfs(source)
    node = node_of(volume, "files/of300001")
    source.write_at(ntfs_attribute(source, volume.stat(node).inode, 0x80) + 56, struct.pack("<Q", 10_000))
    volume = open_ntfs(source)
    assert volume.read(node, 0, 300_001) == pattern(10_000) + bytes(290_001)
    assert [tuple(extent) for extent in volume.extents(node)] == [(0, 10_000, True), (10_000, 290_001, False)]


def test_a_compressed_file_whose_stream_is_gone_is_not_zeros() -> None:
    source = guest_golden.image("ntfs")
    volume = open_ntfs(source)
    node = node_of(volume, "wof/lzx-32768")
    # Only how it begins: the end of a sector, where bytes are kept elsewhere, may lie within the name.
    name = "WofCom".encode("utf-16-le")
    for number, chunk in list(source.chunks.items()):
        source.chunks[number] = chunk.replace(name, b"X" + name[1:])
    with pytest.raises(GuestUnsupported, match="image file"):
        open_ntfs(source).read(node, 0, 10)


def test_a_run_list_that_ends_early_is_not_zeros() -> None:
    source = guest_golden.image("ntfs")
    volume = open_ntfs(source)
    node = node_of(volume, "files/of300001")
    at = ntfs_attribute(source, volume.stat(node).inode, 0x80)
    source.write_at(at + struct.unpack("<H", source.read_at(at + 32, 2))[0], b"\0")
    with pytest.raises(GuestDamaged, match="longer than its clusters"):
        open_ntfs(source).read(node, 0, 10)


@pytest.mark.parametrize(("offset", "change"), [(37, b"\1"), (None, b"\xff\x7f")])
def test_fat_that_was_mounted(offset: int | None, change: bytes) -> None:
    source = guest_golden.image("fat")
    if offset is None:
        reserved, sector = struct.unpack("<H", source.read_at(14, 2))[0], struct.unpack("<H", source.read_at(11, 2))[0]
        offset = reserved * sector + 2
    source.write_at(offset, change)
    assert open_fat(source).info.state is VolumeState.DIRTY


def test_exfat_that_was_mounted() -> None:
    source = guest_golden.image("exfat")
    source.write_at(106, b"\2")
    assert open_exfat(source).info.state is VolumeState.DIRTY


def test_btrfs_with_a_log_tree() -> None:
    source = guest_golden.image("btrfs")
    superblock = bytearray(source.read_at(65_536, 4096))
    struct.pack_into("<Q", superblock, 0x60, 4096)
    superblock[:4] = crc32c(superblock[32:]).to_bytes(4, "little")
    source.write_at(65_536, bytes(superblock))
    assert open_btrfs(source).info.state is VolumeState.DIRTY


def test_ext_says_that_it_has_errors() -> None:
    source = guest_golden.image("ext4")
    superblock = bytearray(source.read_at(1024, 1024))
    superblock[0x3A] |= 2
    source.write_at(1024, bytes(superblock))
    with pytest.raises(GuestDamaged, match="checksum"):
        open_ext(source)
    superblock[1020:] = (crc32c(superblock[:1020]) ^ 0xFFFF_FFFF).to_bytes(4, "little")
    source.write_at(1024, bytes(superblock))
    info = open_ext(source).info
    assert (info.state, info.reason) == (VolumeState.DIRTY, "the guest found errors in it and has not checked it since")
