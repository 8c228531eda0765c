"""What `pool check` finds, and what it does not complain about."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Any

import pytest

from tests.support.fake_xapi import GIB, FakeXapi
from tests.support.runtime import FixedClock, SeededRandom
from xbfs_engine.core.runtime import Runtime
from xbfs_engine.source.xapi.ledger import Kind, Ledgers
from xbfs_engine.source.xapi.preflight import Finding, Severity, check_pool

if TYPE_CHECKING:
    from pathlib import Path

PIN = ":".join(["AB"] * 32)


class World:
    """A pool that is fit, with a VM on an NFS and one on an LVM SR."""

    def __init__(self, directory: Path) -> None:
        self.xapi = FakeXapi()
        self.ledgers = Ledgers(directory, Runtime(FixedClock(), SeededRandom(1)))
        self.pins = {"10.0.0.1": PIN}
        self.xapi.db.create("Certificate", host=self.xapi.host, type="host", fingerprint_sha256=PIN)
        self.vm = self.xapi.vm("web")
        self.disk = self.xapi.vdi()
        self.xapi.vbd(self.vm, self.disk)
        self.xapi.vbd(self.vm, self.xapi.vdi(SR=self.xapi.lvm), 1)
        self.xapi.vbd(self.vm, self.xapi.vdi(SR=self.xapi.iso), 3, type="CD")

    async def check(self) -> list[Finding]:
        found = await check_pool(self.xapi, self.ledgers, node="node", pins=self.pins)
        assert [method for method in self.xapi.diary if method != "SR.scan"] == []
        return found

    async def warnings(self) -> list[tuple[str, str]]:
        warnings = [finding for finding in await self.check() if finding.severity is Severity.WARNING]
        assert all(finding.fix for finding in warnings)
        return [(finding.topic, finding.subject) for finding in warnings]

    def chain(self, disk: str, length: int, **fields: Any) -> None:
        """Put ``length`` VHDs below a disk."""
        parent = {"vhd-parent": self.xapi.uuid(self.xapi.vdi(managed=False))}
        for _ in range(length - 1):
            parent = {"vhd-parent": self.xapi.uuid(self.xapi.vdi(managed=False, sm_config=parent))}
        self.xapi.db.set(disk, sm_config=parent, **fields)


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


async def test_a_fit_pool_has_nothing_to_be_done(world: World) -> None:
    found = await world.check()
    assert {finding.severity for finding in found} == {Severity.OK}
    assert {finding.topic for finding in found} == {"role", "licence", "nbd", "certificate", "clock", "sr"}
    assert sorted(finding.subject for finding in found if finding.topic == "sr") == ["lvm", "nfs"]


async def test_role_that_does_not_suffice(world: World) -> None:
    world.xapi.faults["SR.scan"] = ["RBAC_PERMISSION_DENIED"]
    assert await world.warnings() == [("role", "lab")]


@pytest.mark.parametrize(("value", "severity"), [("true", Severity.WARNING), (None, Severity.NOTE)])
async def test_licence(world: World, value: str | None, severity: Severity) -> None:
    (pool,) = world.xapi.db.all("pool")
    world.xapi.db.set(pool, restrictions={} if value is None else {"restrict_cbt": value})
    assert [f.severity for f in await world.check() if f.topic == "licence"] == [severity]


@pytest.mark.parametrize("purposes", [[], ["insecure_nbd"], ["nbd", "insecure_nbd"]])
async def test_nbd(world: World, purposes: list[str]) -> None:
    world.xapi.db.set(world.xapi.network, purpose=[])
    for purpose in purposes:
        network = world.xapi.db.create("network", purpose=[purpose])
        world.xapi.db.create("PIF", host=world.xapi.host, network=network, currently_attached=True, IP="10.0.0.1")
    assert await world.warnings() == [("nbd", "lab")]


async def test_hosts_without_an_address_for_nbd_are_noted(world: World) -> None:
    world.xapi.db.create("host", name_label="host2", address="", enabled=True)
    assert [f.subject for f in await world.check() if f.severity is Severity.NOTE] == ["host2"]


async def test_certificates(world: World) -> None:
    world.pins["10.0.0.1"] = ":".join(["CD"] * 32)
    world.xapi.db.create("host", name_label="host2", address="10.0.0.2", enabled=True)
    assert await world.warnings() == [("certificate", "host1 (10.0.0.1)"), ("certificate", "host2 (10.0.0.2)")]


@pytest.mark.parametrize(("seconds", "warned"), [(59, False), (-59, False), (61, True), (-3600, True)])
async def test_clocks(world: World, seconds: int, warned: bool) -> None:
    world.xapi.time += timedelta(seconds=seconds)
    assert await world.warnings() == ([("clock", "host1")] if warned else [])


async def test_thick_srs_need_the_size_of_the_disks(world: World) -> None:
    world.xapi.db.set(world.xapi.lvm, physical_utilisation=991 * GIB)
    assert await world.warnings() == [("vm", "web")]
    world.xapi.db.set(world.xapi.lvm, other_config={"xbfs:check-room": "false"})
    assert await world.warnings() == []
    world.xapi.db.set(world.xapi.lvm, physical_utilisation=990 * GIB, other_config={})
    assert await world.warnings() == []


async def test_srs(world: World) -> None:
    db = world.xapi.db
    db.set(world.xapi.sr, physical_utilisation=960 * GIB, other_config={"gc": "false"})
    (pbd,) = db.refs(world.xapi.lvm, "PBDs")
    db.set(pbd, currently_attached=False)
    assert sorted(await world.warnings()) == [("chain", "nfs"), ("sr", "lvm"), ("sr", "nfs")]


async def test_srs_without_tracking_are_noted(world: World) -> None:
    world.xapi.db.create("SM", type="rawhba", features={"VDI_SNAPSHOT": 1})
    world.xapi.vbd(world.vm, world.xapi.vdi(SR=world.xapi.add_sr("rawhba")), 4)
    notes = [finding for finding in await world.check() if finding.severity is Severity.NOTE]
    assert [(note.topic, note.subject) for note in notes] == [("sr", "rawhba")]


@pytest.mark.parametrize(
    ("vhds", "warned", "told"),
    [
        (1, [], ""),
        (2, [], ""),
        (3, [], "disk 0: 1 VHD waits to be coalesced"),
        (4, [], "disk 0: 2 VHDs wait to be coalesced"),
        (24, [], ""),
        (25, [("chain", "web")], "a chain of 25 VHDs; from 28 on"),
        (28, [("vm", "web")], "its chain has 28 VHDs"),
    ],
)
async def test_chains(world: World, vhds: int, warned: list[tuple[str, str]], told: str) -> None:
    world.chain(world.disk, vhds - 1)
    assert await world.warnings() == warned
    assert any(told in finding.fact for finding in await world.check() if finding.subject == "web") or not told
    notes = [f for f in await world.check() if f.severity is Severity.NOTE and (f.topic, f.subject) == ("chain", "web")]
    assert bool(notes) == (vhds > 2)


async def test_vms_and_disks_that_can_not_be_backed_up(world: World) -> None:
    world.xapi.vbd(world.vm, world.xapi.vdi(sharable=True), 5)
    world.xapi.vm("diskless")
    world.xapi.vm("locked", blocked_operations={"snapshot": "never"})
    found = await world.check()
    notes = [finding.subject for finding in found if finding.severity is Severity.NOTE]
    assert notes == ["diskless", "locked", "web"]
    assert await world.warnings() == [("vm", "locked")]


async def test_disks_that_dom0_holds(world: World) -> None:
    held = world.xapi.vdi(is_a_snapshot=True)
    world.xapi.vbd(world.xapi.dom0, held, 7, currently_attached=True)
    assert await world.warnings() == [("dom0", "dom0")]


async def test_leftovers_of_ours(world: World) -> None:
    async with world.ledgers.begin("node") as ledger:
        left = world.xapi.vdi(is_a_snapshot=True)
        await ledger.intend(Kind.VDI, uuid=world.xapi.uuid(left))
    world.xapi.vbd(world.xapi.dom0, left, 7)
    other = world.xapi.vdi()
    async with world.ledgers.begin("other") as foreign:
        item = await foreign.intend(Kind.VDI, uuid=world.xapi.uuid(other))
        world.xapi.mark(other, foreign.marker(item, uuid=world.xapi.uuid(other)).to_other_config())
    assert await world.warnings() == [("leftover", "disk")]
    assert any("of node other" in finding.fact for finding in await world.check())
    assert world.xapi.db.exists(left)
