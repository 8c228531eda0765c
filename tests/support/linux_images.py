"""ext2/3/4 and btrfs images made by mkfs and filled by the kernel through a loop mount, with the traps of a reader.

Needs root, loop devices, the mkfs and a kernel with the filesystem: ``why_not()`` tells what is missing.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from tests.support import xfs_images
from tests.support.xfs_images import pattern

if TYPE_CHECKING:
    from collections.abc import Iterator

EPOCH_BITS_S = (-(1 << 31), -1, 0, 1, (1 << 31) - 1, 1 << 31, 4_102_444_800, 13_569_465_600, 15_032_385_535)
"""The ends of what ext4's inodes of 256 bytes hold, and between."""


def why_not(kind: str) -> str:
    if os.geteuid() != 0:
        return "mounting needs root"
    if shutil.which(f"mkfs.{kind}") is None:
        return f"mkfs.{kind} is not installed"
    if not Path("/dev/loop-control").exists():
        return "there are no loop devices"
    return "" if f"\t{kind}\n" in Path("/proc/filesystems").read_text() else f"the kernel has no {kind}"


def make(path: Path, kind: str, *options: str, size_bytes: int = 128 << 20) -> None:
    with path.open("wb") as file:
        file.truncate(size_bytes)
    quiet = ("-q", "-F") if kind.startswith("ext") else ("-q", "-f")
    subprocess.run([f"mkfs.{kind}", *quiet, *options, str(path)], check=True, capture_output=True)


@contextmanager
def mounted(image: Path, point: Path, kind: str, *options: str) -> Iterator[Path]:
    point.mkdir(exist_ok=True)
    joined = ",".join(("loop", "noatime", *options))
    subprocess.run(["mount", "-t", kind, "-o", joined, str(image), str(point)], check=True)
    try:
        yield point
    finally:
        subprocess.run(["umount", str(point)], check=True)


def populate(root: Path, *, xattr_bytes: int, many: int = 1500, wide_times: bool = True) -> None:
    """``xattr_bytes`` is what fits into one attribute, 0 if there are none."""
    xfs_images._names(root / "names")
    xfs_images._directories(root, many)
    _files(root / "files")
    _fragmented(root / "fragmented")
    _special(root / "special", EPOCH_BITS_S if wide_times else EPOCH_BITS_S[:5])
    if xattr_bytes:
        _xattrs(root / "xattrs", xattr_bytes)


def _files(folder: Path) -> None:
    folder.mkdir()
    for size in (0, 1, 50, 59, 60, 61, 100, 150, 511, 2000, 4096, 4097, 1_000_003):
        (folder / f"of{size}").write_bytes(pattern(size))
    with (folder / "sparse").open("wb") as file:
        for at in (0, 1 << 20, 5 << 30):
            file.seek(at)
            file.write(pattern(5000))
    with (folder / "tail-hole").open("wb") as file:
        file.write(pattern(10_000))
        file.truncate(3 << 20)
    with (folder / "all-hole").open("wb") as file:
        file.truncate((13 << 30) + 5)
    os.link(folder / "of1", folder / "link1")
    os.link(folder / "of1", folder.parent / "link2")


def _fragmented(folder: Path) -> None:
    folder.mkdir()
    block = os.statvfs(folder).f_bsize
    for name, pieces in (("list", 3), ("tree", 40), ("deep", 1200)):
        with (folder / name).open("wb") as file:
            for piece in range(pieces):
                file.seek(2 * piece * block)
                file.write(pattern(block))


def unwritten(folder: Path) -> None:
    """Space that is reserved, within a file and behind its end, and read as zeros."""
    folder.mkdir()
    with (folder / "unwritten").open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, 1 << 20)
        os.pwrite(file.fileno(), pattern(7000), 300_000)
    with (folder / "behind").open("wb") as file:
        file.write(pattern(777))
    subprocess.run(["fallocate", "-n", "-l", "1M", str(folder / "behind")], check=True)


def _special(folder: Path, times_s: tuple[int, ...]) -> None:
    folder.mkdir()
    for length in (1, 3, 59, 60, 61, 300, 1000, 1020):
        (folder / f"symlink{length}").symlink_to("t" * length)
    (folder / "symlink-bytes").symlink_to(os.fsdecode(b"bad\xff\nname"))
    xfs_images.special_nodes(folder)
    for second in times_s:
        path = folder / f"time{second}"
        path.write_bytes(b"")
        os.utime(path, ns=(second * 10**9 + 123_456_789, second * 10**9 + 999_999_999))


def _xattrs(folder: Path, xattr_bytes: int) -> None:
    folder.mkdir()
    for name, values in (
        ("few", {"user.a": b"1", "user.empty": b"", "trusted.t": b"x", "security.capability": xfs_images.CAPABILITY}),
        ("more", {f"user.name{n}": pattern(40) for n in range(min(12, xattr_bytes // 80))}),
        ("big", {"user.big": pattern(xattr_bytes), "user.small": b"s"}),
    ):
        path = folder / name
        path.write_bytes(b"content" * 100)
        for key, value in values.items():
            os.setxattr(path, key, value)
    (folder / "acl").write_bytes(b"")
    os.setxattr(folder / "acl", "system.posix_acl_access", xfs_images.ACL_ACCESS)
    (folder / "acl-dir").mkdir()
    os.setxattr(folder / "acl-dir", "system.posix_acl_access", xfs_images.ACL_ACCESS)
    os.setxattr(folder / "acl-dir", "system.posix_acl_default", xfs_images.ACL_DEFAULT)
    (folder / "link").symlink_to("few")
    os.setxattr(folder / "link", "trusted.on-link", b"yes", follow_symlinks=False)


FSYNCED = 500


def change_and_copy(root: Path, image: Path, copy: Path) -> None:
    """What a crash-consistent snapshot holds after files were fsynced, renamed, removed and appended to."""
    (root / "new").mkdir()
    for name in ("renamed-from", "removed", "appended"):
        (root / name).write_bytes(b"old\n")
    os.sync()
    for number in range(FSYNCED):
        with (root / "new" / f"{number:03}").open("wb", buffering=0) as file:
            file.write(fsynced_content(number))
            os.fsync(file.fileno())
    (root / "renamed-from").rename(root / "renamed")
    (root / "removed").unlink()
    with (root / "appended").open("ab", buffering=0) as file:
        file.write(b"new\n")
        os.fsync(file.fileno())
    subprocess.run(["cp", "--sparse=always", str(image), str(copy)], check=True)


def fsynced_content(number: int) -> bytes:
    return f"content of {number}\n".encode() * (number % 5 + 1)
