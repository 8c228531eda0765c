"""Rewinds against a simulated pool, in this process: real transfers, real changed-block logs, hosts that fail."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest

from tests.support.engine import Engine
from tests.support.rewind_lab import Told
from tests.support.runtime import SeededRandom
from tests.support.xensim import BACKUP_USER, MIB, XenSim, default_world, running_sim
from xbfs.cli.rewind import PoolDisks
from xbfs_engine.core.errors import IntegrityError, VmNotReady, XapiFailure
from xbfs_engine.core.runtime import Runtime, SystemClock, system_runtime
from xbfs_engine.ingest.vm import job
from xbfs_engine.ingest.vm.base import base_of, known_bases
from xbfs_engine.ingest.vm.cycle import Target
from xbfs_engine.ingest.vm.cycle import Wishes as BackupWishes
from xbfs_engine.ingest.vm.reading import PoolAccess
from xbfs_engine.ingest.vm.record import PoolRecorder
from xbfs_engine.ingest.vm.run import RunWishes
from xbfs_engine.restore.rewind.guard import half_written
from xbfs_engine.restore.rewind.report import RewindReport, Way
from xbfs_engine.restore.rewind.rewind import PointSide, PoolSide, Rewind, Wishes
from xbfs_engine.source.nbd import HostBudget
from xbfs_engine.source.xapi.config import Address, Credentials, PoolConfig
from xbfs_engine.source.xapi.ledger import Ledgers
from xbfs_engine.source.xapi.patience import Patience
from xbfs_engine.source.xapi.session import Pool, open_pool

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

    from xbfs_engine.catalog.restore_point import RestorePoint

BLOCK = 64 << 10
SIZE = 6 * MIB
NODE = "node"
DISKS = {"here": "nfs", "there": "far"}


def world() -> dict[str, Any]:
    far = {"name": "far", "type": "ext", "size": 512 * MIB, "hosts": ["beta"], "shared": False}
    vms = [
        {"name": name, "disks": [{"name": f"{name}-root", "sr": sr, "size": SIZE}], "vifs": []}
        for name, sr in DISKS.items()
    ]
    return default_world(srs=[*default_world()["srs"], far], vms=vms)


@pytest.fixture(scope="module")
def sim(tmp_path_factory: pytest.TempPathFactory) -> Iterator[XenSim]:
    with running_sim(world(), tmp_path_factory.mktemp("sim")) as running:
        yield running


class Site:
    """A pool that is logged in, a repository, and one of the VMs."""

    def __init__(self, sim: XenSim, pool: Pool, directory: Path, vm: str) -> None:
        self.sim = sim
        self.pool = pool
        self.name = vm
        (self.vdi,) = sim.disks(vm)
        self.engine = Engine.fresh(directory / "cache")
        self.ledgers = Ledgers(directory / "runs", Runtime(SystemClock(), SeededRandom(3)))
        self.told = Told()

    async def back_up(self) -> RestorePoint:
        access = PoolAccess(self.pool, HostBudget(), connections=2)
        side = job.PoolSide(self.pool, access, PoolRecorder(self.pool), self.ledgers, SeededRandom(4))
        engine = self.engine
        engine.clock.advance(60)
        target = Target(engine.repository, engine.catalog, engine.index, NODE, "xbfs test")
        listener = _Deaf()
        report = await job.back_up_vms(side, target, [self.name], RunWishes(BackupWishes(), (), 0.0), listener)
        assert report.outcome.failures == {}
        (done,) = report.outcome.reports.values()
        return done.point

    async def rewind(self, point: RestorePoint, *, safety: bool = False, **wishes: Any) -> RewindReport:
        disks = PoolDisks(self.pool)
        side = PoolSide(self.pool, disks, disks, self.ledgers, Patience(SeededRandom(5), limit_s=20), NODE)
        engine = self.engine
        bases = known_bases(engine.catalog, engine.repository.id)
        points = PointSide(engine.repository, engine.catalog, engine.index, base_of, bases)
        chosen = Wishes(self.back_up if safety else None, **wishes)
        return await Rewind(side, points, self.name, point, chosen).run(self.told)

    def content(self) -> bytes:
        return self.sim.read(self.vdi, 0, SIZE)

    def blocked(self) -> dict[str, str]:
        return dict(self.sim.vm(self.name)["blocked_operations"])


class _Deaf:
    def step(self, vm_name: str, what: str) -> None:
        pass

    def progress(self, vm_name: str, now: object) -> None:
        pass

    def failed(self, vm_name: str, error: object) -> None:
        pass


@asynccontextmanager
async def site_at(sim: XenSim, directory: Path, vm: str = "here") -> AsyncIterator[Site]:
    address = Address(sim.master.address, sim.master.port)
    pins = {host.address: host.fingerprint for host in sim.hosts}
    config = PoolConfig("sim", (address,), "backup", pins, "xbfs/node")
    secrets = Credentials(BACKUP_USER["name"], BACKUP_USER["password"])
    async with open_pool(config, secrets, system_runtime(), retry_delays_s=(0.1, 0.5)) as pool:
        yield Site(sim, pool, directory, vm)
    sim.clear()


@pytest.mark.parametrize("vm", DISKS)
@pytest.mark.parametrize("safety", [False, True])
async def test_disks_go_back_wherever_they_are(sim: XenSim, tmp_path: Path, vm: str, *, safety: bool) -> None:
    async with site_at(sim, tmp_path, vm) as site:
        sim.guest_write(site.vdi, MIB, b"first" * 50000)
        first, before = await site.back_up(), site.content()
        sim.guest_write(site.vdi, 3 * MIB + 7, b"second" * 20000)
        sim.guest_write(site.vdi, MIB, bytes(BLOCK))
        report = await site.rewind(first, safety=safety)
        assert site.content() == before
        (disk,) = report.disks
        assert disk.differing_bytes == 3 * BLOCK
        assert (disk.way, disk.read_bytes) == ((Way.MAPS, 0) if safety else (Way.CHANGED_BLOCKS, 3 * BLOCK))
        assert site.blocked() == {}
        after = await site.back_up()
        assert after.disks[0].method == "cbt"
        assert site.engine.read(after.disks[0]) == before
        assert [call["method"] for call in sim.journal() if "VDI.disable_cbt" in call["method"]] == []


async def test_an_error_late_in_the_body_is_tried_again(sim: XenSim, tmp_path: Path) -> None:
    async with site_at(sim, tmp_path) as site:
        sim.guest_write(site.vdi, 0, b"first" * 200000)
        first, before = await site.back_up(), site.content()
        sim.guest_write(site.vdi, 0, b"second" * 100000)
        sim.fault("import.body", "fail_late", params=[str(2 * BLOCK)], times=1)
        await site.rewind(first)
        assert site.content() == before
        assert site.blocked() == {}


async def test_a_host_that_never_writes_it_leaves_the_vm_marked(sim: XenSim, tmp_path: Path) -> None:
    async with site_at(sim, tmp_path) as site:
        sim.guest_write(site.vdi, 0, b"first" * 200000)
        first, before = await site.back_up(), site.content()
        sim.guest_write(site.vdi, 0, b"second" * 100000)
        sim.fault("import.body", "fail_late", params=[str(2 * BLOCK)], times=10)
        with pytest.raises(XapiFailure, match="VDI_IO_ERROR"):
            await site.rewind(first, safety=True)
        left = half_written(site.blocked())
        assert left is not None
        assert left.point == first.id[:16]
        vm = f"uuid:VM:{sim.vm(site.name)['uuid']}"
        with pytest.raises(Exception, match="OPERATION_BLOCKED"):
            sim.call("VM.start", vm, False, False)
        sim.clear()
        await site.rewind(first, safety=True)
        assert site.content() == before
        assert site.blocked() == {}


async def test_a_disk_that_is_busy_is_waited_for(sim: XenSim, tmp_path: Path) -> None:
    async with site_at(sim, tmp_path) as site:
        sim.guest_write(site.vdi, 0, b"first" * 20000)
        first, before = await site.back_up(), site.content()
        sim.guest_write(site.vdi, 0, b"second")
        sim.fault("PUT /import_raw_vdi", "fail", code="VDI_IN_USE", params=["OpaqueRef:1", "import"], times=2)
        await site.rewind(first)
        assert site.content() == before


async def test_a_host_that_refuses_gets_a_new_vdi(sim: XenSim, tmp_path: Path) -> None:
    async with site_at(sim, tmp_path) as site:
        sim.guest_write(site.vdi, 0, b"first" * 20000)
        first, before = await site.back_up(), site.content()
        sim.guest_write(site.vdi, 2 * MIB, b"second")
        present = site.content()
        sim.fault("PUT /import_raw_vdi", "fail", code="VDI_READONLY", params=["OpaqueRef:1"], times=1)
        (disk,) = (await site.rewind(first)).disks
        old, (new,) = site.vdi, sim.disks(site.name)
        assert disk.replaced_by == new
        assert sim.read(new, 0, SIZE) == before
        assert sim.read(old, 0, SIZE) == present
        record = next(vdi for vdi in sim.dump("VDI")["VDI"] if vdi["uuid"] == new)
        assert not any(key.startswith("xbfs:") for key in record["other_config"])
        # And the machine goes on with it.
        site.vdi = new
        after = await site.back_up()
        assert site.engine.read(after.disks[0]) == before
        await site.rewind(after)
        assert site.blocked() == {}


async def test_what_a_host_lost_is_found_by_reading_back(sim: XenSim, tmp_path: Path) -> None:
    async with site_at(sim, tmp_path) as site:
        sim.guest_write(site.vdi, 0, b"first" * 20000)
        first = await site.back_up()
        sim.guest_write(site.vdi, 0, b"second")

        def spoil(what: str) -> None:
            if what.startswith("verifying"):
                sim.guest_write(site.vdi, 100, b"lost")

        site.told.step = spoil  # type: ignore[method-assign]
        with pytest.raises(IntegrityError, match=r"disk 0 .* at byte 0 "):
            await site.rewind(first)
        assert half_written(site.blocked()) is not None
        site.told = Told()
        await site.rewind(first)
        assert site.blocked() == {}


async def test_a_running_vm_is_refused_or_stopped_and_started(sim: XenSim, tmp_path: Path) -> None:
    async with site_at(sim, tmp_path) as site:
        vm = f"uuid:VM:{sim.vm(site.name)['uuid']}"
        first, before = await site.back_up(), site.content()
        sim.call("VM.start", vm, False, False)
        sim.guest_write(site.vdi, MIB, b"while it runs")
        with pytest.raises(VmNotReady, match="runs"):
            await site.rewind(first)
        report = await site.rewind(first, dry_run=True)
        assert not report.disks[0].exact
        report = await site.rewind(first, stop=True, start=True)
        assert report.started
        assert sim.vm(site.name)["power_state"] == "Running"
        assert report.disks[0].way is Way.CHANGED_BLOCKS
        assert site.content() == before
        sim.call("VM.clean_shutdown", vm)
