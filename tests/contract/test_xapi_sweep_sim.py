"""Inventory, preflight, VM record and sweep against a simulated pool, and the verbs for them."""

from __future__ import annotations

import os
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from tests.support.cli import World as CliWorld
from tests.support.xensim import BACKUP_USER, XenSim, default_world, running_sim
from xbfs_engine.core.runtime import system_runtime
from xbfs_engine.source.nbd import HostBudget, open_nbd_disk
from xbfs_engine.source.xapi.config import Address, Credentials, PoolConfig
from xbfs_engine.source.xapi.fields import Fields
from xbfs_engine.source.xapi.http import export_metadata
from xbfs_engine.source.xapi.inventory import Nbd, take_inventory
from xbfs_engine.source.xapi.ledger import Kind, Ledgers, RunLedger
from xbfs_engine.source.xapi.markers import BLOCKED_OPERATIONS, block_reason, snapshot_name
from xbfs_engine.source.xapi.pools import PoolRegistry
from xbfs_engine.source.xapi.preflight import Severity, check_pool
from xbfs_engine.source.xapi.selection import disks_of, select_vms
from xbfs_engine.source.xapi.session import Pool, open_pool
from xbfs_engine.source.xapi.sweep import Deed, SweepReport, sweep
from xbfs_engine.source.xapi.vm_record import capture_vm, vm_record_of

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from collections.abc import Set as AbstractSet
    from pathlib import Path

NODE = os.uname().nodename
BACKUP = Credentials(BACKUP_USER["name"], BACKUP_USER["password"])
CLASSES = ("VM", "VDI", "VBD", "SR", "PBD", "task")


@pytest.fixture(scope="module")
def sim(tmp_path_factory: pytest.TempPathFactory) -> Iterator[XenSim]:
    with running_sim(default_world(), tmp_path_factory.mktemp("sim")) as running:
        yield running


@pytest.fixture
def ledgers(tmp_path: Path) -> Ledgers:
    return Ledgers.of_pool("sim", {"XBFS_STATE": str(tmp_path)}, system_runtime())


def config(sim: XenSim) -> PoolConfig:
    pins = {host.address: host.fingerprint for host in sim.hosts}
    return PoolConfig("sim", (Address(sim.master.address, sim.master.port),), "backup", pins, f"xbfs/{NODE}")


@asynccontextmanager
async def opened(sim: XenSim, secrets: Credentials = BACKUP) -> AsyncIterator[Pool]:
    user = replace(config(sim), user=secrets.user)
    async with open_pool(user, secrets, system_runtime(), retry_delays_s=(0.1, 0.5)) as pool:
        yield pool


def things(sim: XenSim) -> dict[str, set[str]]:
    """What is on the pool, by class; VHDs that only the SR itself needs come and go."""
    found = sim.dump(*CLASSES)
    return {cls: {item["uuid"] for item in found[cls] if item.get("managed", True)} for cls in CLASSES}


async def record(pool: Pool, cls: str, ref: object) -> Fields:
    found = await pool.call(f"{cls}.get_record", str(ref))
    assert isinstance(found, dict)
    return Fields(cls, str(ref), found)


class Leftovers:
    """What a run makes for VM "web", up to a point."""

    def __init__(self, pool: Pool, ledger: RunLedger) -> None:
        self.pool = pool
        self.ledger = ledger
        self.disks: list[Fields] = []

    async def make(self, vm_uuid: str, *, noted: bool, keep: str = "") -> None:
        """Block, enable CBT, snapshot; with ``noted`` also what is noted afterwards, and markers."""
        vm = str(await self.pool.call("VM.get_by_uuid", vm_uuid))
        await self.ledger.intend(Kind.BLOCK, vm_uuid=vm_uuid, uuid=vm_uuid)
        for operation in BLOCKED_OPERATIONS:
            reason = block_reason(self.ledger.run, NODE)
            await self.pool.call("VM.add_to_blocked_operations", vm, operation, reason)
        for vdi in await self._disks(vm):
            await self.pool.call("VDI.enable_cbt", vdi.ref)
        item = await self.ledger.intend(Kind.SNAPSHOT, vm_uuid=vm_uuid, name="web")
        name = snapshot_name(self.ledger.run, item.number, "web")
        snapshot = await self.pool.run_task("VM.snapshot", vm, name, [], timeout_s=30)
        self.disks = await self._disks(snapshot)
        if not noted:
            return
        uuid = (await record(self.pool, "VM", snapshot)).text("uuid")
        await self.ledger.made(item, uuid)
        await self._mark("VM", snapshot, self.ledger.marker(item, uuid=uuid).to_other_config())
        for number, vdi in enumerate(self.disks):
            item = await self.ledger.intend(Kind.VDI, vm_uuid=vm_uuid, uuid=vdi.text("uuid"))
            if keep:
                item = await self.ledger.confirm(await self.ledger.keep(item, f"{keep}/{number}"))
            await self._mark("VDI", vdi.ref, self.ledger.marker(item, uuid=vdi.text("uuid")).to_other_config())

    async def _disks(self, vm: str) -> list[Fields]:
        vbds = [await record(self.pool, "VBD", vbd) for vbd in (await record(self.pool, "VM", vm)).texts("VBDs")]
        return [await record(self.pool, "VDI", vbd.text("VDI")) for vbd in vbds if vbd.text("type") == "Disk"]

    async def _mark(self, cls: str, ref: str, pairs: dict[str, str]) -> None:
        for key, value in pairs.items():
            await self.pool.call(f"{cls}.add_to_other_config", ref, key, value)


async def no_bases(_: str, slots: AbstractSet[str]) -> dict[str, str]:
    """A repository whose points name none."""
    return dict.fromkeys(slots, "")


async def swept(pool: Pool, ledgers: Ledgers, **options: Any) -> SweepReport:
    return await sweep(pool, ledgers, node=NODE, **({"dry_run": False} | options))


@pytest.mark.parametrize("noted", [False, True])
async def test_what_a_dead_run_left_goes(sim: XenSim, ledgers: Ledgers, noted: bool) -> None:
    before = things(sim)
    async with opened(sim) as pool:
        async with ledgers.begin(NODE) as ledger:
            await Leftovers(pool, ledger).make(sim.vm("web")["uuid"], noted=noted)
        left = things(sim)
        assert len(left["VDI"]) == len(before["VDI"]) + 2
        told = await swept(pool, ledgers, dry_run=True)
        assert things(sim) == left
        report = await swept(pool, ledgers)
        assert report.done == told.done
        assert (await swept(pool, ledgers)).done == ()
    assert report.failed == ()
    assert things(sim) == before
    assert sim.vm("web")["blocked_operations"] == {}
    assert await ledgers.runs() == []


async def test_bases_lose_their_data_and_stay_though_dom0_held_them(sim: XenSim, ledgers: Ledgers) -> None:
    before = things(sim)
    async with opened(sim) as pool:
        async with ledgers.begin(NODE) as ledger:
            made = Leftovers(pool, ledger)
            await made.make(sim.vm("web")["uuid"], noted=True, keep="repo/web")
        kept = {disk.text("uuid") for disk in made.disks}
        await hold_in_dom0(sim, pool, made.disks[0])
        report = await swept(pool, ledgers)
        assert report.failed == ()
        assert {base.uuid for base in report.kept} == kept
        records = [found for found in sim.dump("VDI")["VDI"] if found["uuid"] in kept]
        assert [(found["type"], found["cbt_enabled"]) for found in records] == [("cbt_metadata", True)] * 2
        # The next run's bases take their place.
        async with ledgers.begin(NODE) as ledger:
            await Leftovers(pool, ledger).make(sim.vm("web")["uuid"], noted=True, keep="repo/web")
        report = await swept(pool, ledgers)
        assert not kept & {base.uuid for base in report.kept}
        assert len(things(sim)["VDI"] - before["VDI"]) == 2
        # The repository knows of none: all go.
        await swept(pool, ledgers, bases=no_bases)
    assert things(sim) == before


async def hold_in_dom0(sim: XenSim, pool: Pool, disk: Fields) -> None:
    """As the NBD server leaves it when it crashes."""
    dom0 = next(vm["uuid"] for vm in sim.dump("VM")["VM"] if vm["is_control_domain"])
    vbd = sim.call(
        "VBD.create",
        {
            "VM": await pool.call("VM.get_by_uuid", dom0),
            "VDI": disk.ref,
            "userdevice": "autodetect",
            "bootable": False,
            "mode": "RO",
            "type": "Disk",
            "unpluggable": True,
            "empty": False,
            "other_config": {},
            "qos_algorithm_type": "",
            "qos_algorithm_params": {},
        },
    )
    sim.call("VBD.plug", vbd)


async def test_foreign_snapshots_clones_and_copies_stay(sim: XenSim, ledgers: Ledgers) -> None:
    async with opened(sim) as pool:
        web = sim.vm("web")["uuid"]
        foreign = sim.call("VM.snapshot", f"uuid:VM:{web}", "by hand", [])
        async with ledgers.begin(NODE) as ledger:
            made = Leftovers(pool, ledger)
            await made.make(web, noted=True)
        clone = sim.call("VDI.clone", made.disks[0].ref, {})
        before = things(sim)
        await swept(pool, ledgers)
        gone = {cls: before[cls] - found for cls, found in things(sim).items()}
        assert gone["VDI"] == {disk.text("uuid") for disk in made.disks}
        assert len(gone["VM"]) == 1
        inventory = await take_inventory(pool)
        assert clone in inventory.vdis
        snapshot = inventory.vms[foreign]
        for disk in inventory.disks(snapshot):
            if disk.vdi and disk.type == "Disk":
                sim.call("VDI.destroy", disk.vdi)
        sim.call("VM.destroy", foreign)
        sim.call("VDI.destroy", clone)


async def test_failures_of_the_pool_are_told_and_mended_by_the_next_sweep(sim: XenSim, ledgers: Ledgers) -> None:
    before = things(sim)
    async with opened(sim) as pool:
        async with ledgers.begin(NODE) as ledger:
            await Leftovers(pool, ledger).make(sim.vm("web")["uuid"], noted=True)
        sim.fault("VDI.destroy", "fail", code="SR_BACKEND_FAILURE_181", params=["", "gone", ""])
        report = await swept(pool, ledgers)
        assert [(failed.step.deed, "SR_BACKEND_FAILURE_181" in failed.reason) for failed in report.failed] == [
            (Deed.DESTROY_VDI, True)
        ]
        sim.clear()
        assert (await swept(pool, ledgers)).failed == ()
    assert things(sim) == before


async def test_the_inventory_and_the_preflight_of_a_fit_pool(sim: XenSim, ledgers: Ledgers) -> None:
    async with opened(sim) as pool:
        inventory = await take_inventory(pool)
        (web,) = select_vms(inventory, ["tag:nightly"]).vms
        assert [(disk.vbd.position, disk.left_out) for disk in disks_of(inventory, web)] == [
            ("0", None),
            ("1", None),
            ("3", "a CD drive"),
        ]
        assert inventory.nbd is Nbd.TLS
        assert len(inventory.nbd_hosts) == 2
        assert {
            sr.name: (sr.thick, sr.tracks_changes) for sr in inventory.srs.values() if sr.name in {"nfs", "lvm"}
        } == {
            "nfs": (False, True),
            "lvm": (True, True),
        }
        findings = await check_pool(pool, ledgers, node=NODE, pins=config(sim).pins)
        assert [finding for finding in findings if finding.severity is Severity.WARNING] == []
        assert {finding.topic for finding in findings} >= {"role", "licence", "nbd", "certificate", "clock", "sr"}
    async with opened(sim, Credentials("viewer", "viewer-password")) as pool:
        findings = await check_pool(pool, ledgers, node=NODE, pins={})
        warned = {finding.topic for finding in findings if finding.severity is Severity.WARNING}
        assert warned == {"role", "certificate"}


async def test_a_vm_with_everything_is_recorded(sim: XenSim) -> None:
    async with opened(sim) as pool:
        vm = str(await pool.call("VM.get_by_uuid", sim.vm("db")["uuid"]))
        found = await capture_vm(pool, vm, await export_metadata(pool, vm))
    assert vm_record_of(found.to_fields()) == found
    assert found.vm["NVRAM"] == {"EFI-variables": "Tm90IHJlYWwgdmFyaWFibGVz"}
    assert [shape.network["name_label"] for shape in found.vifs] == ["lan", "lab"]
    assert len(found.vtpms) == 1
    assert found.notes == ()
    assert found.archive is not None


async def test_a_disk_in_use_by_an_nbd_client_is_waited_for(
    sim: XenSim, ledgers: Ledgers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The host's dom0 lets go of it when the client's connection is gone."""
    from xbfs_engine.ingest.vm.reading import nbd_targets

    monkeypatch.setattr("xbfs_engine.source.xapi.removal.IN_USE_PAUSES_S", (0.5,) * 10)
    before = things(sim)
    async with opened(sim) as pool:
        async with ledgers.begin(NODE) as ledger:
            made = Leftovers(pool, ledger)
            await made.make(sim.vm("web")["uuid"], noted=True)
            disk = made.disks[0]
            size = disk.integer("virtual_size")
            async with open_nbd_disk(
                lambda: nbd_targets(pool, disk.ref), HostBudget(), connections=1, size_bytes=size, extents=None
            ):
                held = len(sim.dump("VBD")["VBD"])
        assert held > len(before["VBD"])
        assert (await swept(pool, ledgers)).failed == ()
    assert things(sim) == before


def test_the_verbs(sim: XenSim, tmp_path: Path) -> None:
    password = tmp_path / "password"
    password.write_text(BACKUP.password)
    registry = PoolRegistry(tmp_path / "config", {})
    registry.add(replace(config(sim), password_file=str(password)), None)
    world = CliWorld(tmp_path)
    environment = {"XBFS_CONFIG": str(tmp_path / "config"), "XBFS_STATE": str(tmp_path / "state")}
    environment["XBFS_REPOSITORY"] = ""
    done = world.run("pool", "check", "sim", "--all", "--json", **environment)
    assert done.code == 0, done.err
    assert {finding["severity"] for finding in done.json["findings"]} <= {"ok", "note"}
    assert "fit for backups" in world.run("pool", "check", "sim", **environment).out.decode()
    done = world.run("pool", "sweep", "sim", "--dry-run", **environment)
    assert (done.code, done.out) == (0, b"0 leftovers found\n")
    environment["XBFS_REPOSITORY"] = str(tmp_path / "repository")
    done = world.run("pool", "sweep", "sim", **environment)
    assert (done.code, done.out) == (3, b"0 leftovers removed\n")
    assert "the repository is not asked which bases its points need" in done.err
    assert world.run("init", **environment).code == 0
    done = world.run("pool", "sweep", "sim", **environment)
    assert (done.code, done.out) == (0, b"0 leftovers removed\n")
    web = sim.vm("web")["uuid"]
    sim.call("VM.add_to_blocked_operations", f"uuid:VM:{web}", "snapshot", "no")
    try:
        done = world.run("pool", "check", "sim", "--json", **environment)
    finally:
        sim.call("VM.remove_from_blocked_operations", f"uuid:VM:{web}", "snapshot")
    assert done.code == 3
    assert "blocked" in done.json["warnings"][0]["message"]
