"""A pool in memory, a repository in memory and ledgers on disk: whole backup cycles of VMs in a test."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import trio
from trio.testing import MockClock

from tests.support.engine import Engine
from tests.support.fake_pool import FakeAccess, FakePool
from tests.support.runtime import FixedClock, SeededRandom
from xbfs_engine.core.runtime import Runtime
from xbfs_engine.ingest.vm.choosing import choose
from xbfs_engine.ingest.vm.cycle import Origin, Target, VmCycle, VmReport, Wishes
from xbfs_engine.ingest.vm.places import Places
from xbfs_engine.source.xapi.inventory import take_inventory
from xbfs_engine.source.xapi.ledger import Ledgers
from xbfs_engine.source.xapi.patience import Patience

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Collection
    from pathlib import Path

    from xbfs_engine.catalog.restore_point import RestorePoint
    from xbfs_engine.core.errors import XbfsError
    from xbfs_engine.ingest.statistics import Progress

NODE = "test"
SPEED = 200.0
"""Seconds of waiting that pass in one."""


class Heard:
    """A listener that remembers."""

    def __init__(self) -> None:
        self.steps: list[str] = []

    def step(self, vm_name: str, what: str) -> None:
        self.steps.append(f"{vm_name}: {what}")

    def progress(self, vm_name: str, now: Progress) -> None:
        pass

    def failed(self, vm_name: str, error: XbfsError) -> None:
        self.steps.append(f"{vm_name}: failed: {error.message}")


class FakeRecorder:
    """Captures next to nothing."""

    def __init__(self, pool: FakePool) -> None:
        self._pool = pool

    async def capture(self, vm_ref: str, snapshot_ref: str) -> dict[str, Any]:
        await self._pool.call("VM.get_record", snapshot_ref)
        return {"archive": f"of {self._pool.uuid(vm_ref)}".encode()}


class Lab:
    """One pool and one repository. ``backup`` is one run of one process of this node."""

    def __init__(self, directory: Path, pool: FakePool | None = None, engine: Engine | None = None) -> None:
        self.pool = pool or FakePool()
        self.access = FakeAccess(self.pool)
        self.engine = engine or Engine.fresh(directory / "cache")
        self.clock = FixedClock()
        self.runtime = Runtime(self.clock, SeededRandom(7))
        self.ledgers = Ledgers(directory / "runs", self.runtime)
        self.heard = Heard()

    def backup(self, vm: str, wishes: Wishes = Wishes(), *, exclude: Collection[int] = ()) -> VmReport:  # noqa: B008
        return self.run(lambda: self.cycle(vm, wishes, exclude=exclude))

    def run(self, work: Callable[[], Awaitable[Any]]) -> Any:
        return trio.run(work, clock=MockClock(rate=SPEED))

    async def cycle(self, vm: str, wishes: Wishes = Wishes(), *, exclude: Collection[int] = ()) -> VmReport:  # noqa: B008
        self.clock.advance(60)
        self.engine.clock.advance(60)
        async with self.ledgers.begin(NODE) as ledger:
            inventory = await take_inventory(self.pool)
            chosen = choose(inventory, inventory.vms[vm], exclude)
            origin = Origin(
                xapi=self.pool,
                pool_uuid=inventory.pool_uuid,
                access=self.access,
                recorder=FakeRecorder(self.pool),
                ledger=ledger,
                live={state.record.run for state in await self.ledgers.runs() if state.live},
                patience=Patience(self.runtime.random),
                places=Places(),
                turn=self.ledgers.turn,
            )
            target = Target(self.engine.repository, self.engine.catalog, self.engine.index, NODE, "xbfs test")
            return await VmCycle(origin, target, chosen, wishes, self.heard).run()

    def check_point(self, point: RestorePoint, contents: dict[int, bytes]) -> None:
        """The point holds exactly these bytes, by disk number."""
        assert {disk.number: disk.size_bytes for disk in point.disks} == {n: len(c) for n, c in contents.items()}
        for disk in point.disks:
            assert self.engine.read(disk) == contents[disk.number], f"disk {disk.number}"

    def kept(self) -> list[str]:
        """uuids of the VDIs that ledgers keep as bases."""
        states = trio.run(self.ledgers.runs)
        return [item.uuid for state in states for item in state.record.items.values() if item.keep]

    def noted(self) -> list[str]:
        """What ledgers say is on the pool beside bases."""
        states = trio.run(self.ledgers.runs)
        return [item.kind.value for state in states for item in state.record.items.values() if not item.keep]
