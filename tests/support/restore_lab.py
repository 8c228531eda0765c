"""Two simulated pools' worth of one: a VM is backed up by the real cycle, and restored onto a simulated pool."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from tests.support.engine import Engine
from tests.support.xensim import BACKUP_USER, MIB, XenSim
from xbfs_engine.core.runtime import system_runtime
from xbfs_engine.ingest.vm.cycle import Target as BackupTarget
from xbfs_engine.ingest.vm.cycle import Wishes
from xbfs_engine.ingest.vm.job import PoolSide, back_up_vms
from xbfs_engine.ingest.vm.reading import PoolAccess
from xbfs_engine.ingest.vm.record import PoolRecorder
from xbfs_engine.ingest.vm.run import RunWishes
from xbfs_engine.restore.vm.disks import Stored
from xbfs_engine.restore.vm.job import RestoredDisks, RestoredVm, restore_disks, restore_vm
from xbfs_engine.restore.vm.plan import VmWishes, plan_disks, plan_vm
from xbfs_engine.restore.vm.target import look_at
from xbfs_engine.source.nbd import HostBudget
from xbfs_engine.source.xapi.config import Address, Credentials, PoolConfig
from xbfs_engine.source.xapi.ledger import Ledgers
from xbfs_engine.source.xapi.session import Pool, open_pool
from xbfs_engine.source.xapi.sweep import SweepReport, sweep

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping
    from pathlib import Path

    from xbfs_engine.catalog.restore_point import RestorePoint
    from xbfs_engine.core.errors import XbfsError
    from xbfs_engine.ingest.statistics import Progress
    from xbfs_engine.restore.image import ExportProgress

NODE = "lab"
CLASSES = ("VM", "VDI", "VBD", "VIF", "VTPM", "network", "task")

RESTLESS = {"allowed_operations", "physical_utilisation", "sm_config", "VBDs", "VIFs", "parent", "children"}


class Quiet:
    """Listens to backups and restores."""

    def __init__(self) -> None:
        self.steps: list[str] = []
        self.written: dict[int, int] = {}

    def step(self, *words: str) -> None:
        self.steps.append(words[-1])

    def progress(self, which: Any, now: Progress | ExportProgress) -> None:
        written = getattr(now, "written_bytes", None)
        if written is not None:
            self.written[which] = written

    def failed(self, vm_name: str, error: XbfsError) -> None:
        raise error


class RestoreLab:
    """One repository, and the ledgers of one node for one pool."""

    def __init__(self, directory: Path) -> None:
        self.engine = Engine.fresh(directory / "cache")
        self.ledgers = Ledgers(directory / "runs", system_runtime())
        self.heard = Quiet()

    @asynccontextmanager
    async def pool(self, sim: XenSim) -> AsyncIterator[Pool]:
        pins = {host.address: host.fingerprint for host in sim.hosts}
        config = PoolConfig("sim", (Address(sim.master.address, sim.master.port),), "backup", pins, f"xbfs/{NODE}")
        secrets = Credentials(str(BACKUP_USER["name"]), str(BACKUP_USER["password"]))
        async with open_pool(config, secrets, system_runtime(), retry_delays_s=(0.05, 0.2)) as pool:
            yield pool

    async def back_up(self, sim: XenSim, name: str) -> RestorePoint:
        """A full point by the real cycle."""
        engine = self.engine
        async with self.pool(sim) as pool:
            access = PoolAccess(pool, HostBudget(), connections=2)
            side = PoolSide(pool, access, PoolRecorder(pool), self.ledgers, system_runtime().random)
            target = BackupTarget(engine.repository, engine.catalog, engine.index, NODE, "test")
            report = await back_up_vms(side, target, [name], RunWishes(Wishes(), (), 0.0), Quiet())
        (done,) = report.outcome.reports.values()
        return done.point

    async def restore(
        self,
        sim: XenSim,
        point: RestorePoint,
        *,
        sr: str = "nfs",
        name: str | None = None,
        disks: frozenset[int] = frozenset(),
        networks: Mapping[str, str] | None = None,
        keep_identity: bool = False,
        start: bool = False,
    ) -> RestoredVm:
        """A VM."""
        async with self.pool(sim) as pool:
            wishes = VmWishes(sr, name, disks, networks or {}, keep_identity)
            plan = plan_vm(point, await look_at(pool), wishes)
            async with self.ledgers.begin(NODE) as ledger:
                return await restore_vm(pool, ledger, self.stored(point), plan, self.heard, start=start)

    async def restore_disks(
        self, sim: XenSim, point: RestorePoint, *numbers: int, sr: str = "nfs", attach: str | None = None
    ) -> RestoredDisks:
        """VDIs."""
        async with self.pool(sim) as pool:
            plan = plan_disks(point, await look_at(pool), sr=sr, disks=frozenset(numbers), attach=attach)
            async with self.ledgers.begin(NODE) as ledger:
                return await restore_disks(pool, ledger, self.stored(point), plan, self.heard)

    async def sweep(self, sim: XenSim) -> SweepReport:
        async with self.pool(sim) as pool:
            return await sweep(pool, self.ledgers, node=NODE, dry_run=False)

    def stored(self, point: RestorePoint) -> Stored:
        return Stored(self.engine.repository, point, self.engine.index)

    async def noted(self) -> list[str]:
        """What ledgers say is on the pool, beside bases."""
        states = await self.ledgers.runs()
        return [item.kind.value for state in states for item in state.record.items.values() if not item.keep]


def state_of(sim: XenSim) -> dict[str, dict[str, Any]]:
    """All that a restore could leave behind or change, by uuid, without what the pool changes by itself."""
    found = sim.dump(*CLASSES)
    dom0 = {vm["uuid"] for vm in found["VM"] if vm["is_control_domain"]}
    found["VDI"] = [vdi for vdi in found["VDI"] if vdi["managed"]]
    found["VBD"] = [vbd for vbd in found["VBD"] if vbd["VM"] not in dom0]
    return {
        cls: {
            record["uuid"]: {key: value for key, value in record.items() if key not in RESTLESS} for record in records
        }
        for cls, records in found.items()
    }


def content(sim: XenSim, vdi: str) -> bytes:
    """All bytes of a VDI on the pool."""
    size = next(int(one["virtual_size"]) for one in sim.dump("VDI")["VDI"] if one["uuid"] == vdi)
    return b"".join(sim.read(vdi, at, min(MIB, size - at)) for at in range(0, size, MIB))


def parts(sim: XenSim, cls: str, vm: str) -> list[dict[str, Any]]:
    """A VM's VBDs, VIFs or VTPMs, by position."""
    key = "userdevice" if cls == "VBD" else "device" if cls == "VIF" else "uuid"
    return sorted((one for one in sim.dump(cls)[cls] if one["VM"] == vm), key=lambda one: str(one[key]))
