"""XFS images made by mkfs.xfs and filled by the kernel through a loop mount, with every trap a reader can fall into.

Needs root, mkfs.xfs, a loop device and a kernel with XFS: ``why_not()`` tells what is missing.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import os
import shutil
import socket
import struct
import subprocess
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator

FICLONE = 0x40049409
GOING_DOWN = 0x8004587D
FALLOC_KEEP_SIZE, FALLOC_PUNCH_HOLE = 1, 2
ACL_ACCESS = bytes.fromhex("02000000 0100 0600 ffffffff 0200 0400 e8030000 0200 0600 01000080 0400 0400 ffffffff")
ACL_ACCESS += bytes.fromhex("0800 0500 07000000 1000 0700 ffffffff 2000 0000 ffffffff")
ACL_DEFAULT = bytes.fromhex("02000000 0100 0700 ffffffff 0400 0500 ffffffff 2000 0100 ffffffff")
TIMES_S = (-(1 << 31), -1, 0, 1, (1 << 31) - 1)
BIG_TIMES_S = (1 << 31, 4_102_444_800, 13_569_465_600, 16_299_260_424)


def why_not() -> str:
    if os.geteuid() != 0:
        return "mounting needs root"
    if shutil.which("mkfs.xfs") is None:
        return "mkfs.xfs is not installed"
    if not Path("/dev/loop-control").exists():
        return "there are no loop devices"
    return "" if "\txfs\n" in Path("/proc/filesystems").read_text() else "the kernel has no XFS"


def make(path: Path, *options: str, size_bytes: int = 320 << 20) -> None:
    with path.open("wb") as file:
        file.truncate(size_bytes)
    subprocess.run(["mkfs.xfs", "-q", "-f", *options, str(path)], check=True, capture_output=True)


@contextmanager
def mounted(image: Path, point: Path, *options: str) -> Iterator[Path]:
    point.mkdir(exist_ok=True)
    subprocess.run(
        ["mount", "-t", "xfs", "-o", ",".join(("loop", "noatime", *options)), str(image), str(point)], check=True
    )
    try:
        yield point
    finally:
        subprocess.run(["umount", str(point)], check=True)


def populate(root: Path, *, many: int = 3000, deep: int = 3500, bigtime: bool = True, reflink: bool = True) -> None:
    """Everything in a few seconds; ``many`` is the size of the largest directory, ``deep`` that of an extent tree."""
    _names(root / "names")
    _directories(root, many)
    _files(root / "files", reflink=reflink)
    _fragmented(root / "fragmented", deep)
    _special(root / "special", bigtime=bigtime)
    _xattrs(root / "xattrs")


def _names(folder: Path) -> None:
    folder.mkdir()
    names = [
        b"a",
        b"-rf",
        b"...",
        b" ",
        b"new\nline",
        b"back\\slash",
        b"bad\xff\xfeutf8",
        b"x" * 255,
        b"\xc3\xa9" * 127,
    ]
    names += [b"*?[", b"'\"", b"\x01\x7f", "日本語".encode(), b"CON", b"a:b", b".hidden", b"trailing ", b"tab\t"]
    for name in names:
        (folder / os.fsdecode(name)).write_bytes(name)
    deep = folder / "deep"
    for level in range(120):
        deep.mkdir()
        deep /= f"d{level}"
    deep.write_bytes(b"bottom")


def _directories(root: Path, many: int) -> None:
    """Short form, one block, one leaf, tree; and each again after most of its names went away."""
    for count in (1, 5, 40, 300, many):
        for thinned in (False, True):
            folder = root / f"dir{count}{'thin' * thinned}"
            folder.mkdir()
            for number in range(count):
                os.mknod(folder / f"{'entry' * (number % 7)}{number}", 0o600)
            for number in range(count * thinned):
                if number % 5:
                    (folder / f"{'entry' * (number % 7)}{number}").unlink()


def _files(folder: Path, *, reflink: bool) -> None:
    folder.mkdir()
    (folder / "empty").write_bytes(b"")
    for size in (1, 511, 4096, 4097, 1_000_003):
        (folder / f"of{size}").write_bytes(pattern(size))
    with (folder / "sparse").open("wb") as file:
        for at in (0, 1 << 20, 5 << 30):
            file.seek(at)
            file.write(pattern(5000))
    with (folder / "tail-hole").open("wb") as file:
        file.write(pattern(10_000))
        file.truncate(3 << 20)
    with (folder / "huge-hole").open("wb") as file:
        file.truncate((1 << 62) + 12345)
    with (folder / "unwritten").open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, 1 << 20)
        os.pwrite(file.fileno(), pattern(7000), 300_000)
    subprocess.run(["fallocate", "-n", "-l", "1M", str(folder / "of511")], check=True)
    os.link(folder / "of1", folder / "link1")
    os.link(folder / "of1", folder.parent / "link2")
    if reflink:
        with (folder / "of1000003").open("rb") as source, (folder / "clone").open("w+b") as clone:
            fcntl.ioctl(clone, FICLONE, source.fileno())
            os.fsync(clone.fileno())
            os.pwrite(clone.fileno(), b"changed" * 1000, 500_000)


def _fragmented(folder: Path, deep: int) -> None:
    """Extent lists and trees of one and two levels: every other block of a file is a hole; the blocks of two
    directories, and those of two files' attributes, lie by turns."""
    folder.mkdir()
    block = os.statvfs(folder).f_bsize
    for name, pieces in (("list", 6), ("tree", 300), ("deep", min(deep, (16 << 20) // block))):
        with (folder / name).open("wb") as file:
            data = pattern(2 * pieces * block)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            for piece in range(pieces):
                punch(file.fileno(), (2 * piece + 1) * block, block)
    for side in "ab":
        (folder / side).mkdir()
        (folder / f"attributes-{side}").write_bytes(b"")
    for number in range(500):
        for side in "ab":
            os.link(folder / "list", folder / side / f"{number:0200}")
    for number in range(80):
        for side in "ab":
            os.setxattr(folder / f"attributes-{side}", f"user.{number}", pattern(min(block, 4096)))


def special_nodes(folder: Path) -> None:
    """Devices, a fifo, a socket, and a file of large owners."""
    for name, kind, device in (
        ("block", 0o060600, os.makedev(8, 1)),
        ("char", 0o020666, os.makedev(511, 0x3_FFFF)),
        ("fifo", 0o010644, 0),
        ("whiteout", 0o020000, 0),
    ):
        os.mknod(folder / name, kind, device)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(folder / "socket"))
    owned = folder / "owned"
    owned.write_bytes(b"")
    os.chown(owned, 4_000_000_000, 3_999_999_999)
    owned.chmod(0o7751)


def _special(folder: Path, *, bigtime: bool) -> None:
    folder.mkdir()
    for length in (1, 3, 60, 300, 336, 500, 968, 969, 1000, 1023):
        (folder / f"symlink{length}").symlink_to("t" * length)
    (folder / "absolute").symlink_to("/etc/passwd")
    (folder / "symlink-bytes").symlink_to(os.fsdecode(b"bad\xff\nname"))
    special_nodes(folder)
    for second in TIMES_S + BIG_TIMES_S * bigtime:
        path = folder / f"time{second}"
        path.write_bytes(b"")
        os.utime(path, ns=(second * 10**9 + 123_456_789, second * 10**9 + 999_999_999 * (second < 1 << 31)))


def _xattrs(folder: Path) -> None:
    folder.mkdir()
    for name, values in (
        ("few", {"user.a": b"1", "user.empty": b"", "trusted.t": b"x", "security.capability": CAPABILITY}),
        ("leaf", {f"user.name{n}": pattern(40) for n in range(30)}),
        ("node", {f"user.{'long' * 40}{n}": pattern(n) for n in range(300)}),
        ("big", {f"user.big{size}": pattern(size) for size in (2000, 3000, 4000, 4097, 30_000, 65_536)}),
        ("mixed", {"user.short": b"s", "user.far": pattern(65_000), "trusted.far": pattern(5000)}),
    ):
        path = folder / name
        path.write_bytes(b"content" * 100)
        for key, value in values.items():
            os.setxattr(path, key, value)
    for number in range(40):
        os.removexattr(folder / "node", f"user.{'long' * 40}{number * 3}")
    (folder / "acl").write_bytes(b"")
    os.setxattr(folder / "acl", "system.posix_acl_access", ACL_ACCESS)
    (folder / "acl-dir").mkdir()
    os.setxattr(folder / "acl-dir", "system.posix_acl_access", ACL_ACCESS)
    os.setxattr(folder / "acl-dir", "system.posix_acl_default", ACL_DEFAULT)
    (folder / "link").symlink_to("few")
    os.setxattr(folder / "link", "trusted.on-link", b"yes", follow_symlinks=False)


CAPABILITY = struct.pack("<5I", 0x0200_0001, 1 << 10, 0, 0, 0)


def pattern(size: int) -> bytes:
    """Bytes that tell their place, of which 256 in a row are alike so that images pack well."""
    return b"".join(struct.pack("<I", number ^ 0x5A5A0000) * 64 for number in range(size // 256 + 1))[:size]


def punch(descriptor: int, offset: int, length: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    arguments = (ctypes.c_int(descriptor), ctypes.c_int(FALLOC_KEEP_SIZE | FALLOC_PUNCH_HOLE))
    if libc.fallocate(*arguments, ctypes.c_int64(offset), ctypes.c_int64(length)):
        raise OSError(ctypes.get_errno(), "fallocate")


def make_v4(path: Path, scratch: Path, *options: str, size_bytes: int = 32 << 20) -> dict[str, tuple[object, ...]]:
    """A version 4 image, which current kernels do not mount, filled by mkfs.xfs and xfs_db; returns what is in it.

    By path: kind, mode, owner, size, target, device, sha256 of the content, xattrs by their length.
    """
    holds: dict[str, tuple[object, ...]] = {}
    lines = ["/", "0 0", "d--755 0 0"]
    for number, size in enumerate((0, 1, 700, 5000, 300_000)):
        source = scratch / f"source{number}"
        source.write_bytes(pattern(size))
        lines.append(f"file{size} -u-{640 + number} {1000 + number} 70000 {source}")
        content = hashlib.sha256(pattern(size)).hexdigest()
        holds[f"file{size}"] = ("f", 0o4640 + number, (1000 + number, 70000), size, "", (0, 0), content, {})
    for length in (2, 100, 1000):
        lines.append(f"link{length} l--777 0 0 {'t' * length}")
        holds[f"link{length}"] = ("l", 0o777, (0, 0), length, "t" * length, (0, 0), "", {})
    for name, letter, device in (("block", "b", (8, 17)), ("char", "c", (300, 70_000)), ("fifo", "p", (0, 0))):
        lines.append(f"{name} {letter}--600 0 5 " + ("" if letter == "p" else f"{device[0]} {device[1]}"))
        holds[name] = (letter, 0o600, (0, 5), 0, "", device, "", {})
    for count in (3, 60, 400, 3000):
        lines.append(f"dir{count} d-g711 1 2")
        holds[f"dir{count}"] = ("d", 0o2711, (1, 2), None, "", (0, 0), "", {})
        for number in range(count):
            name = f"{'entry' * (number % 7)}{number}"
            lines.append(f"{name} p--600 0 0")
            holds[f"dir{count}/{name}"] = ("p", 0o600, (0, 0), 0, "", (0, 0), "", {})
        lines.append("$")
    prototype = scratch / "prototype"
    prototype.write_text("\n".join([*lines, "$", ""]))
    flags = ("--unsupported", "-m", "crc=0,finobt=0,rmapbt=0,reflink=0,bigtime=0", "-p", str(prototype))
    make(path, *flags, *options, size_bytes=size_bytes)
    for name, lengths in (("file1", (5,)), ("file700", (5, 40, 200)), ("file5000", (10, 6000, 65_536))):
        xattrs = {f"user.a{length}": length for length in lengths} | {"security.s": 3, "trusted.r": 7}
        commands = [("-u", f"a{length}", length) for length in lengths] + [("-s", "s", 3), ("-r", "r", 7)]
        arguments = [part for flag, key, n in commands for part in ("-c", f"attr_set {flag} -v {n} {key}")]
        subprocess.run(["xfs_db", "-x", "-c", f"path /{name}", *arguments, str(path)], check=True, capture_output=True)
        holds[name] = (*holds[name][:-1], xattrs)
    return holds


def birth_ns(path: Path) -> int:
    said = subprocess.run(["stat", "-c", "%.9W", str(path)], check=True, capture_output=True, text=True).stdout
    return int(said.strip().replace(".", "").replace(",", ""))


def work_and_crash(root: Path, files: int = 500) -> None:
    """Files that are each synced, and changes of names and content that are too; then everything stops at once."""
    folder = root / "synced"
    folder.mkdir()
    (root / "old").write_bytes(b"old" * 1000)
    (root / "renamed-from").write_bytes(b"renamed")
    (root / "deleted").write_bytes(b"deleted")
    os.sync()
    for number in range(files):
        with (folder / f"file{number}").open("wb") as file:
            file.write(pattern(number))
            file.flush()
            os.fsync(file.fileno())
    (root / "renamed-from").rename(root / "renamed-to")
    (root / "deleted").unlink()
    (folder / "deep").mkdir()
    (folder / "link").symlink_to("t" * 900)
    os.setxattr(folder, "user.value", pattern(3000))
    with (root / "old").open("ab") as file:
        file.write(b"appended")
        file.flush()
        os.fsync(file.fileno())
    stop(root)


def stop(root: Path, *, flush_log: bool = False) -> None:
    """As if the power failed: nothing is written any more (XFS_IOC_GOINGDOWN)."""
    descriptor = os.open(root, os.O_RDONLY)
    try:
        fcntl.ioctl(descriptor, GOING_DOWN, struct.pack("I", 1 if flush_log else 2))
    finally:
        os.close(descriptor)


def churn(root: Path, seed: int, steps: int, *, reflink: bool = True) -> None:
    """A random life of files: created, grown, cut, renamed, deleted, with attributes and shared blocks."""
    generator = np.random.default_rng(seed)

    def below(end: int) -> int:
        return int(generator.integers(end))

    alive: list[Path] = []
    for step in range(steps):
        folder = root / f"folder{below(6)}"
        folder.mkdir(exist_ok=True)
        operation = below(8 if reflink else 7) if alive else 0
        path = alive[below(len(alive))] if alive else folder
        if operation <= 1:
            path = folder / f"{'name' * below(30)}{step}"
            path.write_bytes(pattern(below(30_000)))
            alive.append(path)
        elif operation == 2:
            alive.remove(path)
            path.unlink()
        elif operation == 3:
            alive[alive.index(path)] = path.rename(folder / f"renamed{step}")
        elif operation == 4:
            os.setxattr(path, f"user.{below(5)}", pattern((5, 300, 3000, 9000)[below(4)]))
        elif operation == 5:
            os.truncate(path, below(1_000_000))
        elif operation == 7:
            with (folder / "clone").open("w+b") as clone, path.open("rb") as source:
                fcntl.ioctl(clone, FICLONE, source.fileno())
                os.pwrite(clone.fileno(), b"changed" * 500, below(20_000))
        else:
            with path.open("r+b") as file:
                os.pwrite(file.fileno(), b"x" * 9000, below(100_000))
                os.fsync(file.fileno())
