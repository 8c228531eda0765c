"""Restore points as records of plain values: ``report.json`` and ``vm.json`` of the mount, ``--json`` of the commands.

Pure: the same point gives the same record. Sizes in bytes.
"""

from __future__ import annotations

import base64
from typing import TYPE_CHECKING, Final

from xbfs.vfs.times import SECOND_NS, iso_time
from xbfs_engine.core.limits import KIB

if TYPE_CHECKING:
    from xbfs_engine.catalog.boottests import BootTest
    from xbfs_engine.catalog.restore_point import DiskRecord, RestorePoint

_BYTES_SHOWN_MAX: Final = 4 * KIB
"""Longer byte strings (the archive of a VM's metadata) are only named with their size."""


def point_record(point: RestorePoint) -> dict[str, object]:
    """All of a point but what it holds of the VM."""
    run = point.run
    return {
        **_head(point),
        "parent": point.parent,
        "disks": [disk_record(disk) for disk in point.disks],
        "run": {
            "program": run.program,
            "node": run.node,
            "started": iso_time(run.started_ns // SECOND_NS),
            "elapsed_s": run.elapsed_ms / 1000,
            "stored_bytes": run.stored_bytes,
            "metadata_bytes": run.metadata_bytes,
            "packs": run.packs,
        },
    }


def disk_record(disk: DiskRecord) -> dict[str, object]:
    """A disk of a point, and what reading it was like; ``data_bytes`` is exact to 1 MiB."""
    return {
        **_identity(disk),
        "data_bytes": disk.data_bytes,
        "chunk_size_bytes": disk.chunk_size,
        "method": disk.method,
        "reason": disk.reason,
        "read": disk.statistics.to_record(),
    }


def vm_record(point: RestorePoint) -> dict[str, object]:
    """What is known of the VM and its disks. Bytes are base64, or their size where they are long."""
    return {**_head(point), "disks": [_identity(disk) for disk in point.disks], "vm": _plain(point.vm)}


def test_record(test: BootTest) -> dict[str, object]:
    """The result of a boot test, without its screenshot."""
    return {
        "point": test.point,
        "time": iso_time(test.made_ns // SECOND_NS),
        **test.to_record(),
        "console": test.console,
        "screenshot_bytes": len(test.screenshot),
    }


def _head(point: RestorePoint) -> dict[str, object]:
    return {
        "id": point.id,
        "vm_name": point.vm_name,
        "vm_uuid": point.vm_uuid,
        "time": iso_time(point.time_ns // SECOND_NS),
        "time_ns": point.time_ns,
    }


def _identity(disk: DiskRecord) -> dict[str, object]:
    return {
        "number": disk.number,
        "name": disk.name,
        "vdi_uuid": disk.vdi_uuid,
        "size_bytes": disk.size_bytes,
    }


def _plain(value: object) -> object:
    match value:
        case dict():
            return {key: _plain(item) for key, item in value.items()}
        case list():
            return [_plain(item) for item in value]
        case bytes() if len(value) > _BYTES_SHOWN_MAX:
            return {"size_bytes": len(value)}
        case bytes():
            return base64.b64encode(value).decode()
        case other:
            return other
