"""What a restore point remembers of the pool, so that the next one can be a delta: the snapshot each disk was read of.

Lies under "xen" in ``RestorePoint.vm``. Owns that record and nothing else. Pure.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Mapping

    from xbfs_engine.codec.wire import Value

KEY: Final = "xen"
"""Where the record lies in ``RestorePoint.vm``."""

_VERSION: Final = 1


@dataclass(frozen=True, slots=True)
class XenBase:
    """Where a point was read. ``snapshots``: by disk number, the uuid of the VDI that stays as the base of a delta.

    ``left_out``: by disk number, why a disk of the VM is not in the point.
    """

    pool_uuid: str
    snapshots: Mapping[int, str]
    left_out: Mapping[int, str]

    def to_record(self) -> dict[str, Value]:
        """As it is stored."""
        return {
            "version": _VERSION,
            "pool_uuid": self.pool_uuid,
            "snapshots": {str(number): uuid for number, uuid in self.snapshots.items()},
            "left_out": {str(number): reason for number, reason in self.left_out.items()},
        }


def base_of(vm: Mapping[str, Value]) -> XenBase | None:
    """The record in a point's ``vm``; None where there is none that this release knows: then reads are full."""
    match vm.get(KEY):
        case {"version": 1, "pool_uuid": str() as pool_uuid, "snapshots": dict() as snapshots}:
            return XenBase(pool_uuid, _by_number(snapshots), _by_number(vm_left_out(vm)))
        case _:
            return None


def vm_left_out(vm: Mapping[str, Value]) -> dict[str, Value]:
    """The stored reasons for disks that were left out."""
    match vm.get(KEY):
        case {"left_out": dict() as left_out}:
            return left_out
        case _:
            return {}


def _by_number(record: Mapping[str, Value]) -> dict[int, str]:
    return {
        int(number): value
        for number, value in record.items()
        if number.isascii() and number.isdigit() and isinstance(value, str)
    }
