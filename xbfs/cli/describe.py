"""Restore points as lines for people; as records they are ``xbfs.vfs.records``'. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

from xbfs.cli import text

if TYPE_CHECKING:
    from collections.abc import Iterator

    from xbfs_engine.catalog.restore_point import DiskRecord, RestorePoint


def disk_lines(disk: DiskRecord) -> Iterator[str]:
    """What was read of a disk, why, and what became of it."""
    read = disk.statistics
    yield f"disk {disk.number}: {disk.name}, {text.size(disk.size_bytes)}"
    yield f"  {disk.method}: {disk.reason}"
    yield (
        f"  read {text.size(read.source_bytes)}: zero {text.size(read.zero_bytes)}, "
        f"unchanged {text.size(read.unchanged_bytes)}, duplicate {text.size(read.duplicate_bytes)}, "
        f"new {text.size(read.new_bytes)}"
    )


def source_bytes(point: RestorePoint) -> int:
    """Bytes that the run read from the source."""
    return sum(disk.statistics.source_bytes for disk in point.disks)


def methods(point: RestorePoint) -> str:
    """How the disks were read: "cbt", "full" or "cbt, full"."""
    return ", ".join(sorted({disk.method for disk in point.disks}))
