"""Traps that only real writers set: large directories, long extents, dirty copies, several devices."""

from __future__ import annotations

import os
import shutil
import subprocess
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

from tests.support import linux_images, windows_images
from tests.support.guest_sources import FileSource
from tests.support.guest_tree import content, first_difference, kernel_facts, node_of, reader_facts
from tests.support.xfs_images import pattern
from xbfs_engine.core.errors import GuestDamaged, GuestUnsupported
from xbfs_engine.guestfs.base import Kind, VolumeState
from xbfs_engine.guestfs.explorer.btrfs import open_btrfs
from xbfs_engine.guestfs.explorer.exfat import open_exfat
from xbfs_engine.guestfs.explorer.ext import open_ext
from xbfs_engine.guestfs.explorer.fat import open_fat
from xbfs_engine.guestfs.explorer.ntfs import open_ntfs

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

MIB = 1 << 20
OPENERS = {"ext4": open_ext, "ext2": open_ext, "btrfs": open_btrfs}
needs_ext4 = pytest.mark.skipif(bool(linux_images.why_not("ext4")), reason=linux_images.why_not("ext4"))
needs_btrfs = pytest.mark.skipif(bool(linux_images.why_not("btrfs")), reason=linux_images.why_not("btrfs"))
NTFS_MISSING = windows_images.why_not("ntfs-3g", "mkntfs")
needs_ntfs = pytest.mark.skipif(bool(NTFS_MISSING), reason=NTFS_MISSING)
EXFAT_MISSING = windows_images.why_not("mkfs.exfat", "mount.exfat-fuse", "losetup")
FAT_MISSING = windows_images.why_not("mkfs.fat", "mcopy", mounts=False)


@pytest.mark.parametrize("kind", [pytest.param("ext4", marks=needs_ext4), pytest.param("btrfs", marks=needs_btrfs)])
def test_a_hundred_thousand_names_none_missing_and_none_that_is_gone(kind: str, tmp_path: Path) -> None:
    image, point = tmp_path / "image", tmp_path / "mount"
    linux_images.make(image, kind, *(("-N", "150000") if kind == "ext4" else ()), size_bytes=512 * MIB)
    with linux_images.mounted(image, point, kind) as root:
        (root / "many").mkdir()
        for number in range(100_000):
            os.mknod(root / "many" / f"a name of entry {number}", 0o600)
        # Blocks of an index keep what was deleted: it must not come back.
        for number in range(0, 100_000, 7):
            (root / "many" / f"a name of entry {number}").unlink()
    with FileSource(image) as source:
        volume = OPENERS[kind](source)
        node = node_of(volume, "many")
        found = {}
        cookie = 0
        while page := [entry for _, entry in zip(range(9_999), volume.list(node, cookie), strict=False)]:
            found.update((entry.name, entry.node) for entry in page)
            cookie = page[-1].cookie
        assert set(found) == {b"a name of entry %d" % number for number in range(100_000) if number % 7}
        assert len(set(found.values())) == len(found)
        assert volume.lookup(node, b"a name of entry 99999") is not None
        assert volume.lookup(node, b"a name of entry 7") is None


@needs_ext4
def test_the_longest_extents_and_links(tmp_path: Path) -> None:
    image, point = tmp_path / "image", tmp_path / "mount"
    # Nothing may lie between the groups.
    apart = ("-O", "sparse_super2,^resize_inode", "-E", "num_backup_sb=0,packed_meta_blocks=1")
    linux_images.make(image, "ext4", "-b", "1024", *apart, size_bytes=160 * MIB)
    with linux_images.mounted(image, point, "ext4") as root:
        # 32768 blocks of 1 KiB are the longest written extent, 32767 the longest that is not written.
        subprocess.run(["fallocate", "-l", f"{32767 << 10}", str(root / "reserved")], check=True)
        with (root / "written").open("wb") as file:
            for number in range(32):
                file.write(bytes([number]) * MIB)
                # What is written in two steps becomes one extent.
                if number in (15, 31):
                    file.flush()
                    os.fsync(file.fileno())
    with linux_images.mounted(image, point, "ext4", "ro") as root:
        kernels = kernel_facts(root)
    for name, longest in (("reserved", "32767"), ("written", "32768")):
        told = subprocess.run(["debugfs", "-R", f"ex {name}", str(image)], capture_output=True, text=True, check=True)
        assert longest in told.stdout.split()
    with FileSource(image) as source:
        assert first_difference(reader_facts(open_ext(source)), kernels) == ""
    linux_images.make(image, "ext4", "-b", "4096")
    with linux_images.mounted(image, point, "ext4") as root:
        for length in (2001, 4095):
            (root / f"link{length}").symlink_to("t" * length)
    with FileSource(image) as source:
        volume = open_ext(source)
        for length in (2001, 4095):
            assert volume.readlink(node_of(volume, f"link{length}")) == b"t" * length


@needs_ext4
def test_a_copy_of_a_mounted_ext2_is_dirty(tmp_path: Path) -> None:
    image, copy, point = tmp_path / "image", tmp_path / "copy", tmp_path / "mount"
    linux_images.make(image, "ext2")
    with linux_images.mounted(image, point, "ext2") as root:
        linux_images.change_and_copy(root, image, copy)
    with FileSource(copy) as source:
        info = open_ext(source).info
    assert info.state is VolumeState.DIRTY
    assert "no journal" in info.reason


@needs_ntfs
def test_a_copy_of_a_mounted_ntfs_holds_all_that_was_synced_or_is_dirty(tmp_path: Path) -> None:
    image, copy, point = tmp_path / "image", tmp_path / "copy", tmp_path / "mount"
    windows_images.make_ntfs(image)
    with windows_images.mounted_ntfs(image, point) as root:
        linux_images.change_and_copy(root, image, copy)
    with FileSource(copy) as source:
        holds_all_or_is_dirty(open_ntfs(source))


@pytest.mark.skipif(bool(EXFAT_MISSING), reason=EXFAT_MISSING)
def test_a_copy_of_a_mounted_exfat_holds_all_that_was_synced_or_is_dirty(tmp_path: Path) -> None:
    image, copy, point = tmp_path / "image", tmp_path / "copy", tmp_path / "mount"
    windows_images.make_exfat(image)
    with windows_images.mounted_exfat(image, point) as root:
        linux_images.change_and_copy(root, image, copy)
    with FileSource(copy) as source:
        holds_all_or_is_dirty(open_exfat(source))


def holds_all_or_is_dirty(volume) -> None:
    if volume.info.state is VolumeState.DIRTY:
        assert volume.info.reason
        return
    for number in range(linux_images.FSYNCED):
        assert content(volume, node_of(volume, f"new/{number:03}")) == linux_images.fsynced_content(number)
    assert volume.lookup(volume.root, b"renamed") is not None
    assert volume.lookup(volume.root, b"removed") is None
    assert content(volume, node_of(volume, "appended")) == b"old\nnew\n"


ODD = 16 * MIB + 4096 + 1536
"""No multiple of any cluster or block."""


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param("ext4", marks=needs_ext4),
        pytest.param("ntfs", marks=needs_ntfs),
        pytest.param("fat", marks=pytest.mark.skipif(bool(FAT_MISSING), reason=FAT_MISSING)),
    ],
)
def test_a_device_that_ends_within_a_cluster(kind: str, tmp_path: Path) -> None:
    image, point, folder = tmp_path / "image", tmp_path / "mount", tmp_path / "tree"
    folder.mkdir()
    # Filled to the brim, so that the last cluster is used.
    wanted = {f"file{number}": pattern(50_000 + number) for number in range(300)}
    if kind == "fat":
        windows_images.make_fat(image, 16, "-s", "8", size_bytes=ODD)
        for name, data in wanted.items():
            (folder / name).write_bytes(data)
        names = [str(folder / name) for name in wanted]
        subprocess.run(["mcopy", "-i", str(image), *names, "::"], check=True, env=os.environ | windows_images.MTOOLS)
    elif kind == "ntfs":
        windows_images.make_ntfs(image, "-z", "1", size_bytes=ODD)
        with windows_images.mounted_ntfs(image, point) as root:
            wanted = fill(root, wanted)
    else:
        linux_images.make(image, kind, "-b", "4096", size_bytes=ODD)
        with linux_images.mounted(image, point, kind) as root:
            wanted = fill(root, wanted)
    assert len(wanted) > 100
    with FileSource(image) as source:
        volume = {"fat": open_fat, "ntfs": open_ntfs, "ext4": open_ext}[kind](source)
        assert volume.info.size_bytes <= ODD
        for name, data in wanted.items():
            assert content(volume, node_of(volume, name)) == data


def fill(root: Path, wanted: dict[str, bytes]) -> dict[str, bytes]:
    written = {}
    for name, data in wanted.items():
        try:
            (root / name).write_bytes(data)
        except OSError:
            (root / name).unlink(missing_ok=True)
            break
        written[name] = data
    return written


@needs_ntfs
def test_compressed_and_sparse_files_of_more_than_4_gib(tmp_path: Path) -> None:
    image, point = tmp_path / "image", tmp_path / "mount"
    windows_images.make_ntfs(image)
    places = {0: pattern(100_000), 3 << 30: pattern(70_000), (4 << 30) + 65_536: b"text of a line\n" * 20_000}
    end = (5 << 30) + 13
    with windows_images.mounted_ntfs(image, point) as root:
        (root / "compressed").mkdir()
        os.setxattr(root / "compressed", "system.ntfs_attrib_be", (0x810).to_bytes(4, "big"))
        for path in (root / "compressed" / "large", root / "large"):
            with path.open("wb") as file:
                for at, data in places.items():
                    file.seek(at)
                    file.write(data)
                file.truncate(end)
        # A sparse file with a stream of its own that is sparse too.
        with (root / "large:stream").open("wb") as file:
            file.seek(3 * MIB)
            file.write(b"far out")
    with FileSource(image) as source:
        volume = open_ntfs(source)
        for path in ("compressed/large", "large"):
            node = node_of(volume, path)
            stat = volume.stat(node)
            assert stat.size_bytes == end
            assert stat.allocated_bytes < 2 * MIB
            for at, data in places.items():
                assert (
                    b"".join(volume.read(node, at + n, 60_000) for n in range(0, len(data), 60_000))[: len(data)]
                    == data
                )
                assert volume.read(node, at + len(data) + 200_000, 5000) == bytes(5000)
            assert volume.read(node, end - 13, 100) == bytes(13)
            extents = list(volume.extents(node))
            assert extents[-1].offset + extents[-1].length == end
            assert sum(extent.length for extent in extents if extent.is_data) < 2 * MIB
            source.bytes_read = 0
            assert volume.read(node, 2 << 30, MIB) == bytes(MIB)
            assert source.bytes_read < MIB
        stream = node_of(volume, "large:stream")
        assert content(volume, stream) == bytes(3 * MIB) + b"far out"


@needs_ntfs
def test_times_of_ntfs_before_1970_and_after_2038(tmp_path: Path) -> None:
    image, point = tmp_path / "image", tmp_path / "mount"
    windows_images.make_ntfs(image)
    seconds = (-11_000_000_000, -1, 0, 2**31 - 1, 2**31, 2**32 + 5, 13_569_465_600)
    with windows_images.mounted_ntfs(image, point) as root:
        for second in seconds:
            (root / f"time{second}").write_bytes(b"")
            os.utime(root / f"time{second}", ns=(second * 10**9 + 300, second * 10**9 + 123_456_700))
    with FileSource(image) as source:
        volume = open_ntfs(source)
        for second in seconds:
            stat = volume.stat(node_of(volume, f"time{second}"))
            assert (stat.mtime_ns, stat.atime_ns) == (second * 10**9 + 123_456_700, second * 10**9 + 300)


@contextmanager
def two_devices(folder: Path, *profiles: str) -> Iterator[tuple[Path, Path, Path]]:
    """A btrfs over two loop devices, mounted: its two images and the mount."""
    images = (folder / "one", folder / "two")
    devices: list[str] = []
    try:
        for image in images:
            with image.open("wb") as file:
                file.truncate(256 * MIB)
            done = subprocess.run(["losetup", "-f", "--show", str(image)], check=True, capture_output=True, text=True)
            devices.append(done.stdout.strip())
        subprocess.run(["mkfs.btrfs", "-q", "-f", *profiles, *devices], check=True, capture_output=True)
        subprocess.run(["btrfs", "device", "scan", *devices], check=True, capture_output=True)
        point = folder / "mount"
        point.mkdir()
        subprocess.run(["mount", "-t", "btrfs", devices[0], str(point)], check=True)
        try:
            yield (*images, point)
        finally:
            subprocess.run(["umount", str(point)], check=True)
    finally:
        for device in devices:
            subprocess.run(["losetup", "-d", device], check=True)


@needs_btrfs
@pytest.mark.skipif(shutil.which("losetup") is None, reason="losetup is not installed")
def test_a_btrfs_of_two_devices(tmp_path: Path) -> None:
    mirrored, striped = tmp_path / "mirrored", tmp_path / "striped"
    for folder, profiles in ((mirrored, ("-m", "raid1", "-d", "raid1")), (striped, ("-m", "raid1", "-d", "raid0"))):
        folder.mkdir()
        with two_devices(folder, *profiles) as (_, _, point):
            (point / "file").write_bytes(b"find me " * 50_000)
    for image in ("one", "two"):
        with FileSource(mirrored / image) as source:
            volume = open_btrfs(source)
            assert content(volume, node_of(volume, "file")) == b"find me " * 50_000
        # Only its names are there twice.
        with FileSource(striped / image) as source:
            volume = open_btrfs(source)
            assert volume.stat(node_of(volume, "file")).size_bytes == 400_000
            with pytest.raises(GuestUnsupported, match="RAID0"):
                content(volume, node_of(volume, "file"))
    raw = bytearray((mirrored / "one").read_bytes())
    at = raw.find(b"find me " * 512)
    raw[at : at + 100] = bytes(100)
    (mirrored / "one").write_bytes(raw)
    with FileSource(mirrored / "one") as source:
        volume = open_btrfs(source)
        with pytest.raises(GuestDamaged, match="checksum"):
            content(volume, node_of(volume, "file"))
    with FileSource(mirrored / "two") as source:
        volume = open_btrfs(source)
        assert content(volume, node_of(volume, "file")) == b"find me " * 50_000
        assert volume.stat(volume.root).kind is Kind.DIRECTORY
