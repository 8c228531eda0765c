"""The small text files of the tree: vm.json and report.json of a point. Pure: the same point gives the same bytes."""

from __future__ import annotations

import base64
import json
from typing import TYPE_CHECKING

from xbfs.vfs.names import SECOND_NS, time_name

if TYPE_CHECKING:
    from xbfs_engine.catalog.restore_point import DiskRecord, RestorePoint


def vm_json(point: RestorePoint) -> bytes:
    """What is known of the VM and its disks. Bytes in the captured record appear as base64."""
    return to_json(
        {
            **_head(point),
            "disks": [
                {
                    "number": disk.number,
                    "name": disk.name,
                    "vdi_uuid": disk.vdi_uuid,
                    "size_bytes": disk.size_bytes,
                }
                for disk in point.disks
            ],
            "vm": point.vm,
        }
    )


def report_json(point: RestorePoint) -> bytes:
    """What the run that made the point did."""
    run = point.run
    return to_json(
        {
            **_head(point),
            "parent": point.parent,
            "run": {name: getattr(run, name) for name in type(run).__slots__},
            "disks": [_disk_report(disk) for disk in point.disks],
        }
    )


def to_json(record: object) -> bytes:
    """Indented JSON with a newline at its end."""
    return json.dumps(record, indent=2, ensure_ascii=False, default=_plain).encode(errors="backslashreplace") + b"\n"


def _head(point: RestorePoint) -> dict[str, object]:
    return {
        "point": point.id,
        "vm_name": point.vm_name,
        "vm_uuid": point.vm_uuid,
        "time": time_name(point.time_ns // SECOND_NS),
        "time_ns": point.time_ns,
    }


def _disk_report(disk: DiskRecord) -> dict[str, object]:
    return {
        "number": disk.number,
        "size_bytes": disk.size_bytes,
        "data_bytes": disk.data_bytes,
        "method": disk.method,
        "reason": disk.reason,
        "statistics": disk.statistics.to_record(),
    }


def _plain(value: object) -> str:
    assert isinstance(value, bytes), "a manifest holds nothing else that JSON does not know"
    return base64.b64encode(value).decode()
