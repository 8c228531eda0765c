"""The small text files of the tree: vm.json and report.json of a point. Pure: the same point gives the same bytes."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from xbfs.vfs.records import point_record, vm_record

if TYPE_CHECKING:
    from collections.abc import Sequence

    from xbfs_engine.catalog.restore_point import RestorePoint


def vm_json(point: RestorePoint) -> bytes:
    """What is known of the VM and its disks."""
    return to_json(vm_record(point))


def report_json(point: RestorePoint, tests: Sequence[dict[str, object]] = (), *, not_shown: int = 0) -> bytes:
    """What the run that made the point did and what its boot tests found, as `xbfs show --json` tells it.

    ``not_shown``: how many tests there are beside ``tests``.
    """
    return to_json(point_record(point) | {"tests": list(tests), "tests_not_shown": not_shown})


def to_json(record: object) -> bytes:
    """Indented JSON with a newline at its end."""
    return json.dumps(record, indent=2, ensure_ascii=False).encode(errors="backslashreplace") + b"\n"
