"""Kept images of guests' filesystems, so that readers are tested without root and other programs.

``python -m tests.support.guest_golden`` makes them anew, as root. What they hold was told by the kernel, or is what was
written into them; never what our readers say.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import zstandard

from tests.support import linux_images, windows_images
from tests.support.guest_sources import SparseSource
from tests.support.guest_tree import Facts, kernel_facts
from xbfs_engine.guestfs.crc32c import crc32c
from xbfs_engine.guestfs.explorer.btrfs import open_btrfs
from xbfs_engine.guestfs.explorer.exfat import open_exfat
from xbfs_engine.guestfs.explorer.ext import open_ext
from xbfs_engine.guestfs.explorer.fat import open_fat
from xbfs_engine.guestfs.explorer.ntfs import open_ntfs

if TYPE_CHECKING:
    from collections.abc import Callable

    from xbfs_engine.formats.source import BlockSource
    from xbfs_engine.guestfs.base import GuestFilesystem

GOLDEN = Path(__file__).parents[1] / "golden" / "guests"

NAMES: dict[str, Callable[[BlockSource], GuestFilesystem]] = {
    "ext4": open_ext,
    "ext4-dirty": open_ext,
    "ext3-dirty": open_ext,
    "btrfs": open_btrfs,
    "ntfs": open_ntfs,
    "fat": open_fat,
    "exfat": open_exfat,
}


@cache
def _image(name: str) -> SparseSource:
    return SparseSource.unpack((GOLDEN / f"{name}.img.zst").read_bytes())


def image(name: str) -> SparseSource:
    """A copy of a kept image."""
    return _image(name).copy()


def opened(name: str) -> GuestFilesystem:
    return NAMES[name](image(name))


def kernel_said(name: str) -> dict[str, Facts]:
    """Of ext and btrfs: every fact of every path."""
    return {path: Facts(*_tuples(values)) for path, values in _load(name).items()}


def contents(name: str) -> dict[str, str]:
    """Of NTFS, FAT and exFAT: the digest of each file that was written, by path."""
    loaded: dict[str, str] = {path: str(digest) for path, digest in _load(name).items()}
    return loaded


def seal(name: str, source: SparseSource, number: int) -> None:
    """Makes checksums right again: damage behind wrong ones never reaches the parsers."""
    block = source.chunks[number]
    if name == "btrfs" and block[32:48] == source.read_at(65_536 + 32, 16):
        # The superblock and tree blocks of this image are of 4096 bytes.
        source.write_at(number * 4096, crc32c(block[32:]).to_bytes(4, "little"))
    elif number == 0 and name.startswith("ext4"):
        source.write_at(2044, (crc32c(block[1024:2044]) ^ 0xFFFF_FFFF).to_bytes(4, "little"))


def _load(name: str) -> dict[str, list[object]]:
    packed = (GOLDEN / f"{name}.json.zst").read_bytes()
    loaded: dict[str, list[object]] = json.loads(zstandard.ZstdDecompressor().decompress(packed))
    return loaded


def _tuples(values: list[object]) -> list[object]:
    return [tuple(_tuples(value)) if isinstance(value, list) else value for value in values]


def _keep(name: str, path: Path, held: object) -> None:
    GOLDEN.mkdir(exist_ok=True)
    (GOLDEN / f"{name}.img.zst").write_bytes(SparseSource.of_file(path).pack())
    packed = zstandard.ZstdCompressor(level=19).compress(json.dumps(held).encode())
    (GOLDEN / f"{name}.json.zst").write_bytes(packed)


def _digests(root: Path) -> dict[str, str]:
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in root.rglob("*")
        if path.is_file() and not path.is_symlink()
    }


def _make_linux(folder: Path) -> None:
    path, point = folder / "image", folder / "mount"
    linux_images.make(path, "ext4", "-b", "1024", "-J", "size=1", "-O", "inline_data", size_bytes=24 << 20)
    with linux_images.mounted(path, point, "ext4") as root:
        linux_images.populate(root, xattr_bytes=600, many=400)
        linux_images.unwritten(root / "reserved")
    with linux_images.mounted(path, point, "ext4", "ro") as root:
        _keep("ext4", path, kernel_facts(root))
    for kind, options in (("ext4", ()), ("ext3", ())):
        copy = folder / "copy"
        linux_images.make(path, kind, "-b", "1024", "-J", "size=2", *options, size_bytes=16 << 20)
        with linux_images.mounted(path, point, kind) as root:
            linux_images.change_and_copy(root, path, copy)
        kept = SparseSource.of_file(copy)
        with linux_images.mounted(copy, point, kind) as root:
            held = kernel_facts(root)
        copy.unlink()
        with copy.open("wb") as file:
            file.truncate(kept.size_bytes)
            for number, data in kept.chunks.items():
                os.pwrite(file.fileno(), data, number * len(data))
        _keep(f"{kind}-dirty", copy, held)
    linux_images.make(path, "btrfs", "-M", "-n", "4096", "-s", "4096", size_bytes=32 << 20)
    with linux_images.mounted(path, point, "btrfs", "compress=zstd") as root:
        linux_images.populate(root, xattr_bytes=1000, many=120)
    with linux_images.mounted(path, point, "btrfs", "ro") as root:
        _keep("btrfs", path, kernel_facts(root))


def _make_windows(folder: Path) -> None:
    path, point, tree = folder / "image", folder / "mount", folder / "tree"
    windows_images.make_ntfs(path, size_bytes=32 << 20)
    with windows_images.mounted_ntfs(path, point) as root:
        known = windows_images.populate_ntfs(root, folder, many=150)
        held = {name: hashlib.sha256(content).hexdigest() for name, content in known.items()}
        for top in ("dir", "many", "files"):
            held |= {f"{top}/{name}": digest for name, digest in _digests(root / top).items()}
    _keep("ntfs", path, held)
    tree.mkdir()
    windows_images.populate_fat(tree, many=100)
    windows_images.make_fat(path, 16, "-s", "4", size_bytes=16 << 20)
    windows_images.copy_to_fat(path, tree)
    _keep("fat", path, _digests(tree))
    windows_images.make_exfat(path, size_bytes=8 << 20)
    with windows_images.mounted_exfat(path, point) as root:
        for source in sorted(tree.rglob("*")):
            copy = root / source.relative_to(tree)
            copy.mkdir() if source.is_dir() else copy.write_bytes(source.read_bytes())
    _keep("exfat", path, _digests(tree))


def main() -> int:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as scratch:
        _make_linux(Path(scratch))
        _make_windows(Path(scratch))
    return 0


if __name__ == "__main__":
    sys.exit(main())
