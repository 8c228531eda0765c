"""The small text files of the tree: vm.json and report.json of a point. Pure: the same point gives the same bytes."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from xbfs.vfs.records import point_record, vm_record

if TYPE_CHECKING:
    from xbfs_engine.catalog.restore_point import RestorePoint


def vm_json(point: RestorePoint) -> bytes:
    """What is known of the VM and its disks."""
    return to_json(vm_record(point))


def report_json(point: RestorePoint) -> bytes:
    """What the run that made the point did, as `xbfs show --json` tells it."""
    return to_json(point_record(point))


def to_json(record: object) -> bytes:
    """Indented JSON with a newline at its end."""
    return json.dumps(record, indent=2, ensure_ascii=False).encode(errors="backslashreplace") + b"\n"
