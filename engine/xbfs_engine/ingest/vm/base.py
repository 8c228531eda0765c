"""What a restore point remembers of the pool, so that the next one can be a delta: the snapshot each disk was read of.

Lies under "xen" in ``RestorePoint.vm``. Owns that record, and what it tells a sweep. Keeps no state.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import trio

from xbfs_engine.source.xapi.markers import slot_of, slots_of

if TYPE_CHECKING:
    from collections.abc import Mapping
    from collections.abc import Set as AbstractSet

    from xbfs_engine.catalog.catalog import Catalog
    from xbfs_engine.codec.wire import Value
    from xbfs_engine.source.xapi.sweep import KnownBases

KEY: Final = "xen"
"""Where the record lies in ``RestorePoint.vm``."""

_VERSION: Final = 1


@dataclass(frozen=True, slots=True)
class XenBase:
    """Where a point was read. ``snapshots``: by disk number, the uuid of the VDI that stays as the base of a delta.

    ``taken``: the same of all disks that were read, whether they stay or not: these the VM's metadata archive names.
    ``left_out``: by disk number, why a disk of the VM is not in the point.
    """

    pool_uuid: str
    snapshots: Mapping[int, str]
    taken: Mapping[int, str]
    left_out: Mapping[int, str]

    def to_record(self) -> dict[str, Value]:
        """As it is stored."""
        return {
            "version": _VERSION,
            "pool_uuid": self.pool_uuid,
            "snapshots": _by_text(self.snapshots),
            "taken": _by_text(self.taken),
            "left_out": _by_text(self.left_out),
        }


def base_of(vm: Mapping[str, Value]) -> XenBase | None:
    """The record in a point's ``vm``; None where there is none that this release knows: then reads are full."""
    match vm.get(KEY):
        case {
            "version": 1,
            "pool_uuid": str() as pool_uuid,
            "snapshots": dict() as snapshots,
            "taken": dict() as taken,
            "left_out": dict() as left_out,
        }:
            return XenBase(pool_uuid, _by_number(snapshots), _by_number(taken), _by_number(left_out))
        case _:
            return None


def known_bases(catalog: Catalog, repository_id: str) -> KnownBases:
    """What a sweep asks: which bases the newest points of this repository name. Raises StorageError when asked."""

    async def known(pool_uuid: str, slots: AbstractSet[str]) -> dict[str, str]:
        await trio.to_thread.run_sync(catalog.refresh)
        # A VM without a point has no base that any point needs.
        bases = dict.fromkeys(slots_of(repository_id, slots), "")
        # By time: the newest point of a VM comes last.
        for point in catalog.points():
            xen = base_of(point.vm)
            named = xen.snapshots if xen and xen.pool_uuid == pool_uuid else {}
            bases |= {slot_of(repository_id, point.vm_uuid, disk.number): "" for disk in point.disks}
            bases |= {slot_of(repository_id, point.vm_uuid, number): uuid for number, uuid in named.items()}
        return bases

    return known


def _by_text(values: Mapping[int, str]) -> dict[str, Value]:
    return {str(number): value for number, value in values.items()}


def _by_number(record: Mapping[str, Value]) -> dict[int, str]:
    return {
        int(number): value
        for number, value in record.items()
        if number.isascii() and number.isdigit() and isinstance(value, str)
    }
