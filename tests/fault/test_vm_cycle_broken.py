"""Chains of changed blocks that break on a simulated pool, by the events that break them on a real one.

The point is right all the same and names the reason, what was read again is not stored again, the next run is a delta.
"""

from __future__ import annotations

from itertools import count
from typing import TYPE_CHECKING

import pytest

from tests.support.vm_site import VmSite, methods, world_of
from tests.support.xensim import MIB, XenSimError, running_sim

if TYPE_CHECKING:
    from collections.abc import Iterator

CHUNK = 64 << 10


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VmSite]:
    with running_sim(world_of(12, disks=1), tmp_path_factory.mktemp("sim")) as sim:
        yield VmSite(sim, tmp_path_factory.mktemp("site"))


@pytest.fixture(scope="module")
def numbers() -> Iterator[int]:
    return count()


class Web:
    """A VM of one disk with a first point, and a write since."""

    def __init__(self, site: VmSite, name: str) -> None:
        self.site = site
        self.sim = site.sim
        self.name = name
        self.sim.guest_write(self.disk, 0, b"first" * 50_000)
        site.point(name)
        self.sim.guest_write(self.disk, MIB, b"since")

    @property
    def sim_vm(self) -> str:
        return f"uuid:VM:{self.sim.vm(self.name)['uuid']}"

    @property
    def disk(self) -> str:
        return self.sim.disks(self.name)[0]

    @property
    def sim_disk(self) -> str:
        return f"uuid:VDI:{self.disk}"

    def falls_back(self, *reasons: str) -> None:
        point = self.site.point(self.name)
        (disk,) = point.disks
        assert disk.method == "full"
        assert [reason for reason in reasons if reason not in disk.reason] == [], disk.reason
        assert disk.statistics.new_bytes <= 2 * CHUNK, "what was read again is not stored again"
        assert self.site.leaks() == []
        self.sim.guest_write(self.disk, 2 * MIB, b"later")
        assert methods(self.site.point(self.name)) == ["cbt"]
        assert len(self.site.bases(self.name)) == 1
        assert self.site.leaks() == []


@pytest.fixture
def web(site: VmSite, numbers: Iterator[int]) -> Iterator[Web]:
    yield Web(site, f"vm{next(numbers)}")
    site.sim.clear()


def test_tracking_was_switched_off_and_on(web: Web) -> None:
    web.sim.call("VDI.disable_cbt", web.sim_disk)
    web.sim.call("VDI.enable_cbt", web.sim_disk)
    web.falls_back("SR_BACKEND_FAILURE_460")


def test_the_base_was_destroyed(web: Web) -> None:
    (base,) = web.site.bases(web.name)
    web.sim.call("VDI.destroy", f"uuid:VDI:{base['uuid']}")
    web.falls_back("UUID_INVALID")


def test_the_logs_contradict_each_other(web: Web) -> None:
    """Tracking is switched off, and begun anew by the next run, which is full once more."""
    web.sim.fault("VDI.list_changed_blocks", "fail", code="SR_BACKEND_FAILURE_459", params=["", "inconsistent", ""])
    point = web.site.point(web.name)
    assert "SR_BACKEND_FAILURE_459" in point.disks[0].reason
    assert web.site.bases(web.name) == [], "no log of the disk can be trusted"
    assert not web.site.vdi(web.disk)["cbt_enabled"]
    web.falls_back("left no snapshot to compare with")


def test_a_host_crashed_with_the_disk_attached(web: Web) -> None:
    host = next(h for h in web.sim.dump("host")["host"] if h["uuid"] == web.sim.vm(web.name)["resident_on"])
    running = [vm for vm in web.sim.dump("VM")["VM"] if vm["resident_on"] == host["uuid"]]
    web.sim.do("crash_host", host=host["name_label"])
    for vm in running:
        if not vm["is_control_domain"]:
            web.sim.call("VM.start", f"uuid:VM:{vm['uuid']}", False, False)
    assert not web.site.vdi(web.disk)["cbt_enabled"]
    web.falls_back("the pool reported VDI_CBT_METADATA_INCONSISTENT")


def test_the_log_could_not_follow_a_snapshot_of_somebody_else(web: Web) -> None:
    web.sim.fault("cbt.snapshot", "fail")
    snapshot = web.sim.call("VM.snapshot", web.sim_vm, "by hand", [])
    web.falls_back("the pool reported VDI_CBT_SNAPSHOT_FAILED")
    web.sim.call("VM.destroy", snapshot)


def test_the_log_could_not_follow_growth(web: Web) -> None:
    web.sim.call("VM.hard_shutdown", web.sim_vm)
    web.sim.fault("cbt.resize", "fail")
    web.sim.call("VDI.resize", web.sim_disk, 6 * MIB)
    web.sim.call("VM.start", web.sim_vm, False, False)
    web.falls_back("the pool reported VDI_CBT_RESIZE_FAILED")


def test_the_log_could_not_follow_our_own_snapshot(web: Web) -> None:
    web.sim.fault("cbt.snapshot", "fail")
    point = web.site.point(web.name)
    assert "VDI_CBT_SNAPSHOT_FAILED" in point.disks[0].reason
    assert web.site.bases(web.name) == [], "a snapshot without a log is the base of nothing"
    web.falls_back("left no snapshot to compare with")


def test_the_vm_was_reverted(web: Web) -> None:
    snapshot = web.sim.call("VM.snapshot", web.sim_vm, "by hand", [])
    old = web.disk
    web.sim.call("VM.revert", snapshot)
    assert web.disk != old
    web.falls_back(f"the disk is another VDI than in the last point ({old})")
    web.sim.call("VM.destroy", snapshot)


def test_the_disk_was_moved_to_another_sr(web: Web) -> None:
    """A tracked disk can not be moved; an administrator switches tracking off first."""
    sr = next(sr["uuid"] for sr in web.sim.dump("SR")["SR"] if sr["name_label"] == "lvm")
    with pytest.raises(XenSimError, match="VDI_CBT_ENABLED"):
        web.sim.call("VDI.pool_migrate", web.sim_disk, f"uuid:SR:{sr}", {})
    web.sim.call("VDI.disable_cbt", web.sim_disk)
    web.sim.call("VDI.pool_migrate", web.sim_disk, f"uuid:SR:{sr}", {})
    web.falls_back("another VDI")


def test_the_vm_can_not_be_moved_while_it_is_backed_up(web: Web) -> None:
    refused: list[str] = []

    def move() -> None:
        for method in ("VM.pool_migrate", "VM.migrate_send"):
            host = web.sim.call("host.get_all")[0]
            arguments = [host, {}] if method == "VM.pool_migrate" else [{}, True, {}, {}, {}]
            with pytest.raises(XenSimError, match="OPERATION_BLOCKED") as caught:
                web.sim.call(method, web.sim_vm, *arguments)
            refused.append(str(caught.value))

    report = web.site.run_with("VDI.list_changed_blocks", move, web.name)
    assert len(refused) == 2
    (done,) = report.outcome.reports.values()
    assert methods(done.point) == ["cbt"]


def test_the_licence_was_withdrawn(site: VmSite, web: Web) -> None:
    """Disks that are tracked stay tracked; one that is not any more can not be again."""
    pool = site.sim.dump("pool")["pool"][0]

    def licensed(*, cbt: bool) -> None:
        restrictions = pool["restrictions"] | {"restrict_cbt": "false" if cbt else "true"}
        site.sim.do("set", cls="pool", uuid=pool["uuid"], fields={"restrictions": restrictions})

    licensed(cbt=False)
    try:
        assert methods(site.point(web.name)) == ["cbt"]
        web.sim.call("VDI.disable_cbt", web.sim_disk)
        for _ in range(2):
            point = site.point(web.name)
            assert "LICENCE_RESTRICTION" in point.disks[0].reason
            assert point.disks[0].statistics.new_bytes == 0
            assert site.bases(web.name) == []
    finally:
        licensed(cbt=True)
    web.falls_back("left no snapshot to compare with")
