"""Raw disk files: partition table, sparse copies, and what differs between two of them as a CBT bitmap.

Knows no filesystem. Every function works on closed files and keeps no state.
"""

from __future__ import annotations

import base64
import errno
import hashlib
import os
import subprocess
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from pathlib import Path

CBT_BLOCK_BYTES = 65536
"""Granularity of XenServer's changed block tracking."""

PARTITION_OFFSET_BYTES = 1 << 20
"""Where the only partition starts, and what is left free behind it for the backup partition table."""

LINUX_ROOT_X86_64 = "4F68BCE3-E8CD-4DB1-96E7-FBCAF984B709"  # the UEFI Discoverable Partitions Specification


class ImageError(Exception):
    """An image cannot be made: the message says why and what to do."""


def run(command: Sequence[str | Path], *, stdin: str = "", environment: dict[str, str] | None = None) -> str:
    """What ``command`` prints; ImageError with its own message when it fails or is not installed."""
    try:
        done = subprocess.run(
            [str(word) for word in command],
            input=stdin,
            capture_output=True,
            text=True,
            errors="replace",
            env=os.environ | {"LC_ALL": "C"} | (environment or {}),
            check=False,
        )
    except FileNotFoundError as exc:
        raise ImageError(f"{command[0]} is not installed; tools/setup installs it") from exc
    if done.returncode:
        raise ImageError(f"{' '.join(map(str, command))} failed ({done.returncode}): {done.stderr.strip()[-2000:]}")
    return done.stdout


def create(path: Path, size_bytes: int) -> None:
    """A new, wholly sparse file."""
    with path.open("xb") as file:
        try:
            file.truncate(size_bytes)
        except (OSError, OverflowError) as exc:
            raise ImageError(f"{path}: this filesystem holds no file of {size_bytes} bytes ({exc})") from exc


def partition(path: Path, *, disk_uuid: str, partition_uuid: str) -> int:
    """Write a GPT with one Linux root partition at 1 MiB; returns the partition's size in bytes."""
    size_bytes = path.stat().st_size - 2 * PARTITION_OFFSET_BYTES
    script = (
        f"label: gpt\nlabel-id: {disk_uuid}\nunit: sectors\nsector-size: 512\n"
        f"start={PARTITION_OFFSET_BYTES // 512}, size={size_bytes // 512}, "
        f'type={LINUX_ROOT_X86_64}, uuid={partition_uuid}, name="root"\n'
    )
    run(["sfdisk", "--quiet", "--no-reread", "--no-tell-kernel", path], stdin=script)
    return size_bytes


def copy_sparse(source: Path, target: Path) -> None:
    """A copy that is as sparse as can be and shares blocks where the filesystem can."""
    run(["cp", "--sparse=always", "--reflink=auto", source, target])


def data_blocks(descriptor: int, size_bytes: int) -> Iterator[int]:
    """Numbers of the CBT blocks that hold any data, ascending; holes are skipped without being read."""
    position, previous = 0, -1
    while position < size_bytes:
        try:
            start = os.lseek(descriptor, position, os.SEEK_DATA)
        except OSError as exc:
            if exc.errno == errno.ENXIO:  # nothing but a hole up to the end
                return
            raise
        position = os.lseek(descriptor, start, os.SEEK_HOLE)
        first = max(start // CBT_BLOCK_BYTES, previous + 1)
        previous = (position - 1) // CBT_BLOCK_BYTES
        yield from range(first, previous + 1)


def changed_blocks(old: Path, new: Path) -> list[int]:
    """Numbers of the CBT blocks whose bytes differ between two files of one size, ascending."""
    size_bytes = new.stat().st_size
    if old.stat().st_size != size_bytes:
        raise ImageError(f"{old} and {new} differ in size")
    with old.open("rb", buffering=0) as a, new.open("rb", buffering=0) as b:
        blocks = sorted({*data_blocks(a.fileno(), size_bytes), *data_blocks(b.fileno(), size_bytes)})
        return [
            block
            for block in blocks
            if os.pread(a.fileno(), CBT_BLOCK_BYTES, block * CBT_BLOCK_BYTES)
            != os.pread(b.fileno(), CBT_BLOCK_BYTES, block * CBT_BLOCK_BYTES)
        ]


def cbt_bitmap(blocks: Iterable[int], size_bytes: int) -> str:
    """The text XAPI's ``VDI.list_changed_blocks`` returns: base64, one bit for 64 KiB, most significant bit first."""
    bitmap = bytearray(-(-size_bytes // (8 * CBT_BLOCK_BYTES)))
    for block in blocks:
        bitmap[block // 8] |= 0x80 >> (block % 8)
    return base64.b64encode(bitmap).decode("ascii")


def extents(blocks: Iterable[int], size_bytes: int) -> list[list[int]]:
    """Ascending block numbers as ``[offset, length]`` in bytes, neighbours merged, the last one cut at the end."""
    merged: list[list[int]] = []
    for block in blocks:
        offset = block * CBT_BLOCK_BYTES
        length = min(CBT_BLOCK_BYTES, size_bytes - offset)
        if merged and sum(merged[-1]) == offset:
            merged[-1][1] += length
        else:
            merged.append([offset, length])
    return merged


def describe(path: Path) -> dict[str, int | str]:
    """Size, allocated size and SHA-256 of a file, for a manifest."""
    status = path.stat()
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"size_bytes": status.st_size, "allocated_bytes": status.st_blocks * 512, "sha256": digest}
