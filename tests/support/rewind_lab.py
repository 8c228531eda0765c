"""Rewinds in a test: the backup lab's pool and repository, a guest that stops and starts, disks one can write."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from tests.support.engine import MemorySource
from tests.support.fake_pool import NULL, FakePool, _error
from tests.support.vm_lab import NODE, Lab
from tools.xensim.failures import Failure
from xbfs_engine.core.errors import SourceUnreadable
from xbfs_engine.ingest.vm.base import base_of, known_bases
from xbfs_engine.restore.rewind.rewind import PointSide, PoolSide, Rewind, Wishes, give_up
from xbfs_engine.source.xapi.patience import Patience

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

    from xbfs_engine.catalog.restore_point import RestorePoint
    from xbfs_engine.restore.rewind.guard import HalfWritten
    from xbfs_engine.restore.rewind.report import DiskReport, RewindReport


class RewindPool(FakePool):
    """Stops, starts, creates; honours blocked operations and disks that are in use."""

    deaf_guest = False

    def VM_clean_shutdown(self, vm: str) -> None:
        if self.deaf_guest:
            raise Failure("XBFS_TASK_TIMEOUT")
        self.db.set(vm, power_state="Halted")

    def VM_start(self, vm: str, paused: bool, force: bool) -> None:
        del paused, force
        self._refuse_blocked(vm, "start")
        self.db.set(vm, power_state="Running")

    def VM_snapshot(self, vm: str, name: str, *ignored: Any) -> str:
        self._refuse_blocked(vm, "snapshot")
        return super().VM_snapshot(vm, name, *ignored)

    def VDI_create(self, record: dict[str, Any]) -> str:
        fields = {**record, "virtual_size": int(record["virtual_size"])}
        vdi = self.db.create("VDI", **fields, managed=True, on_boot="persist")
        self.content[vdi] = bytearray(fields["virtual_size"])
        return vdi

    def VBD_create(self, record: dict[str, Any]) -> str:
        if any(self.db.text(vbd, "userdevice") == record["userdevice"] for vbd in self.db.refs(record["VM"], "VBDs")):
            raise Failure("DEVICE_ALREADY_EXISTS", record["userdevice"])
        return self.db.create("VBD", **record)

    def VDI_list_changed_blocks(self, vdi_from: str, vdi_to: str) -> str:
        users = self.db.refs(vdi_to, "VBDs")
        if any(self.db.text(self.db.text(vbd, "VM"), "power_state") == "Running" for vbd in users):
            raise Failure("VDI_IN_USE", vdi_to, "list_changed_blocks")
        return super().VDI_list_changed_blocks(vdi_from, vdi_to)

    def _refuse_blocked(self, vm: str, operation: str) -> None:
        blocked = self.blocked(vm)
        if operation in blocked:
            raise Failure("OPERATION_BLOCKED", vm, blocked[operation])


class FakeDisks:
    """DiskReader and DiskWriter over a pool's content. ``written``: what came, by VDI, as (offset, length)."""

    def __init__(self, pool: RewindPool) -> None:
        self.pool = pool
        self.nbd_offered = True
        self.nbd_error: Exception | None = None
        self.reads: list[tuple[str, MemorySource]] = []
        self.written: list[tuple[str, int, int]] = []
        self.refuses_patch = ""
        """A code with which hosts answer a patch."""
        self.break_write_at: int | None = None
        """The number of the write that breaks, once; 0 is the next."""
        self.error_of_break: Exception | None = None
        self.loses_write_at: int | None = None
        """The number of the write that never reaches the disk."""
        self.before_write: Callable[[], None] = lambda: None

    @property
    def read_bytes(self) -> int:
        return sum(source.read_bytes for _, source in self.reads)

    async def has_nbd(self, vdi_ref: str) -> bool:
        self.pool.db.check("VDI", vdi_ref)
        return self.nbd_offered

    @asynccontextmanager
    async def nbd(self, vdi_ref: str, size_bytes: int) -> AsyncIterator[MemorySource]:
        if self.nbd_error is not None:
            raise self.nbd_error
        yield self._open("nbd", vdi_ref, size_bytes)

    @asynccontextmanager
    async def stream(self, vdi_ref: str, size_bytes: int) -> AsyncIterator[MemorySource]:
        yield self._open("stream", vdi_ref, size_bytes)

    @asynccontextmanager
    async def patch(self, vdi_ref: str) -> AsyncIterator[FakeSink]:
        if self.refuses_patch:
            raise _error("import", self.refuses_patch, ())
        yield FakeSink(self, vdi_ref)

    @asynccontextmanager
    async def fill(self, vdi_ref: str, size_bytes: int) -> AsyncIterator[FakeSink]:
        sink = FakeSink(self, vdi_ref)
        yield sink
        assert sink.position == size_bytes

    def _open(self, way: str, vdi_ref: str, size_bytes: int) -> MemorySource:
        if self.pool.db.text(vdi_ref, "type") == "cbt_metadata":
            raise SourceUnreadable("no data")
        source = MemorySource.of(self.pool.content[vdi_ref])
        assert source.size_bytes == size_bytes
        self.reads.append((way, source))
        return source


class FakeSink:
    def __init__(self, disks: FakeDisks, vdi: str) -> None:
        self._disks = disks
        self._vdi = vdi
        self.position = 0

    def write(self, data: Any) -> None:
        self.write_at(self.position, data)
        self.position += len(data)

    def write_at(self, offset: int, data: Any) -> None:
        disks = self._disks
        disks.before_write()
        number = len(disks.written)
        if disks.break_write_at == number and disks.error_of_break is not None:
            disks.break_write_at = None
            raise disks.error_of_break
        disks.written.append((self._vdi, offset, len(data)))
        if disks.loses_write_at != number:
            disks.pool.write(self._vdi, offset, bytes(data))


class Told:
    """A listener that remembers."""

    def __init__(self) -> None:
        self.steps: list[str] = []
        self.plans: list[list[DiskReport]] = []
        self.warnings: list[str] = []
        self.done: dict[str, tuple[int, int]] = {}

    def step(self, what: str) -> None:
        self.steps.append(what)

    def plan(self, disks: list[DiskReport]) -> None:
        self.plans.append(disks)

    def progress(self, what: str, done_bytes: int, total_bytes: int) -> None:
        assert done_bytes <= total_bytes
        self.done[what] = (done_bytes, total_bytes)

    def warn(self, what: str, hint: str) -> None:
        self.warnings.append(f"{what} -- {hint}")


class RewindLab(Lab):
    """One pool, one repository, one VM after the other."""

    pool: RewindPool

    def __init__(self, directory: Path) -> None:
        super().__init__(directory, RewindPool())
        self.disks = FakeDisks(self.pool)
        self.told = Told()

    def halted_vm(self, name: str = "web") -> str:
        return self.pool.vm(name, power_state="Halted")

    def rewind(self, vm: str, point: RestorePoint, *, safety: bool = False, **wishes: Any) -> RewindReport:
        report: RewindReport = self.run(lambda: self.rewinding(vm, point, safety=safety, **wishes))
        return report

    async def rewinding(self, vm: str, point: RestorePoint, *, safety: bool = False, **wishes: Any) -> RewindReport:
        async def safety_point() -> RestorePoint:
            return (await self.cycle(vm)).point

        chosen = Wishes(safety_point if safety else None, **wishes)
        return await Rewind(self.pool_side(), self.point_side(), self.pool.uuid(vm), point, chosen).run(self.told)

    def abandon(self, vm: str) -> HalfWritten | None:
        left: HalfWritten | None = self.run(lambda: give_up(self.pool_side(), self.pool.uuid(vm)))
        return left

    def pool_side(self, node: str = NODE) -> PoolSide:
        return PoolSide(self.pool, self.disks, self.disks, self.ledgers, Patience(self.runtime.random), node)

    def point_side(self) -> PointSide:
        engine = self.engine
        bases = known_bases(engine.catalog, engine.repository.id)
        return PointSide(engine.repository, engine.catalog, engine.index, base_of, bases)

    def state(self) -> dict[str, Any]:
        """Everything on the pool, for comparing."""
        db = self.pool.db
        records = {ref: dict(db.get(ref)) for cls in ("VM", "VDI", "VBD") for ref in db.all(cls)}
        return {"records": records, "content": {ref: bytes(data) for ref, data in self.pool.content.items()}}


__all__ = ["NULL", "FakeDisks", "RewindLab", "RewindPool", "Told"]
