"""The cycle for one VM: from its blocked migration to its freed snapshot, with the commit of the point in between.

Order (xen-api; the order in which a crash does the least harm): block, enable_cbt, VM.snapshot with
markers, list_changed_blocks, read, commit, VM.destroy, data_destroy, destroy the old base, unblock. Everything made is
in the ledger before; what a failure before the commit leaves is undone here, what a crash leaves by a sweep. The old
base goes only after the commit.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Final, NamedTuple

import trio

from xbfs_engine.core.errors import (
    CertificateRejected,
    PoolError,
    PoolUnreachable,
    SourceUnreadable,
    TransferFailed,
    VmNotReady,
    XapiFailure,
    XbfsError,
)
from xbfs_engine.core.log import Logger
from xbfs_engine.ingest.backup import BackupRequest, BackupRun, DiskJob
from xbfs_engine.ingest.vm.base import KEY, XenBase, base_of
from xbfs_engine.ingest.vm.delta import Delta, Deltas
from xbfs_engine.ingest.vm.disks import Bases
from xbfs_engine.ingest.vm.letting_go import LettingGo, is_base
from xbfs_engine.ingest.vm.migration import migration_blocked
from xbfs_engine.ingest.vm.older import OlderBases
from xbfs_engine.ingest.vm.reading import Wanted, one_at_a_time
from xbfs_engine.ingest.vm.taking import SnapshotTaker
from xbfs_engine.ingest.vm.tracking import track

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from collections.abc import Set as AbstractSet
    from contextlib import AbstractAsyncContextManager

    from xbfs_engine.catalog.catalog import Catalog
    from xbfs_engine.catalog.restore_point import RestorePoint
    from xbfs_engine.codec.wire import Value
    from xbfs_engine.formats.vhd_stream import AllocatedBlocks
    from xbfs_engine.ingest.statistics import Progress
    from xbfs_engine.ingest.vm.disks import ChosenVm, Snapshot, TakenDisk
    from xbfs_engine.ingest.vm.places import Places
    from xbfs_engine.ingest.vm.ports import Listener, Recorder
    from xbfs_engine.ingest.vm.reading import DiskAccess
    from xbfs_engine.source.base import DiskSource
    from xbfs_engine.source.xapi.ledger import RunLedger
    from xbfs_engine.source.xapi.patience import Patience
    from xbfs_engine.source.xapi.session import Xapi
    from xbfs_engine.store.index import ChunkIndex
    from xbfs_engine.store.repository import Repository

    Way = Callable[[Wanted], AbstractAsyncContextManager[DiskSource]]

_DISCARD_S: Final = 300.0
"""How long a failed or cancelled run may take to undo a snapshot; a detaching dom0 takes 50 s."""

_LET_GO_S: Final = 900.0
_OTHER_WAY: Final = (TransferFailed, SourceUnreadable, CertificateRejected, PoolUnreachable)
"""What makes a read worth another try over HTTPS, whose hosts are pinned like those of all calls: what was read before
is in the repository already. Another try over NBD was made by that itself, on every host."""

_log = Logger("xbfs.vm")


@dataclass(frozen=True, slots=True)
class Target:
    """Where points go. All VMs of a run share it."""

    repository: Repository
    catalog: Catalog
    index: ChunkIndex
    node: str
    program: str


@dataclass(frozen=True, slots=True)
class Origin:
    """The pool that VMs are read from, and what a run has for that.

    ``live``: this node's runs that are at work. ``turn``: holds a VM; False if another run of this node does.
    """

    xapi: Xapi
    pool_uuid: str
    access: DiskAccess
    recorder: Recorder
    ledger: RunLedger
    live: AbstractSet[str]
    patience: Patience
    places: Places
    turn: Callable[[str], AbstractAsyncContextManager[bool]]


class Wishes(NamedTuple):
    """``full``: read all even where changes are known. ``keep_data``: leave the snapshots' data on the pool."""

    full: bool = False
    keep_data: bool = False


class VmReport(NamedTuple):
    """A VM that has a new point. ``warnings``: what could not be tidied up."""

    point: RestorePoint
    warnings: Sequence[str]


class VmCycle:
    """One VM, one run. Used once."""

    def __init__(self, origin: Origin, target: Target, vm: ChosenVm, wishes: Wishes, listener: Listener) -> None:
        self._origin = origin
        self._target = target
        self._vm = vm
        self._wishes = wishes
        self._listener = listener
        self._point: RestorePoint | None = None

    async def run(self) -> VmReport:
        """Make a restore point. Raises VmNotReady, PoolError, SourceError, StorageError; then there is no point."""
        origin, vm = self._origin, self._vm
        if not vm.disks:
            told = "; ".join(f"disk {disk.number}: {disk.reason}" for disk in vm.left_out)
            raise VmNotReady(f"{vm.name!r} has no disk to back up" + (f" ({told})" if told else ""))
        await trio.to_thread.run_sync(self._target.catalog.refresh)
        last = self._target.catalog.latest(vm.uuid)
        bases = Bases(self._target.repository.id, vm.uuid, self._previous(last))
        older = OlderBases(origin.xapi, origin.patience, bases, node=origin.ledger.node, live=origin.live)
        self._step("keeping it from being migrated")
        async with migration_blocked(origin.xapi, origin.patience, origin.ledger, vm_ref=vm.ref, vm_uuid=vm.uuid):
            taker = SnapshotTaker(origin.xapi, origin.patience, origin.ledger, vm, bases)
            going = LettingGo(
                origin.xapi, origin.patience, origin.ledger, bases, older, keep_data=self._wishes.keep_data
            )
            try:
                snapshot = await self._take(taker)
                deltas = await self._decide(snapshot, last)
                await self._read(snapshot, deltas, last, bases)
            finally:
                # Also when it was cancelled: a point that was committed keeps its snapshot as base.
                if self._point is None:
                    await self._discard(taker)
                else:
                    await self._let_go(going, snapshot, deltas)
        assert self._point is not None
        return VmReport(self._point, going.warnings)

    def _previous(self, last: RestorePoint | None) -> Mapping[int, str]:
        """The bases that the last point left on this pool."""
        xen = base_of(last.vm) if last else None
        return xen.snapshots if xen and xen.pool_uuid == self._origin.pool_uuid else {}

    async def _take(self, taker: SnapshotTaker) -> Snapshot:
        origin, vm = self._origin, self._vm
        untracked: dict[int, str] = {}
        for disk in vm.disks:
            async with origin.places.at([disk.sr_ref]):
                reason = await track(origin.xapi, origin.patience, disk)
            if reason is not None:
                untracked[disk.number] = reason
        self._step("taking a snapshot")
        async with origin.places.at({disk.sr_ref for disk in vm.disks}):
            return await taker.take(untracked)

    async def _decide(self, snapshot: Snapshot, last: RestorePoint | None) -> Mapping[int, Delta]:
        self._step("asking for changed blocks")
        smaller = _smaller(snapshot, last)
        if smaller is not None:
            # The engine does not let a point continue one with a larger disk.
            reason = f"a new chain: disk {smaller} is smaller than in the last point"
            return {disk.number: Delta(None, reason, fell_back=True) for disk in snapshot.disks}
        deltas = Deltas(
            self._origin.xapi,
            self._origin.patience,
            last=last,
            pool_uuid=self._origin.pool_uuid,
            chunk_size=self._target.repository.parameters.chunk_size,
        )
        return {disk.number: await deltas.decide(disk, full=self._wishes.full) for disk in snapshot.disks}

    async def _read(
        self, snapshot: Snapshot, deltas: Mapping[int, Delta], last: RestorePoint | None, bases: Bases
    ) -> None:
        """Read by the best way there is, and commit."""
        origin = self._origin
        self._step("recording the VM")
        record = await origin.patience.get(
            lambda: origin.recorder.capture(self._vm.ref, snapshot.vm_ref), "record of the VM", repeatable=True
        )
        xen = XenBase(
            pool_uuid=origin.pool_uuid,
            snapshots={d.number: d.snapshot_uuid for d in snapshot.disks if is_base(d, deltas[d.number])},
            taken={disk.number: disk.snapshot_uuid for disk in snapshot.disks},
            left_out={disk.number: disk.reason for disk in self._vm.left_out},
        )
        vm = {**record, KEY: xen.to_record()}
        self._step("waiting to read")
        async with origin.places.reading():
            allocated = {
                disk.number: await self._allocation(disk)
                for disk in snapshot.disks
                if deltas[disk.number].changed is None
            }
            plan = _Plan(snapshot, deltas, allocated, vm, last, bases)
            await self._read_by_any_way(plan)

    async def _read_by_any_way(self, plan: _Plan) -> None:
        access = self._origin.access
        nbd = await self._has_nbd(plan.snapshot)
        note = "" if nbd else "over HTTPS: no host offers NBD"
        for way in (access.nbd if nbd else access.stream, access.stream):
            try:
                await self._back_up(plan, way, note)
            except _OTHER_WAY as exc:
                _log.warning("reading failed", vm=self._vm.uuid, note=note, error=exc.message)
                note = f"over HTTPS: {exc.message}"
            else:
                return
        await self._back_up(plan, access.stream, note)

    async def _back_up(self, plan: _Plan, way: Way, note: str) -> None:
        async with one_at_a_time() as shelf:
            jobs = []
            for disk in plan.snapshot.disks:
                delta, blocks = plan.deltas[disk.number], plan.allocated.get(disk.number)
                wanted = Wanted(disk.snapshot_ref, disk.size_bytes, blocks.extents if blocks else None)
                reason = f"{delta.reason} ({note})" if note else delta.reason
                source = shelf.disk(wanted, way)
                jobs.append(DiskJob(disk.number, disk.disk.name, disk.vdi_uuid, source, delta.changed, reason))
            request = BackupRequest(
                vm_name=self._vm.name,
                vm_uuid=self._vm.uuid,
                disks=jobs,
                node=self._target.node,
                program=self._target.program,
                vm=plan.vm,
                base=plan.last.id if plan.last else None,
                new_chain=_smaller(plan.snapshot, plan.last) is not None,
                before_commit=partial(self._keep_bases, plan),
            )
            target = self._target
            run = BackupRun(target.repository, target.catalog, target.index, request, self._progress)
            # Before anything else is awaited: from here on the point exists.
            self._point = await run.run()

    async def _keep_bases(self, plan: _Plan) -> None:
        """From here on nobody can tell whether the point exists, so a sweep must take neither old base nor new."""
        for disk in plan.snapshot.disks:
            if is_base(disk, plan.deltas[disk.number]):
                slot = plan.bases.slot(disk.number)
                await self._origin.ledger.keep(disk.item, slot, with_data=self._wishes.keep_data)

    async def _has_nbd(self, snapshot: Snapshot) -> bool:
        try:
            return await self._origin.access.has_nbd(snapshot.disks[0].snapshot_ref)
        except XapiFailure as exc:
            _log.info("get_nbd_info failed", vm=self._vm.uuid, code=exc.code)
            return False

    async def _allocation(self, disk: TakenDisk) -> AllocatedBlocks | None:
        """What to read of a disk whose changes are not known; None: all of it."""
        try:
            return await self._origin.patience.get(
                lambda: self._origin.access.allocation(disk.snapshot_ref, disk.size_bytes), "VHD", repeatable=True
            )
        except (PoolError, SourceUnreadable) as exc:
            _log.info("allocation is not known", vdi=disk.vdi_uuid, error=exc.message)
            return None

    async def _let_go(self, going: LettingGo, snapshot: Snapshot, deltas: Mapping[int, Delta]) -> None:
        self._step("letting go of the snapshot")
        with trio.move_on_after(_LET_GO_S, shield=True) as scope:
            await going.run(snapshot, deltas)
        if scope.cancelled_caught:
            going.warnings.append("the snapshot could not be let go in time; the next sweep does")

    async def _discard(self, taker: SnapshotTaker) -> None:
        with trio.move_on_after(_DISCARD_S, shield=True) as scope:
            try:
                await taker.discard()
            except XbfsError as exc:
                _log.warning("a snapshot is left", vm=self._vm.uuid, error=exc.message)
        if scope.cancelled_caught:
            _log.warning("a snapshot is left", vm=self._vm.uuid, error="it took too long")

    def _step(self, what: str) -> None:
        self._listener.step(self._vm.name, what)

    def _progress(self, now: Progress) -> None:
        self._listener.progress(self._vm.name, now)


def _smaller(snapshot: Snapshot, last: RestorePoint | None) -> int | None:
    """The number of a disk that has another of larger size in the last point; None if there is none."""
    for disk in snapshot.disks:
        old = last.disk(disk.number) if last else None
        if old is not None and disk.size_bytes < old.size_bytes:
            return disk.number
    return None


class _Plan(NamedTuple):
    """What one read of a snapshot needs."""

    snapshot: Snapshot
    deltas: Mapping[int, Delta]
    allocated: Mapping[int, AllocatedBlocks | None]
    vm: dict[str, Value]
    last: RestorePoint | None
    bases: Bases
