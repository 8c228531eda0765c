"""A simulated pool in a process of its own; the repository, the ledgers and the runs of one node in this process."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import trio
from trio.testing import MockClock

from tests.support.engine import Engine
from tests.support.vm_lab import NODE, Heard
from tests.support.xensim import BACKUP_USER, MIB, XenSim, default_world
from xbfs_engine.core.runtime import system_runtime
from xbfs_engine.ingest.vm.base import known_bases
from xbfs_engine.ingest.vm.cycle import Target, Wishes
from xbfs_engine.ingest.vm.job import JobReport, PoolSide, back_up_vms
from xbfs_engine.ingest.vm.reading import PoolAccess
from xbfs_engine.ingest.vm.record import PoolRecorder
from xbfs_engine.ingest.vm.run import RunWishes
from xbfs_engine.source.nbd import HostBudget
from xbfs_engine.source.xapi.config import Address, Credentials, PoolConfig
from xbfs_engine.source.xapi.ledger import Ledgers
from xbfs_engine.source.xapi.session import open_pool
from xbfs_engine.source.xapi.sweep import SweepReport, sweep

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

    from xbfs_engine.catalog.restore_point import RestorePoint
    from xbfs_engine.core.errors import XbfsError

T = TypeVar("T")

SPEED = 10.0
"""Seconds of waiting that pass in one; calls have deadlines of a minute, so a tenth of that is left for the pool."""

RETRY_DELAYS_S = (0.5, 1.0, 4.0)


def world_of(count: int, disks: int = 2, **changes: Any) -> dict[str, Any]:
    """A pool of two hosts with ``count`` running VMs vm0, vm1 … on a thin SR."""
    vms = [
        {
            "name": f"vm{number}",
            "power_state": "Running",
            "disks": [
                {"name": f"vm{number}-{disk}", "sr": "nfs", "size": (4 + 2 * disk) * MIB} for disk in range(disks)
            ],
        }
        for number in range(count)
    ]
    return default_world(vms=vms, **changes)


class VmSite:
    """Runs of one node; each is one of a process of its own as far as the pool and the ledgers can tell."""

    def __init__(self, sim: XenSim, directory: Path, engine: Engine | None = None, *, node: str = NODE) -> None:
        self.sim = sim
        self.node = node
        self.engine = engine or Engine.fresh(directory / "cache")
        self.runtime = system_runtime()
        self.ledgers = Ledgers(directory / "runs", self.runtime)
        self.heard = Heard()
        self.secrets = Credentials(str(BACKUP_USER["name"]), str(BACKUP_USER["password"]))
        self.connections = 2

    # runs

    def run(self, *patterns: str, full: bool = False, wait_s: float = 0.0) -> JobReport:
        return self._trio(partial(self.job, *patterns, full=full, wait_s=wait_s))

    def point(self, name: str) -> RestorePoint:
        """A run of one VM that works, and does not even warn."""
        self.sim.do("coalesce")
        report = self.run(name)
        assert report.outcome.failures == {}, next(iter(report.outcome.failures.values())).message
        (done,) = report.outcome.reports.values()
        assert list(done.warnings) == []
        self.check(name, done.point)
        return done.point

    def failure(self, name: str, **wishes: Any) -> XbfsError:
        """A run of one VM that fails."""
        report = self.run(name, **wishes)
        (failure,) = report.outcome.failures.values()
        return failure

    def run_with(self, point: str, event: Callable[[], object], *patterns: str, **fault: Any) -> JobReport:
        """A run in which ``event`` happens while the pool is at ``point``, a call or a route."""
        number = self.sim.fault(point, "hold", **fault)

        async def work() -> JobReport:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(trio.to_thread.run_sync, self._happen, number, event)
                return await self.job(*patterns)

        return self._trio(work)

    async def job(self, *patterns: str, full: bool = False, wait_s: float = 0.0) -> JobReport:
        self.engine.clock.advance(60)
        target = Target(self.engine.repository, self.engine.catalog, self.engine.index, self.node, "xbfs test")
        async with self.pool() as pool:
            access = PoolAccess(pool, HostBudget(), connections=self.connections)
            side = PoolSide(pool, access, PoolRecorder(pool), self.ledgers, self.runtime.random)
            return await back_up_vms(
                side, target, patterns, RunWishes(Wishes(full=full), coalesce_wait_s=wait_s), self.heard
            )

    def sweep(self, *, ask: bool = True, dry_run: bool = False) -> SweepReport:
        bases = known_bases(self.engine.catalog, self.engine.repository.id) if ask else None

        async def work() -> SweepReport:
            async with self.pool() as pool:
                return await sweep(pool, self.ledgers, node=self.node, dry_run=dry_run, bases=bases)

        return self._trio(work)

    def pool(self) -> Any:
        pins = {host.address: host.fingerprint for host in self.sim.hosts}
        master = Address(self.sim.master.address, self.sim.master.port)
        config = PoolConfig("sim", (master,), self.secrets.user, pins, f"xbfs/{self.node}")
        return open_pool(config, self.secrets, self.runtime, retry_delays_s=RETRY_DELAYS_S)

    # what is there

    def content(self, vdi: str) -> bytes:
        size = self.vdi(vdi)["virtual_size"]
        return b"".join(self.sim.read(vdi, at, min(4 * MIB, int(size) - at)) for at in range(0, int(size), 4 * MIB))

    def check(self, name: str, point: RestorePoint) -> None:
        """The point holds what the VM's disks hold now."""
        disks = self.sim.disks(name)
        assert len(disks) == len(point.disks)
        for vdi, disk in zip(disks, point.disks, strict=True):
            assert self.engine.read(disk) == self.content(vdi), f"disk {disk.number}"

    def vdi(self, uuid: str) -> dict[str, Any]:
        return next(vdi for vdi in self.sim.dump("VDI")["VDI"] if vdi["uuid"] == uuid)

    def bases(self, name: str) -> list[dict[str, Any]]:
        """The snapshot VDIs of a VM's disks that are this node's."""
        disks = set(self.sim.disks(name))
        found = [vdi for vdi in self.sim.dump("VDI")["VDI"] if vdi["snapshot_of"] in disks]
        return [vdi for vdi in found if self._made(vdi)]

    def leaks(self) -> list[str]:
        """What of this node is on the pool beside logs of changed blocks that a ledger keeps."""
        found = self.sim.dump("VM", "VDI", "task")
        leaked = [f"VM {vm['name_label']}" for vm in found["VM"] if vm["other_config"].get("xbfs:node") == self.node]
        reasons = [reason for vm in found["VM"] for reason in vm["blocked_operations"].values()]
        leaked += [reason for reason in reasons if f"of node {self.node} " in reason]
        names = [task["name_label"] for task in found["task"]]
        leaked += [name for name in names if name.startswith(f"xbfs/{self.node}:")]
        kept = set(self.kept())
        for vdi in found["VDI"]:
            if self._made(vdi):
                leaked += [f"VDI {vdi['type']}"] if vdi["type"] != "cbt_metadata" else []
                leaked += ["a base that nobody keeps"] if vdi["uuid"] not in kept else []
        return leaked

    def _made(self, vdi: dict[str, Any]) -> bool:
        marks = vdi["other_config"]
        return (marks.get("xbfs:node"), marks.get("xbfs:self")) == (self.node, vdi["uuid"])

    def kept(self) -> list[str]:
        """uuids of the VDIs that ledgers keep as bases."""
        states = trio.run(self.ledgers.runs)
        return [item.uuid for state in states for item in state.record.items.values() if item.keep]

    def _happen(self, fault: int, event: Callable[[], object]) -> None:
        try:
            self.sim.wait_fault(fault)
            event()
        finally:
            self.sim.clear(fault)

    def _trio(self, work: Callable[[], Awaitable[T]]) -> T:
        return trio.run(work, clock=MockClock(rate=SPEED))


def methods(point: RestorePoint) -> list[str]:
    """How each disk was read."""
    return [disk.method for disk in point.disks]
