"""Kept images of guests as disks of one restore point, mounted for real."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.support.engine import MemorySource
from tests.support.guest_sources import CHUNK
from tests.support.mounts import Mounted

if TYPE_CHECKING:
    from pathlib import Path

    from tests.support.guest_sources import SparseSource

CLUSTER = 64 << 10


def disk_of(image: SparseSource) -> MemorySource:
    """An image as a disk to back up."""
    pieces: dict[int, bytearray] = {}
    for number, chunk in image.chunks.items():
        start = number * CHUNK // CLUSTER * CLUSTER
        piece = pieces.setdefault(start, bytearray(min(CLUSTER, image.size_bytes - start)))
        offset = number * CHUNK - start
        piece[offset : offset + len(chunk)] = chunk[: len(piece) - offset]
    return MemorySource(image.size_bytes, {start: bytes(piece) for start, piece in pieces.items()})


def guest_mount(folder: Path, *images: SparseSource, deadline_s: float = 30.0) -> Mounted:
    """A repository with one point of the VM "vm", whose disks 0, 1, … are the images; not mounted yet."""
    mount = Mounted(folder, deadline_s=deadline_s)
    mount.engine.backup(*map(disk_of, images))
    return mount
