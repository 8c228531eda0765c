"""Our readers of ext2/3/4 and btrfs against the kernel's: fresh images of many geometries, every fact of every path."""

from __future__ import annotations

import subprocess
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

from tests.support import linux_images
from tests.support.guest_sources import FileSource
from tests.support.guest_tree import first_difference, kernel_facts, reader_facts
from xbfs_engine.core.errors import GuestDamaged, GuestLocked
from xbfs_engine.guestfs.base import VolumeState
from xbfs_engine.guestfs.explorer.btrfs import BtrfsVolume, open_btrfs
from xbfs_engine.guestfs.explorer.ext import open_ext

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from xbfs_engine.guestfs.base import GuestFilesystem

EXT = {
    "ext4": ("ext4", ("-b", "4096")),
    "inline data and attributes in inodes": ("ext4", ("-O", "inline_data,ea_inode")),
    "small blocks, meta_bg": ("ext4", ("-b", "1024", "-O", "meta_bg,^resize_inode", "-N", "20000")),
    "without extents, small inodes": (
        "ext4",
        ("-O", "^extents,^metadata_csum,^64bit,^flex_bg,^huge_file", "-I", "128"),
    ),
    "many levels of directories' indexes": ("ext4", ("-b", "1024", "-O", "large_dir")),
    "clusters of 64 KiB (bigalloc)": ("ext4", ("-O", "bigalloc", "-C", "65536")),
    "clusters and small blocks": ("ext4", ("-b", "1024", "-O", "bigalloc,meta_bg,^resize_inode", "-N", "20000")),
    "no file types": ("ext4", ("-O", "^filetype")),
    "ext3": ("ext3", ()),
    "ext2": ("ext2", ("-b", "1024")),
}
needs_ext4 = pytest.mark.skipif(bool(linux_images.why_not("ext4")), reason=linux_images.why_not("ext4"))
needs_btrfs = pytest.mark.skipif(bool(linux_images.why_not("btrfs")), reason=linux_images.why_not("btrfs"))


@contextmanager
def opened(image: Path, kind: str) -> Iterator[GuestFilesystem]:
    with FileSource(image) as source:
        yield open_btrfs(source) if kind == "btrfs" else open_ext(source)


@needs_ext4
@pytest.mark.parametrize("name", EXT)
def test_ext_is_as_the_kernel_sees_it(name: str, tmp_path: Path) -> None:
    kind, options = EXT[name]
    image, point = tmp_path / "image", tmp_path / "mount"
    joined = " ".join(options)
    linux_images.make(image, kind, *options, size_bytes=(512 if "bigalloc" in joined else 128) << 20)
    with linux_images.mounted(image, point, kind) as root:
        linux_images.populate(
            root,
            xattr_bytes=15_000 if "ea_inode" in joined else 600,
            wide_times="128" not in options and kind == "ext4",
        )
        if kind == "ext4" and "^extents" not in joined:
            linux_images.unwritten(root / "reserved")
    with linux_images.mounted(image, point, kind, "ro") as root:
        kernels = kernel_facts(root)
    with opened(image, kind) as volume:
        assert first_difference(reader_facts(volume), kernels) == ""
        assert volume.info.state is VolumeState.CLEAN


DIRTY = {
    "plain": ("-O", "^metadata_csum,^64bit"),
    "1 KiB": ("-b", "1024"),
    "csum": (),
    "clusters": ("-b", "1024", "-O", "bigalloc,^resize_inode"),
}


@needs_ext4
@pytest.mark.parametrize(
    ("kind", "options"),
    [(kind, options) for kind in ("ext3", "ext4") for options in DIRTY if (kind, options) != ("ext3", "clusters")],
)
def test_every_fsynced_file_comes_from_the_journal(kind: str, options: str, tmp_path: Path) -> None:
    image, copy, point = tmp_path / "image", tmp_path / "copy", tmp_path / "mount"
    linux_images.make(image, kind, *DIRTY[options])
    # On ext4 without metadata checksums: those of the journal's first version.
    with linux_images.mounted(image, point, kind, *["journal_checksum"] * (kind == "ext4")) as root:
        linux_images.change_and_copy(root, image, copy)
    with opened(copy, kind) as volume:
        ours = reader_facts(volume)
        assert volume.info.state is VolumeState.REPLAYED
    # The kernel replays the journal of its own copy.
    with linux_images.mounted(copy, point, kind) as root:
        kernels = kernel_facts(root)
        content = [(root / "new" / f"{number:03}").read_bytes() for number in range(linux_images.FSYNCED)]
    assert content == [linux_images.fsynced_content(number) for number in range(linux_images.FSYNCED)]
    assert first_difference(ours, kernels) == ""


@needs_ext4
def test_fast_commits_are_not_passed_over_in_silence(tmp_path: Path) -> None:
    image, copy, point = tmp_path / "image", tmp_path / "copy", tmp_path / "mount"
    linux_images.make(image, "ext4", "-O", "fast_commit")
    with linux_images.mounted(image, point, "ext4") as root:
        linux_images.change_and_copy(root, image, copy)
    with opened(copy, "ext4") as volume:
        new = volume.lookup(volume.root, b"new")
        found = len(list(volume.list(new.node))) if new else 0
        assert volume.info.state is (VolumeState.REPLAYED if found == linux_images.FSYNCED else VolumeState.DIRTY)
        assert found == linux_images.FSYNCED or "fast commits" in volume.info.reason


BTRFS = {
    "as it comes": ((), ""),
    "zstd, sha256": (("--csum", "sha256"), "compress-force=zstd"),
    "zlib, blake2": (("--csum", "blake2"), "compress-force=zlib"),
    "lzo, xxhash": (("--csum", "xxhash"), "compress-force=lzo"),
    "mixed groups, large nodes": (("-M", "-n", "4096"), ""),
    "holes are stored": (("-O", "^no-holes", "-n", "65536"), "max_inline=0"),
    "one copy, no checksums": (("-m", "single"), "nodatasum"),
}


@needs_btrfs
@pytest.mark.parametrize("name", BTRFS)
def test_btrfs_is_as_the_kernel_sees_it(name: str, tmp_path: Path) -> None:
    options, mount = BTRFS[name]
    image, point = tmp_path / "image", tmp_path / "mount"
    linux_images.make(image, "btrfs", *options, size_bytes=256 << 20)
    with linux_images.mounted(image, point, "btrfs", *filter(None, [mount])) as root:
        linux_images.populate(root, xattr_bytes=3000)
        linux_images.unwritten(root / "reserved")
    with linux_images.mounted(image, point, "btrfs", "ro") as root:
        kernels = kernel_facts(root)
    with opened(image, "btrfs") as volume:
        assert first_difference(reader_facts(volume), kernels) == ""
        assert volume.info.state is VolumeState.CLEAN


@needs_btrfs
def test_subvolumes_and_snapshots_are_as_the_kernel_sees_them(tmp_path: Path) -> None:
    image, point = tmp_path / "image", tmp_path / "mount"
    linux_images.make(image, "btrfs", size_bytes=256 << 20)

    def btrfs(*arguments: str) -> None:
        subprocess.run(["btrfs", *arguments], check=True, capture_output=True)

    with linux_images.mounted(image, point, "btrfs") as root:
        btrfs("subvolume", "create", str(root / "sub"))
        (root / "sub" / "file").write_bytes(b"of a subvolume")
        btrfs("subvolume", "create", str(root / "sub" / "below"))
        (root / "sub" / "below" / "file").write_bytes(b"further down")
        for number in range(3):
            # Each holds the names of those before it, and what was below, as empty directories.
            btrfs("subvolume", "snapshot", "-r", str(root / "sub"), str(root / "sub" / f"snapshot{number}"))
        (root / "sub" / "file").write_bytes(b"changed since")
        btrfs("subvolume", "create", str(root / "gone"))
        btrfs("subvolume", "delete", str(root / "gone"))
        btrfs("subvolume", "set-default", str(root / "sub"))
    with linux_images.mounted(image, point, "btrfs", "ro", "subvolid=5") as root:
        kernels = kernel_facts(root)
    with opened(image, "btrfs") as volume:
        ours = reader_facts(volume)
        # Linux tells subvolumes apart by device; empty directories of snapshots have the time of their looking.
        empty = [path for path, facts in kernels.items() if facts.inode == 2]
        assert len(empty) == 3 + 2 + 1
        for path in kernels:
            changed = {"inode": 0} | ({"times": (0, 0, 0)} if path in empty else {})
            kernels[path] = kernels[path]._replace(**changed)
            ours[path] = ours[path]._replace(**changed)
        assert first_difference(ours, kernels) == ""
        assert isinstance(volume, BtrfsVolume)
        (sub,) = [entry for entry in volume.list(volume.root) if entry.name == b"sub"]
        assert volume.default_subvolume == sub.node
        inodes = [volume.stat(entry.node).inode for entry in volume.list(sub.node)]
        assert len(set(inodes)) == len(inodes)


@needs_btrfs
def test_btrfs_reads_the_good_copy(tmp_path: Path) -> None:
    image, point = tmp_path / "image", tmp_path / "mount"
    linux_images.make(image, "btrfs", "-m", "dup", "-d", "dup", size_bytes=256 << 20)
    with linux_images.mounted(image, point, "btrfs") as root:
        (root / "file").write_bytes(b"find me " * 10_000)
    raw = bytearray(image.read_bytes())
    first = raw.find(b"find me " * 512)
    second = raw.find(b"find me " * 512, first + 80_000)
    assert 0 < first < second
    spoilt = bytearray(raw)
    spoilt[first : first + 100] = bytes(100)
    with opened_bytes(tmp_path / "spoilt", spoilt) as volume:
        (entry,) = volume.list(volume.root)
        assert volume.read(entry.node, 0, 80_000) == b"find me " * 10_000
    spoilt[second : second + 100] = bytes(100)
    with opened_bytes(tmp_path / "spoilt", spoilt) as volume:
        (entry,) = volume.list(volume.root)
        with pytest.raises(GuestDamaged, match="checksum"):
            volume.read(entry.node, 0, 80_000)
        assert volume.read(entry.node, 40_000, 40_000) == b"find me " * 5_000


@contextmanager
def opened_bytes(path: Path, raw: bytes | bytearray) -> Iterator[GuestFilesystem]:
    path.write_bytes(raw)
    with opened(path, "btrfs") as volume:
        yield volume


@needs_btrfs
def test_a_log_tree_is_not_passed_over_in_silence(tmp_path: Path) -> None:
    image, copy, point = tmp_path / "image", tmp_path / "copy", tmp_path / "mount"
    linux_images.make(image, "btrfs", size_bytes=256 << 20)
    with linux_images.mounted(image, point, "btrfs", "commit=300") as root:
        linux_images.change_and_copy(root, image, copy)
    with opened(copy, "btrfs") as volume:
        assert volume.info.state is VolumeState.DIRTY
        assert "synced" in volume.info.reason
        assert volume.lookup(volume.root, b"appended") is not None


@needs_ext4
def test_a_file_system_made_from_a_tree_with_blocks_of_64_kib(tmp_path: Path) -> None:
    """Which this kernel need not be able to mount."""
    image, folder = tmp_path / "image", tmp_path / "tree"
    folder.mkdir()
    for number in range(300):
        (folder / f"name of entry {number}").write_bytes(b"%d" % number * number)
    linux_images.make(image, "ext4", "-b", "65536", "-d", str(folder))
    with opened(image, "ext4") as volume:
        ours = reader_facts(volume)
    theirs = kernel_facts(folder)
    del ours["lost+found"]
    facts = [
        {path: (f.kind, f.mode, f.size, f.content) for path, f in side.items() if f.kind == "f"}
        for side in (ours, theirs)
    ]
    assert facts[0] == facts[1]


@needs_ext4
def test_files_encrypted_by_fscrypt_are_refused(tmp_path: Path) -> None:
    image, point = tmp_path / "image", tmp_path / "mount"
    linux_images.make(image, "ext4", "-O", "encrypt")
    with linux_images.mounted(image, point, "ext4") as root:
        (root / "file").write_bytes(b"a" * 5000)
        (root / "dir").mkdir()
        (root / "dir" / "inside").write_bytes(b"")
    # EXT4_ENCRYPT_FL, as fscrypt sets it.
    for path, flags in (("file", 0x80800), ("dir", 0x80800)):
        subprocess.run(["debugfs", "-w", "-R", f"set_inode_field {path} flags {flags:#x}", str(image)], check=True)
    with opened(image, "ext4") as volume:
        found = {entry.name: entry.node for entry in volume.list(volume.root)}
        assert volume.stat(found[b"file"]).size_bytes == 5000
        with pytest.raises(GuestLocked, match="encrypted"):
            volume.read(found[b"file"], 0, 10)
        with pytest.raises(GuestLocked, match="encrypted"):
            list(volume.list(found[b"dir"]))
