"""Delta or full: whether a disk's changes since the last restore point are known for certain, and what they are.

The rule is one: whatever is doubtful means a full read, with the reason kept. A full read is always right; what it
reads again is found in the repository and not stored twice. Facts: xen-api (VDI.list_changed_blocks), SM cbtutil.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

from xbfs_engine.core.errors import BitmapInvalid, PoolError, XapiFailure
from xbfs_engine.ingest.vm.base import base_of
from xbfs_engine.ingest.vm.told import told_of
from xbfs_engine.source.cbt import parse_bitmap
from xbfs_engine.source.xapi.failures import meaning_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from xbfs_engine.catalog.restore_point import RestorePoint
    from xbfs_engine.ingest.vm.disks import TakenDisk
    from xbfs_engine.source.base import Extent
    from xbfs_engine.source.xapi.patience import Patience
    from xbfs_engine.source.xapi.session import Ref, Xapi, XapiValue

LOG_INCONSISTENT: Final = "SR_BACKEND_FAILURE_459"
"""Sizes or bitmaps of the logs contradict each other: no log of the disk can be trusted from here on."""

_TYPES: Final = frozenset({"user", "system", "cbt_metadata"})
_LIST_TIMEOUT_S: Final = 300.0
_ID_DIGITS: Final = 12


class Delta(NamedTuple):
    """How a disk is read. ``changed``: None for a full read. ``reason``: why, for people; kept in the point.

    ``fell_back``: there was a base, and it can not be used. ``reset``: tracking must be started anew.
    """

    changed: Sequence[Extent] | None
    reason: str
    fell_back: bool = False
    reset: bool = False


class _Doubt(Exception):
    """A check that did not hold."""

    def __init__(self, reason: str, *, reset: bool = False) -> None:
        super().__init__(reason)
        self.reason = reason
        self.reset = reset


class Deltas:
    """Decides for the disks of one VM. ``last``: its newest point; ``pool_uuid``: the pool it is on now."""

    def __init__(
        self, xapi: Xapi, patience: Patience, *, last: RestorePoint | None, pool_uuid: str, chunk_size: int
    ) -> None:
        self._xapi = xapi
        self._patience = patience
        self._last = last
        self._pool_uuid = pool_uuid
        self._chunk_size = chunk_size

    async def decide(self, disk: TakenDisk, *, full: bool) -> Delta:
        """How to read ``disk``; ``full``: a full read was asked for. Never raises a PoolError: doubt means full."""
        if full:
            return Delta(None, "a full read was asked for")
        if self._last is None:
            return Delta(None, "first point of this VM")
        if self._last.disk(disk.number) is None:
            return Delta(None, "first point of this disk")
        try:
            changed = await self._changed(disk, self._known_base(disk))
        except _Doubt as doubt:
            told = await told_of(self._xapi, disk.vdi_uuid, self._last.run.started_ns)
            reason = f"{doubt.reason}; the pool reported {told}" if told else doubt.reason
            return Delta(None, reason, fell_back=True, reset=doubt.reset)
        return Delta(changed, f"changed blocks since {self._last.id[:_ID_DIGITS]}")

    def _known_base(self, disk: TakenDisk) -> str:
        """From what is known of the disk and the record of the last point alone."""
        if disk.untracked is not None:
            raise _Doubt(disk.untracked)
        old = self._last.disk(disk.number) if self._last else None
        xen = base_of(self._last.vm) if self._last else None
        if old is None or xen is None:
            raise _Doubt("the last point was not made from a pool")
        if old.vdi_uuid != disk.vdi_uuid:
            raise _Doubt(
                f"the disk is another VDI than in the last point ({old.vdi_uuid}): reverted, migrated or replaced"
            )
        if xen.pool_uuid != self._pool_uuid:
            raise _Doubt("the last point is from another pool")
        if old.chunk_size != self._chunk_size:
            raise _Doubt("the last point has another chunk size")
        base_uuid = xen.snapshots.get(disk.number)
        if base_uuid is None:
            raise _Doubt("the last point left no snapshot to compare with")
        return base_uuid

    async def _changed(self, disk: TakenDisk, base_uuid: str) -> Sequence[Extent]:
        assert base_uuid != disk.snapshot_uuid
        base_ref, base = await self._base_record(base_uuid)
        old = self._last.disk(disk.number) if self._last else None
        assert old is not None
        if base.get("cbt_enabled") is not True:
            raise _Doubt("the snapshot of the last point has no changed-block log any more")
        if base.get("type") not in _TYPES:
            raise _Doubt(f"the snapshot of the last point is a VDI of type {base.get('type')}")
        if str(base.get("virtual_size")) != str(old.size_bytes):
            raise _Doubt(
                f"the snapshot of the last point has {base.get('virtual_size')} bytes, the point {old.size_bytes}"
            )
        if disk.size_bytes < old.size_bytes:
            raise _Doubt(f"the disk has {disk.size_bytes} bytes and had {old.size_bytes}")
        return await self._listed(base_ref, disk)

    async def _base_record(self, uuid: str) -> tuple[Ref, dict[str, XapiValue]]:
        try:
            ref = await self._patience.get(
                lambda: self._xapi.call("VDI.get_by_uuid", uuid), "VDI.get_by_uuid", repeatable=True
            )
            record = await self._patience.get(
                lambda: self._xapi.call("VDI.get_record", ref), "VDI.get_record", repeatable=True
            )
        except PoolError as exc:
            raise _Doubt(_told("the snapshot of the last point", exc)) from exc
        if not isinstance(ref, str) or not isinstance(record, dict):
            raise _Doubt("XAPI answered with something that is no VDI")
        return ref, record

    async def _listed(self, base_ref: Ref, disk: TakenDisk) -> Sequence[Extent]:
        try:
            bitmap = await self._patience.get(
                lambda: self._xapi.call(
                    "VDI.list_changed_blocks", base_ref, disk.snapshot_ref, timeout_s=_LIST_TIMEOUT_S
                ),
                "VDI.list_changed_blocks",
                repeatable=True,
            )
        except PoolError as exc:
            reset = isinstance(exc, XapiFailure) and exc.code == LOG_INCONSISTENT
            raise _Doubt(_told("the changed blocks can not be listed", exc), reset=reset) from exc
        if not isinstance(bitmap, str):
            raise _Doubt("XAPI answered with something that is no bitmap")
        try:
            return parse_bitmap(bitmap.encode(), disk.size_bytes)
        except BitmapInvalid as exc:
            raise _Doubt(exc.message) from exc


def _told(what: str, error: PoolError) -> str:
    """A reason from an error: short, and fit for a point that is kept for years."""
    if isinstance(error, XapiFailure):
        return f"{what}: {meaning_of(error.code).text} ({error.code})"
    return f"{what}: {error.message}"
