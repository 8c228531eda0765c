"""Restore points as records for ``--json`` and as lines for people. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

from xbfs.cli import text

if TYPE_CHECKING:
    from collections.abc import Iterator

    from xbfs_engine.catalog.restore_point import DiskRecord, RestorePoint


def point_record(point: RestorePoint) -> dict[str, object]:
    """All of a point but what it holds of the VM; sizes in bytes."""
    run = point.run
    return {
        "id": point.id,
        "vm_name": point.vm_name,
        "vm_uuid": point.vm_uuid,
        "time": text.when(point.time_ns),
        "parent": point.parent,
        "disks": [disk_record(disk) for disk in point.disks],
        "run": {
            "program": run.program,
            "node": run.node,
            "started": text.when(run.started_ns),
            "elapsed_s": run.elapsed_ms / 1000,
            "stored_bytes": run.stored_bytes,
            "metadata_bytes": run.metadata_bytes,
            "packs": run.packs,
        },
    }


def disk_record(disk: DiskRecord) -> dict[str, object]:
    """A disk of a point; ``data_bytes`` is exact to 1 MiB."""
    return {
        "number": disk.number,
        "name": disk.name,
        "vdi_uuid": disk.vdi_uuid,
        "size_bytes": disk.size_bytes,
        "data_bytes": disk.data_bytes,
        "chunk_size_bytes": disk.chunk_size,
        "method": disk.method,
        "reason": disk.reason,
        "read": disk.statistics.to_record(),
    }


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
