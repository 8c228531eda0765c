"""NTFS, FAT and exFAT images, made by mkntfs, mkfs.fat and mkfs.exfat and filled through ntfs-3g, mtools or the kernel.

What Windows alone would write (files compressed by the system, unknown reparse tags, encryption) is put in by hand: the
compressed streams by wimlib, whose resources of one file have the same form.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import struct
import subprocess
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from tests.support.xfs_images import pattern

if TYPE_CHECKING:
    from collections.abc import Iterator

TAG_JUNCTION, TAG_SYMLINK, TAG_WOF, TAG_DEDUP = 0xA000_0003, 0xA000_000C, 0x8000_0017, 0x8000_0013
TAG_LX_SYMLINK = 0xA000_001D

WOF = {"xpress4k": (0, "XPRESS", 4096), "lzx": (1, "LZX", 32768), "xpress8k": (2, "XPRESS", 8192)}
WOF |= {"xpress16k": (3, "XPRESS", 16384)}
"""By name: the algorithm's number in the reparse point, wimlib's name for it, size of a chunk."""

LONG_NAME = "長" * 255
NAMES = ("plain", "Ünïcödé", "日本語", "𝄞 clef", "trailing.dots", "semi;colon", "a+b=c", "x" * 255)
SYMLINK_TARGET = r"..\dir\plain"
JUNCTION_TARGET = r"\??\C:\Users\all"


def why_not(*tools: str, mounts: bool = True) -> str:
    if mounts and os.geteuid() != 0:
        return "mounting needs root"
    if mounts and not Path("/dev/fuse").exists():
        return "there is no FUSE"
    missing = [tool for tool in tools if shutil.which(tool) is None]
    return f"{', '.join(missing)} not installed" if missing else ""


def make_ntfs(path: Path, *options: str, size_bytes: int = 64 << 20) -> None:
    with path.open("wb") as file:
        file.truncate(size_bytes)
    subprocess.run(["mkntfs", "-F", "-Q", "-q", "-L", "golden", *options, str(path)], check=True, capture_output=True)


@contextmanager
def mounted_ntfs(image: Path, point: Path, *options: str) -> Iterator[Path]:
    point.mkdir(exist_ok=True)
    joined = ",".join(("no_detach,compression,noatime", "streams_interface=windows", *options))
    # In the foreground: its process ends when all is written, and umount does not wait for that.
    process = subprocess.Popen(["ntfs-3g", "-o", joined, str(image), str(point)], stderr=subprocess.DEVNULL)
    try:
        while not point.is_mount():
            assert process.poll() is None
            time.sleep(0.01)
        try:
            yield point
        finally:
            subprocess.run(["umount", str(point)], check=True)
    finally:
        process.wait(30)


def make_fat(path: Path, bits: int, *options: str, size_bytes: int) -> None:
    with path.open("wb") as file:
        file.truncate(size_bytes)
    arguments = ["-F", str(bits), "-n", "GOLDEN", "-i", "12345678", *options, str(path)]
    subprocess.run(["mkfs.fat", *arguments], check=True, capture_output=True)


def copy_to_fat(image: Path, folder: Path) -> None:
    names = sorted(str(path) for path in folder.iterdir())
    subprocess.run(["mcopy", "-i", str(image), "-s", "-m", *names, "::"], check=True, env=os.environ | MTOOLS)


MTOOLS = {"MTOOLS_SKIP_CHECK": "1", "TZ": "UTC", "LC_ALL": "C.UTF-8"}


def populate_fat(folder: Path, *, many: int = 300) -> None:
    """Files to be copied: long and short names, a directory of many clusters, contents of all sizes."""
    for name in (
        "UPPER.TXT",
        "lower.txt",
        "Mixed Case.text",
        "Ünïcödé",
        "日本語",
        "x" * 200,
        "no extension",
        "a.b.c.d",
    ):
        (folder / name).write_bytes(name.encode() * 50)
    for size in (0, 1, 511, 4096, 100_001, 700_000):
        (folder / f"of{size}").write_bytes(pattern(size))
    (folder / "many" / "deeper").mkdir(parents=True)
    for number in range(many):
        (folder / "many" / f"a long name of entry {number}").write_bytes(b"%d" % number)
    (folder / "many" / "deeper" / "file").write_bytes(b"deep")
    for second in (315_532_800, 1_700_000_000, 4_102_444_798):
        (folder / f"time{second}").write_bytes(b"")
        os.utime(folder / f"time{second}", (second, second))


@contextmanager
def mounted_exfat(image: Path, point: Path) -> Iterator[Path]:
    """By exfat-fuse, which takes block devices only."""
    point.mkdir(exist_ok=True)
    loop = subprocess.run(["losetup", "-f", "--show", str(image)], check=True, capture_output=True, text=True)
    device = loop.stdout.strip()
    try:
        subprocess.run(["mount.exfat-fuse", device, str(point)], check=True, capture_output=True)
        try:
            yield point
        finally:
            subprocess.run(["umount", str(point)], check=True)
    finally:
        subprocess.run(["losetup", "-d", device], check=True)


def make_exfat(path: Path, *options: str, size_bytes: int = 32 << 20) -> None:
    with path.open("wb") as file:
        file.truncate(size_bytes)
    subprocess.run(["mkfs.exfat", "-L", "golden", *options, str(path)], check=True, capture_output=True)


def populate_ntfs(root: Path, scratch: Path, *, many: int = 600) -> dict[str, bytes]:
    """Fills the volume; returns contents that ntfs-3g can not tell, by path (``file:stream`` too)."""
    known: dict[str, bytes] = {}
    (root / "dir").mkdir()
    for name in NAMES:
        (root / "dir" / name).write_bytes(name.encode())
    (root / "dir" / os.fsdecode(b"lone \xed\xa0\x80")).mkdir()
    (root / "links").mkdir()
    (root / "links" / LONG_NAME).write_bytes(b"long")
    (root / "many").mkdir()
    for number in range(many):
        (root / "many" / f"name of entry {number}").write_bytes(b"%d" % number)
    for number in range(0, many, 3):
        (root / "many" / f"name of entry {number}").unlink()
    _ntfs_files(root / "files")
    os.link(root / "files" / "of5000", root / "dir" / "hard link")
    (root / "files" / "of1:stream").write_bytes(b"of a stream")
    (root / "files" / "of1:large").write_bytes(pattern(100_000))
    known |= {"files/of1:stream": b"of a stream", "files/of1:large": pattern(100_000)}
    _ntfs_links(root / "links")
    (root / "wof").mkdir()
    for name in WOF:
        known |= _ntfs_wof(root / "wof", name, scratch)
    return known


def _ntfs_files(folder: Path) -> None:
    folder.mkdir()
    for size in (0, 1, 600, 800, 5000, 300_001):
        (folder / f"of{size}").write_bytes(pattern(size))
    with (folder / "sparse").open("wb") as file:
        for at in (0, 1 << 20, 20 << 20):
            file.seek(at)
            file.write(pattern(70_000))
    compressed = folder / "compressed"
    compressed.mkdir()
    # FILE_ATTRIBUTE_COMPRESSED on a directory: what is created in it is compressed.
    os.setxattr(compressed, "system.ntfs_attrib_be", (0x810).to_bytes(4, "big"))
    (compressed / "text").write_bytes(b"".join(b"line %d of a text\n" % n for n in range(8_000)))
    (compressed / "noise").write_bytes(noise(66_000))
    (compressed / "mixed").write_bytes(bytes(200_000) + noise(10_000) + b"tail" * 1000)
    with (folder / "fragmented").open("wb") as file:
        for piece in range(400):
            file.seek(piece * (2 << 16))
            file.write(pattern(4096))


def _ntfs_links(folder: Path) -> None:
    (folder / "interix").symlink_to("../dir/plain")
    for name, tag, data in (
        ("symlink", TAG_SYMLINK, reparse_names(SYMLINK_TARGET, flags=1)),
        ("linux", TAG_LX_SYMLINK, struct.pack("<I", 2) + b"../dir/plain"),
        ("deduplicated", TAG_DEDUP, bytes(100)),
    ):
        with (folder / name).open("wb") as file:
            file.truncate(5000 if name == "deduplicated" else 0)
        set_reparse(folder / name, tag, data)
    (folder / "junction").mkdir()
    set_reparse(folder / "junction", TAG_JUNCTION, reparse_names(JUNCTION_TARGET))


def _ntfs_wof(folder: Path, name: str, scratch: Path) -> dict[str, bytes]:
    """A file as ``compact /exe`` leaves it: nothing but a hole, and a stream that has the content."""
    number, _, chunk = WOF[name]
    known = {}
    for size in (chunk, 3 * chunk + 100):
        content = b"".join(b"%d of a file\n" % n for n in range(size))[: size - 1500] + noise(1500)
        content = content[:size]
        file = folder / f"{name}-{size}"
        with file.open("wb") as hole:
            hole.truncate(len(content))
        file.with_name(file.name + ":WofCompressedData").write_bytes(wim_resource(content, name, scratch))
        set_reparse(file, TAG_WOF, struct.pack("<IIII", 1, 2, 1, number))
        known[f"wof/{file.name}"] = content
    return known


def wim_resource(content: bytes, name: str, scratch: Path) -> bytes:
    """The content compressed by wimlib in chunks, with the table of where they begin."""
    _, algorithm, chunk = WOF[name]
    folder, archive = scratch / "wim", scratch / "archive.wim"
    folder.mkdir(exist_ok=True)
    (folder / "file").write_bytes(content)
    archive.unlink(missing_ok=True)
    options = [f"--compress={algorithm}", f"--chunk-size={chunk}", "--no-acls"]
    subprocess.run(["wimlib-imagex", "capture", str(folder), str(archive), *options], check=True, capture_output=True)
    listed = subprocess.run(
        ["wimlib-imagex", "info", "--blobs", str(archive)], check=True, capture_output=True, text=True
    ).stdout
    blob = next(part for part in listed.split("\n\n") if hashlib.sha1(content).hexdigest() in part)
    offset, length = (int(re.search(rf"{key} *= (\d+)", blob)[1]) for key in ("Offset in WIM", "Compressed size"))
    return archive.read_bytes()[offset : offset + length]


def set_reparse(path: Path, tag: int, data: bytes) -> None:
    os.setxattr(path, "system.ntfs_reparse_data", struct.pack("<IHH", tag, len(data), 0) + data, follow_symlinks=False)


def reparse_names(target: str, flags: int | None = None) -> bytes:
    """The data of a junction, or with flags of a symlink: where it leads, and the same as it is shown."""
    raw = target.encode("utf-16-le")
    head = struct.pack("<HHHH", 0, len(raw), len(raw) + 2, len(raw))
    return head + (b"" if flags is None else struct.pack("<I", flags)) + (raw + b"\0\0") * 2


def noise(size: int) -> bytes:
    return b"".join(hashlib.sha256(b"%d" % n).digest() for n in range(size // 32 + 1))[:size]
