"""The rewind of one VM: from its stopped guest to its verified disks, with nothing written that need not be.

Order: match the disks, keep the VM still, stop it, take the safety point, find what differs, note on the VM that its
disks are on their way, write, read back, allow the VM again, start it. Whatever fails before the note leaves the VM as
it was; whatever fails after it leaves the VM blocked with a reason that says which rewind to run again (``guard``).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import trio

from xbfs_engine.core.errors import IntegrityError, ObjectNotFound, PoolError, VmNotReady
from xbfs_engine.core.log import Logger
from xbfs_engine.restore.rewind import power
from xbfs_engine.restore.rewind.difference import Differences
from xbfs_engine.restore.rewind.guard import HalfWritten, abandon, check_dead, half_written, kept_still
from xbfs_engine.restore.rewind.matching import Matched, match
from xbfs_engine.restore.rewind.reading import differing
from xbfs_engine.restore.rewind.replace import replaced
from xbfs_engine.restore.rewind.report import DiskReport, RewindReport
from xbfs_engine.restore.rewind.wanted import WantedDisk
from xbfs_engine.restore.rewind.writing import fill, is_refusal, patch
from xbfs_engine.source.xapi.inventory import take_inventory
from xbfs_engine.source.xapi.selection import one_vm
from xbfs_engine.source.xapi.sweep import sweep
from xbfs_engine.storage.waiting import in_thread, while_answering
from xbfs_engine.store.reader import ChunkReader

if TYPE_CHECKING:
    from collections.abc import Sequence

    from xbfs_engine.catalog.catalog import Catalog
    from xbfs_engine.catalog.restore_point import RestorePoint
    from xbfs_engine.restore.rewind.difference import Knowledge
    from xbfs_engine.restore.rewind.guard import Guard
    from xbfs_engine.restore.rewind.marks import ChunkMarks
    from xbfs_engine.restore.rewind.matching import MatchedDisk
    from xbfs_engine.restore.rewind.ports import BaseOf, DiskReader, DiskWriter, Listener, SafetyPoint
    from xbfs_engine.source.xapi.inventory import Inventory, Vm
    from xbfs_engine.source.xapi.ledger import Ledgers, RunLedger
    from xbfs_engine.source.xapi.patience import Patience
    from xbfs_engine.source.xapi.session import Ref, Xapi
    from xbfs_engine.source.xapi.sweep import KnownBases
    from xbfs_engine.store.reader import Locator
    from xbfs_engine.store.repository import Repository

_log = Logger("xbfs.rewind")


@dataclass(frozen=True, slots=True)
class PoolSide:
    """The pool, logged in, and what one needs to read and write its disks."""

    xapi: Xapi
    reader: DiskReader
    writer: DiskWriter
    ledgers: Ledgers
    patience: Patience
    node: str


@dataclass(frozen=True, slots=True)
class PointSide:
    """The repository. ``base_of``: what a point remembers of its pool; ``bases``: which bases a sweep must keep."""

    repository: Repository
    catalog: Catalog
    locator: Locator | None
    base_of: BaseOf
    bases: KnownBases


class Wishes(NamedTuple):
    """``safety``: how to back the VM up before; None: not wanted. ``full_compare``: trust no record, read all.

    ``stop``, ``start``: shut a running VM down before, start it afterwards.
    """

    safety: SafetyPoint | None
    dry_run: bool = False
    stop: bool = False
    start: bool = False
    full_compare: bool = False
    stop_timeout_s: float = power.STOP_S


class _Job(NamedTuple):
    """A disk with what is known, and what is to be written."""

    disk: MatchedDisk
    wanted: WantedDisk
    marks: ChunkMarks
    report: DiskReport


class Rewind:
    """One VM, one run. Used once."""

    def __init__(self, pool: PoolSide, points: PointSide, vm: str, point: RestorePoint, wishes: Wishes) -> None:
        self._pool = pool
        self._points = points
        self._name = vm
        self._point = point
        self._wishes = wishes
        self._reader = ChunkReader(points.repository.storage, points.repository.keys, points.locator)
        self._safety: RestorePoint | None = None
        self._stopped = self._began = self._verified = False

    @property
    def half_written(self) -> bool:
        """Whether disks may be neither as before nor as the point."""
        return self._began and not self._verified

    async def run(self, listener: Listener) -> RewindReport:
        """Rewind, or with ``dry_run`` only say what that would write.

        Raises ObjectNotFound, UsageError, VmNotReady: nothing was begun. PoolError, SourceError, StorageError,
        IntegrityError: see the module for what is left then.
        """
        return await while_answering(self._points.repository.storage, partial(self._run, listener))

    async def _run(self, listener: Listener) -> RewindReport:
        if not self._wishes.dry_run:
            await self._sweep(listener)
        inventory = await take_inventory(self._pool.xapi)
        vm = one_vm(inventory, self._name)
        left = half_written(vm.blocked_operations)
        if left is not None:
            await self._tell_left(listener, vm, left)
        matched = self._match(inventory, vm)
        if self._wishes.dry_run:
            jobs = await self._plan(listener, inventory, vm, matched)
            listener.plan([job.report for job in jobs])
            return self._report(vm, matched, jobs)
        power.check_stoppable(vm, wanted=self._wishes.stop)
        async with self._pool.ledgers.begin(self._pool.node) as ledger:
            try:
                guarding = kept_still(self._pool.xapi, self._pool.patience, ledger, vm_ref=vm.ref, vm_uuid=vm.uuid)
                async with guarding as guard:
                    report = await self._rewind(listener, guard, ledger, vm, left)
            except BaseException:
                await self._leave(listener, vm, left)
                raise
            if self._wishes.start:
                listener.step("starting the VM")
                await power.start(self._pool.xapi, self._pool.patience, vm)
            return replace(report, started=self._wishes.start)

    async def _rewind(
        self, listener: Listener, guard: Guard, ledger: RunLedger, vm: Vm, left: HalfWritten | None
    ) -> RewindReport:
        xapi = self._pool.xapi
        if vm.power_state == power.RUNNING:
            listener.step("shutting the VM down")
            await power.stop(xapi, vm, timeout_s=self._wishes.stop_timeout_s)
            self._stopped = True
        if self._wishes.safety is not None and left is None:
            listener.step("taking a safety point")
            self._safety = await self._wishes.safety()
        inventory = await take_inventory(xapi)
        vm = _halted(inventory, vm)
        matched = self._match(inventory, vm)
        jobs = await self._plan(listener, inventory, vm, matched)
        listener.plan([job.report for job in jobs])
        todo = [job for job in jobs if job.report.differing_bytes]
        if todo:
            for job in todo:
                # Whether we can read the point at all is better known before anything is overwritten.
                await in_thread(job.wanted.content, [next(job.marks.runs())[0]])
            safety = self._safety.id if self._safety else left.safety if left else ""
            await guard.begin_writing(self._point.id, safety)
            self._began = True
        done = [await self._write(listener, ledger, vm, job) if job in todo else job for job in jobs]
        self._verified = True
        listener.step("allowing the VM to be started")
        await guard.release()
        return replace(self._report(vm, matched, done), written=bool(todo))

    async def _plan(self, listener: Listener, inventory: Inventory, vm: Vm, matched: Matched) -> list[_Job]:
        """What differs; reads what must be read for that, and writes nothing."""
        newest = self._safety if self._safety is not None else await in_thread(self._newest)
        halted = vm.power_state == power.HALTED
        differences = Differences(
            self._pool.xapi,
            self._pool.patience,
            self._points.base_of,
            newest=newest,
            fresh=self._safety is not None,
            halted=halted,
            pool_uuid=inventory.pool_uuid,
        )
        jobs = []
        for disk in matched.disks:
            listener.step(f"comparing disk {disk.number}")
            full = self._wishes.full_compare or disk.by_position
            knowledge = await differences.known(disk, full=full)
            jobs.append(await self._compare(listener, disk, knowledge, halted=halted))
        return jobs

    def _newest(self) -> RestorePoint:
        self._points.catalog.refresh()
        # There is one: at least the point that is rewound to.
        return self._points.catalog.latest(self._point.vm_uuid) or self._point

    async def _compare(self, listener: Listener, disk: MatchedDisk, knowledge: Knowledge, *, halted: bool) -> _Job:
        wanted = WantedDisk(self._reader, disk.record, disk.vdi.size_bytes)
        marks = wanted.marks()
        if knowledge.newer is not None:
            marks = await in_thread(wanted.differing_from, knowledge.newer)
        found, read_bytes = knowledge.unknown, knowledge.unknown.marked_bytes
        if halted:
            progress = partial(_progress, listener, f"comparing disk {disk.number}", read_bytes)
            found = await differing(self._pool.reader, disk.vdi.ref, wanted, knowledge.unknown, progress)
        marks.replace(knowledge.unknown, found)
        report = DiskReport(
            number=disk.number,
            name=disk.vdi.name,
            vdi_uuid=disk.vdi.uuid,
            size_bytes=disk.vdi.size_bytes,
            point_size_bytes=disk.record.size_bytes,
            way=knowledge.way,
            reason=knowledge.reason,
            read_bytes=read_bytes,
            differing_bytes=marks.marked_bytes,
            exact=knowledge.exact,
        )
        return _Job(disk, wanted, marks, report)

    async def _write(self, listener: Listener, ledger: RunLedger, vm: Vm, job: _Job) -> _Job:
        """Write a disk and read back what was written; into a new VDI where the host refuses to write this one."""
        pool, disk = self._pool, job.disk
        progress = partial(_progress, listener, f"writing disk {disk.number}", job.report.differing_bytes)
        listener.step(f"writing disk {disk.number}")
        try:
            await patch(pool.writer, pool.patience, disk.vdi.ref, job.wanted, job.marks, progress)
        except PoolError as exc:
            if not is_refusal(exc):
                raise
            listener.warn(
                f"disk {disk.number} can not be written in place: {exc.message}", "a new VDI takes the place of it"
            )
        else:
            await self._verify(listener, job, disk.vdi.ref, job.marks)
            return job

        async def write_all(ref: Ref) -> None:
            everything = job.wanted.marks(full=True)
            told = partial(_progress, listener, f"writing disk {disk.number}", everything.marked_bytes)
            await fill(pool.writer, pool.patience, ref, job.wanted, told)
            await self._verify(listener, job, ref, everything)

        new = await replaced(pool.xapi, pool.patience, ledger, vm=vm, disk=disk, write=write_all)
        return job._replace(report=replace(job.report, replaced_by=new.uuid))

    async def _verify(self, listener: Listener, job: _Job, ref: Ref, where: ChunkMarks) -> None:
        number = job.disk.number
        listener.step(f"verifying disk {number}")
        progress = partial(_progress, listener, f"verifying disk {number}", where.marked_bytes)
        wrong = await differing(self._pool.reader, ref, job.wanted, where, progress)
        first = next(wrong.runs(), None)
        if first is not None:
            raise IntegrityError(
                f"disk {number} ({job.disk.vdi.uuid}): what was read back at byte {wrong.extent(*first)[0]} is not "
                f"what was written ({wrong.marked_bytes} bytes differ in all)",
                hint="look at the SR and the network before you run the rewind again",
            )

    async def _sweep(self, listener: Listener) -> None:
        """What dead runs left may be in the way: their blocked operations, their hold on disks."""
        pool = self._pool
        swept = await sweep(pool.xapi, pool.ledgers, node=pool.node, dry_run=False, bases=self._points.bases)
        for failed in swept.failed:
            listener.warn(
                f"a leftover stays: {failed.step.deed.value} {failed.step.uuid}: {failed.reason}", failed.hint
            )

    async def _tell_left(self, listener: Listener, vm: Vm, left: HalfWritten) -> None:
        """A rewind before this one has not ended. Raises VmNotReady if it may be at work."""
        told = f"disks of {vm.name!r} are half-written: a rewind to {left.point} by node {left.node} has not ended"
        listener.warn(told, f"the VM as it was is safety point {left.safety}" if left.safety else "")
        if self._wishes.dry_run:
            return
        check_dead(left, await _live(self._pool.ledgers))
        if vm.power_state != power.HALTED:
            raise VmNotReady(
                f"{vm.name!r} is {vm.power_state.lower()} with half-written disks: somebody allowed its start",
                hint="what it wrote has no restore point: take the mark off with --abandon, and rewind as usual then",
            )
        if left.node != self._pool.node:
            raise VmNotReady(
                f"node {left.node} rewinds {vm.name!r}, or died while it did",
                hint="if nothing runs there, take the mark off with `xbfs rewind VM --abandon` and rewind again",
            )

    async def _leave(self, listener: Listener, vm: Vm, left: HalfWritten | None) -> None:
        """After a failure: say what is left, and start again what we stopped."""
        if self._verified:
            listener.warn(
                f"{vm.name!r} is rewound, but not all of its operations are allowed again",
                f"run `xbfs rewind {vm.name} --to {self._point.id[:12]}` again: it only does that",
            )
        elif self._began or left is not None:
            listener.warn(
                f"disks of {vm.name!r} are half-written, and it can not be started",
                f"run `xbfs rewind {vm.name} --to {self._point.id[:12]}` again"
                + (f", or go back to {self._safety.id[:12]}" if self._safety else ""),
            )
        elif self._stopped and self._wishes.start:
            with trio.move_on_after(power.STOP_S, shield=True):
                try:
                    await power.start(self._pool.xapi, self._pool.patience, vm)
                except PoolError as exc:
                    listener.warn(f"{vm.name!r} was shut down and could not be started again: {exc.message}", exc.hint)

    def _match(self, inventory: Inventory, vm: Vm) -> Matched:
        return match(inventory, vm, self._point, by_position=self._wishes.full_compare)

    def _report(self, vm: Vm, matched: Matched, jobs: Sequence[_Job]) -> RewindReport:
        return RewindReport(
            vm_uuid=vm.uuid,
            vm_name=vm.name,
            point=self._point,
            safety_point=self._safety,
            disks=[job.report for job in jobs],
            untouched=matched.untouched,
            written=False,
            started=False,
        )


async def give_up(pool: PoolSide, vm: str) -> HalfWritten | None:
    """Let the half-written disks of a VM be used as they are; what was left, or None if nothing was.

    Raises ObjectNotFound, VmNotReady while the rewind is at work, PoolError.
    """
    found = one_vm(await take_inventory(pool.xapi), vm)
    return await abandon(pool.xapi, pool.patience, vm_ref=found.ref, live=await _live(pool.ledgers))


async def _live(ledgers: Ledgers) -> frozenset[str]:
    return frozenset(state.record.run for state in await ledgers.runs() if state.live)


def _halted(inventory: Inventory, vm: Vm) -> Vm:
    """The VM as it is now. Raises ObjectNotFound, VmNotReady."""
    now = inventory.vm_by_uuid(vm.uuid)
    if now is None:
        raise ObjectNotFound(f"VM {vm.name!r} is no longer on the pool")
    if now.power_state != power.HALTED:
        raise VmNotReady(f"{vm.name!r} was started meanwhile: it is {now.power_state.lower()}")
    return now


def _progress(listener: Listener, what: str, total_bytes: int, done_bytes: int) -> None:
    listener.progress(what, done_bytes, total_bytes)
