"""Where a disk of a VM differs from a restore point: what is known for certain, and what must be read to know.

Certain are the block maps of two points. What the VM wrote after the newer one is told by changed-block tracking, and
those blocks are read and compared. The rule is the backup's: whatever is doubtful means that all of the disk is read,
with the reason kept. Facts: xen-api (VDI.list_changed_blocks of a live VDI that is not attached), SM cbtutil.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

from xbfs_engine.core.errors import BitmapInvalid, PoolError, XapiFailure
from xbfs_engine.restore.rewind.marks import ChunkMarks
from xbfs_engine.restore.rewind.report import Way
from xbfs_engine.source.cbt import parse_bitmap
from xbfs_engine.source.xapi.failures import meaning_of
from xbfs_engine.source.xapi.values import NULL_REF

if TYPE_CHECKING:
    from collections.abc import Sequence

    from xbfs_engine.catalog.restore_point import DiskRecord, RestorePoint
    from xbfs_engine.restore.rewind.matching import MatchedDisk
    from xbfs_engine.restore.rewind.ports import BaseOf
    from xbfs_engine.source.base import Extent
    from xbfs_engine.source.xapi.patience import Patience
    from xbfs_engine.source.xapi.session import Ref, Xapi, XapiValue

_BASE_TYPES: Final = frozenset({"user", "system", "cbt_metadata"})
_LIST_S: Final = 300.0
_ID_DIGITS: Final = 12


class Knowledge(NamedTuple):
    """What is known of a disk. ``newer``: it is as this record says, but for ``unknown``; None: nothing is known.

    ``exact``: False where the VM runs, so that nobody can ask what it wrote since.
    """

    newer: DiskRecord | None
    unknown: ChunkMarks
    way: Way
    reason: str
    exact: bool = True


class _Doubt(Exception):
    """A check that did not hold."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Differences:
    """Decides for the disks of one VM. ``newest``: its newest point.

    ``fresh``: that point was made just now of the halted VM, which nobody could start since. ``halted``: whether the
    VM stands still; ``pool_uuid``: where it is.
    """

    def __init__(
        self,
        xapi: Xapi,
        patience: Patience,
        base_of: BaseOf,
        *,
        newest: RestorePoint,
        fresh: bool,
        halted: bool,
        pool_uuid: str,
    ) -> None:
        self._xapi = xapi
        self._patience = patience
        self._base_of = base_of
        self._newest = newest
        self._fresh = fresh
        self._halted = halted
        self._pool_uuid = pool_uuid

    async def known(self, disk: MatchedDisk, *, full: bool) -> Knowledge:
        """What is known of ``disk``; ``full``: a full compare was asked for. Never raises a PoolError."""
        if full:
            return self._nothing(disk, "a full compare was asked for")
        try:
            return await self._known(disk)
        except _Doubt as doubt:
            return self._nothing(disk, doubt.reason)

    def _nothing(self, disk: MatchedDisk, reason: str) -> Knowledge:
        return Knowledge(None, _marks(disk, full=True), Way.FULL, reason, exact=self._halted)

    async def _known(self, disk: MatchedDisk) -> Knowledge:
        short = self._newest.id[:_ID_DIGITS]
        newer = next((record for record in self._newest.disks if record.vdi_uuid == disk.vdi.uuid), None)
        if newer is None:
            raise _Doubt(f"the newest point {short} does not hold this VDI: reverted, replaced or added since")
        if newer.chunk_size != disk.record.chunk_size:
            raise _Doubt(f"the newest point {short} has another chunk size")
        if newer.size_bytes > disk.vdi.size_bytes or (self._fresh and newer.size_bytes != disk.vdi.size_bytes):
            raise _Doubt(f"the disk has {disk.vdi.size_bytes} bytes, in the newest point {short} {newer.size_bytes}")
        if self._fresh:
            return Knowledge(newer, _marks(disk), Way.MAPS, f"compared with safety point {short}")
        if not self._halted:
            reason = f"compared with point {short}; what the VM wrote since is known once it is halted"
            return Knowledge(newer, _marks(disk), Way.MAPS, reason, exact=False)
        unknown = _marks(disk)
        for offset, length in await self._changed(disk, newer):
            unknown.add(offset // unknown.chunk_size, -(-(offset + length) // unknown.chunk_size))
        return Knowledge(newer, unknown, Way.CHANGED_BLOCKS, f"compared with point {short} and changed blocks since")

    async def _changed(self, disk: MatchedDisk, newer: DiskRecord) -> Sequence[Extent]:
        if not disk.vdi.cbt_enabled:
            raise _Doubt("changes of the disk are not tracked")
        base = self._base_of(self._newest.vm)
        uuid = base.snapshots.get(newer.number) if base and base.pool_uuid == self._pool_uuid else None
        if uuid is None:
            raise _Doubt("the newest point left no snapshot on this pool to compare with")
        ref, record = await self._base_record(uuid)
        if record.get("cbt_enabled") is not True or record.get("type") not in _BASE_TYPES:
            raise _Doubt("the snapshot of the newest point has no changed-block log any more")
        if str(record.get("virtual_size")) != str(newer.size_bytes):
            raise _Doubt("the snapshot of the newest point has another size than the point")
        return await self._listed(ref, disk)

    async def _base_record(self, uuid: str) -> tuple[Ref, dict[str, XapiValue]]:
        try:
            ref = await self._call("VDI.get_by_uuid", uuid)
            record = await self._call("VDI.get_record", ref)
        except PoolError as exc:
            raise _Doubt(_told("the snapshot of the newest point", exc)) from exc
        if not isinstance(ref, str) or ref == NULL_REF or not isinstance(record, dict):
            raise _Doubt("XAPI answered with something that is no VDI")
        return ref, record

    async def _listed(self, base_ref: Ref, disk: MatchedDisk) -> Sequence[Extent]:
        try:
            bitmap = await self._call("VDI.list_changed_blocks", base_ref, disk.vdi.ref, timeout_s=_LIST_S)
        except PoolError as exc:
            raise _Doubt(_told("the changed blocks can not be listed", exc)) from exc
        try:
            return parse_bitmap(bitmap.encode() if isinstance(bitmap, str) else b"?", disk.vdi.size_bytes)
        except BitmapInvalid as exc:
            raise _Doubt(exc.message) from exc

    async def _call(self, method: str, *arguments: XapiValue, timeout_s: float = 60.0) -> XapiValue:
        return await self._patience.get(
            lambda: self._xapi.call(method, *arguments, timeout_s=timeout_s), method, repeatable=True
        )


def _marks(disk: MatchedDisk, *, full: bool = False) -> ChunkMarks:
    return ChunkMarks(disk.vdi.size_bytes, disk.record.chunk_size, full=full)


def _told(what: str, error: PoolError) -> str:
    if isinstance(error, XapiFailure):
        return f"{what}: {meaning_of(error.code).text} ({error.code})"
    return f"{what}: {error.message}"
