"""Trouble of hosts, sessions and people while a VM is backed up, against a simulated pool: the stated handling each."""

from __future__ import annotations

from itertools import count
from typing import TYPE_CHECKING

import pytest

from tests.support.vm_site import VmSite, methods, world_of
from tests.support.xensim import MIB, XenSim, running_sim
from xbfs_engine.core.errors import LoginRefused, VmNotReady, XapiFailure

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

VMS = 24


@pytest.fixture(scope="module")
def sim(tmp_path_factory: pytest.TempPathFactory) -> Iterator[XenSim]:
    with running_sim(world_of(VMS, disks=1), tmp_path_factory.mktemp("sim")) as running:
        yield running


@pytest.fixture(scope="module")
def names() -> Iterator[int]:
    return count()


class Web:
    """A VM with a first point, and a write since."""

    def __init__(self, site: VmSite, name: str) -> None:
        self.site = site
        self.sim = site.sim
        self.name = name
        self.disks = self.sim.disks(name)
        self.write(b"first")
        assert methods(site.point(name)) == ["full"]
        self.write(b"since")

    def write(self, data: bytes) -> None:
        for number, vdi in enumerate(self.disks):
            self.sim.guest_write(vdi, number * MIB, data * 100)

    def is_fine(self) -> None:
        """Nothing is left on the pool, and the next run reads what changed."""
        assert self.site.leaks() == []
        self.write(b"later")
        assert methods(self.site.point(self.name)) == ["cbt"]
        assert self.site.leaks() == []
        assert len(self.site.bases(self.name)) == len(self.disks)

    def backed_up_while(self, point: str, event: Callable[[], object], **fault: int) -> list[str]:
        report = self.site.run_with(point, event, self.name, **fault)
        assert report.outcome.failures == {}
        (done,) = report.outcome.reports.values()
        self.site.check(self.name, done.point)
        assert list(done.warnings) == []
        return [disk.reason for disk in done.point.disks]


@pytest.fixture(scope="module")
def site(sim: XenSim, tmp_path_factory: pytest.TempPathFactory) -> VmSite:
    return VmSite(sim, tmp_path_factory.mktemp("site"))


@pytest.fixture
def web(sim: XenSim, site: VmSite, names: Iterator[int]) -> Iterator[Web]:
    yield Web(site, f"vm{next(names)}")
    sim.clear()
    sim.do("set_master", host="alpha")
    for host in ("alpha", "beta"):
        sim.do("offline", host=host, value=False)


@pytest.mark.parametrize("point", ["VM.snapshot", "VDI.list_changed_blocks", "VM.destroy", "VDI.data_destroy"])
def test_another_host_becomes_master_in_mid_run(web: Web, point: str) -> None:
    reasons = web.backed_up_while(point, lambda: web.sim.do("set_master", host="beta"))
    assert all(reason.startswith("changed blocks since") for reason in reasons)
    web.is_fine()


def test_a_master_that_goes_and_another_that_comes(web: Web) -> None:
    """The old one is off; what is known of the pool leads to the new one."""

    def fail_over() -> None:
        web.sim.do("set_master", host="beta")
        web.sim.do("offline", host="alpha")

    web.backed_up_while("VDI.list_changed_blocks", fail_over)
    web.sim.do("offline", host="alpha", value=False)
    web.sim.do("set_master", host="alpha")
    web.is_fine()


@pytest.mark.parametrize("point", ["VDI.list_changed_blocks", "VDI.get_nbd_info", "NBD.request", "VDI.data_destroy"])
def test_the_session_ends_in_mid_run(web: Web, point: str) -> None:
    """NBD connections that are open go on; calls and new connections get a new session."""
    reasons = web.backed_up_while(point, lambda: web.sim.do("expire_sessions"))
    assert all(reason.startswith("changed blocks since") for reason in reasons)
    web.is_fine()


def test_the_host_that_serves_a_disk_goes_down(web: Web) -> None:
    """Another host of the pool serves it on; when it was the master, that one is found as well."""
    gone: list[str] = []

    def power_off() -> None:
        found = web.sim.dump("VBD", "VM", "host")
        dom0s = {vm["uuid"]: vm["resident_on"] for vm in found["VM"] if vm["is_control_domain"]}
        (serving,) = {dom0s[vbd["VM"]] for vbd in found["VBD"] if vbd["VM"] in dom0s}
        gone.append(next(host["name_label"] for host in found["host"] if host["uuid"] == serving))
        web.sim.do("set_master", host="beta" if gone == ["alpha"] else "alpha")
        web.sim.do("offline", host=gone[0])

    reasons = web.backed_up_while("NBD.request", power_off)
    web.sim.do("offline", host=gone[0], value=False)
    web.sim.do("set_master", host="alpha")
    assert all(reason.startswith("changed blocks since") for reason in reasons)
    assert not any("HTTPS" in reason for reason in reasons)
    web.is_fine()


def test_no_host_serves_disks_any_more(web: Web) -> None:
    """NBD breaks off on all hosts: the same snapshot is read over HTTPS."""
    web.sim.fault("NBD.request", "drop", times=10_000)
    report = web.site.run(web.name)
    web.sim.clear()
    (done,) = report.outcome.reports.values()
    web.site.check(web.name, done.point)
    assert all("over HTTPS" in disk.reason for disk in done.point.disks)
    web.is_fine()


def test_a_disk_that_no_transport_can_read_fails_the_vm(web: Web) -> None:
    web.sim.fault("NBD.request", "error", times=10_000)
    web.sim.fault("export.body", "close", times=10_000, params=["0"])
    assert web.site.failure(web.name).message
    web.sim.clear()
    web.is_fine()


def test_a_role_that_was_taken_away(web: Web) -> None:
    web.sim.fault("VM.snapshot", "fail", code="RBAC_PERMISSION_DENIED", params=["async.vm.snapshot", "denied"])
    failure = web.site.failure(web.name)
    assert isinstance(failure, LoginRefused)
    assert "vm-power-admin" in failure.hint
    web.is_fine()


def test_somebody_cancels_the_task_of_the_snapshot(web: Web) -> None:
    def cancel() -> None:
        for task in web.sim.dump("task")["task"]:
            if task["status"] == "pending" and "VM.snapshot" in task["name_label"]:
                web.sim.call("task.cancel", f"uuid:task:{task['uuid']}")

    report = web.site.run_with("VM.snapshot", cancel, web.name)
    (failure,) = report.outcome.failures.values()
    assert isinstance(failure, XapiFailure)
    assert failure.code == "TASK_CANCELLED"
    web.is_fine()


def test_an_upgrade_begins_between_two_runs(web: Web) -> None:
    """Listing changed blocks is off as well; what is tracked is read in full."""
    for vdi in web.disks:
        web.sim.call("VDI.disable_cbt", f"uuid:VDI:{vdi}")
    web.sim.fault("VDI.enable_cbt", "fail", code="NOT_SUPPORTED_DURING_UPGRADE", times=100)
    failure = web.site.failure(web.name)
    assert isinstance(failure, VmNotReady)
    assert "upgrade" in failure.message
    web.sim.clear()
    assert methods(web.site.point(web.name)) == ["full"]
    web.is_fine()


@pytest.mark.parametrize("code", ["OTHER_OPERATION_IN_PROGRESS", "TOO_MANY_PENDING_TASKS"])
def test_a_busy_pool_is_waited_for(web: Web, code: str) -> None:
    for method in ("VM.snapshot", "VM.destroy", "VDI.data_destroy", "VDI.destroy"):
        web.sim.fault(method, "fail", code=code, times=2)
    assert methods(web.site.point(web.name)) == ["cbt"]
    web.is_fine()


def test_a_vbd_that_dom0_never_gives_back(web: Web) -> None:
    """As the NBD server leaves it when it crashes: it is unplugged from outside."""
    dom0 = next(vm["uuid"] for vm in web.sim.dump("VM")["VM"] if vm["is_control_domain"])

    def leak() -> None:
        (snapshot, *_) = [vdi for vdi in web.site.bases(web.name) if vdi["type"] == "user"]
        record = {
            "VM": web.sim.call("VM.get_by_uuid", dom0),
            "VDI": web.sim.call("VDI.get_by_uuid", snapshot["uuid"]),
            "userdevice": "autodetect",
            "bootable": False,
            "mode": "RO",
            "type": "Disk",
            "unpluggable": True,
            "empty": False,
            "other_config": {},
            "qos_algorithm_type": "",
            "qos_algorithm_params": {},
        }
        leaked.append(web.sim.call("VBD.create", record))
        web.sim.call("VBD.plug", leaked[0])

    leaked: list[str] = []
    web.backed_up_while("VM.destroy", leak)
    assert leaked
    web.is_fine()
