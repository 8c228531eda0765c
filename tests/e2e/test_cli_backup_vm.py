"""xbfs backup vm in processes of its own, against a simulated pool: HTTPS, NBD over TLS, changed blocks, crashes."""

from __future__ import annotations

import signal
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest

from tests.support.cli import World
from tests.support.xensim import BACKUP_USER, MIB, XenSim, default_world, running_sim, signalled_at

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

BLOCK = 64 << 10


@dataclass
class Site:
    """A pool, a repository, and the command line between them."""

    sim: XenSim
    world: World

    def run(self, *words: str) -> tuple[int, dict[str, Any]]:
        done = self.world.run(*words, "--json", **self._places())
        assert "OpaqueRef" not in done.err + done.out.decode(), "no references are shown, sessions least of all"
        return done.code, done.json

    def backup(self, *words: str) -> dict[str, Any]:
        code, document = self.run("backup", "vm", *words, "--pool", "lab", "--wait", "0")
        assert code == 0, document
        return document

    def kill_at(self, method: str) -> None:
        """A backup that is killed when the pool has executed ``method`` and has not answered yet."""
        words = ("backup", "vm", "web", "--pool", "lab", "--wait", "0")
        signalled_at(self.sim, method, signal.SIGKILL, words, self.world.environment(**self._places()))

    def content(self, vdi: str) -> bytes:
        size = next(int(one["virtual_size"]) for one in self.sim.dump("VDI")["VDI"] if one["uuid"] == vdi)
        return b"".join(self.sim.read(vdi, at, min(MIB, size - at)) for at in range(0, size, MIB))

    def check(self, point: dict[str, Any], contents: list[bytes]) -> None:
        """The point's disks hold these bytes."""
        for disk, content in zip(point["disks"], contents, strict=True):
            target = self.world.directory / "out.raw"
            words = ("export", point["id"], "--disk", str(disk["number"]), "-o", target, "--overwrite", "-q")
            done = self.world.run(*words)
            assert done.code == 0, done.err
            assert target.read_bytes() == content, f"disk {disk['number']}"

    def leaks(self, bases: int) -> list[str]:
        """What is on the pool beside the VMs, and ``bases`` logs of changed blocks."""
        found = self.sim.dump()
        leaked = [f"VM {vm['name_label']}" for vm in found["VM"] if vm["is_a_snapshot"]]
        leaked += [f"blocked {vm['name_label']}" for vm in found["VM"] if vm["blocked_operations"]]
        snapshots = [vdi for vdi in found["VDI"] if vdi["is_a_snapshot"]]
        leaked += [f"VDI {vdi['uuid']} {vdi['type']}" for vdi in snapshots if vdi["type"] != "cbt_metadata"]
        logs = [vdi["uuid"] for vdi in snapshots if vdi["type"] == "cbt_metadata"]
        return leaked + ([f"logs {logs}"] if len(logs) != bases else [])

    def _places(self) -> dict[str, str]:
        return {
            "XBFS_CONFIG": str(self.world.directory / "config"),
            "XBFS_STATE": str(self.world.directory / "state"),
        }


@contextmanager
def site_of(directory: Path, world: dict[str, Any], **options: Any) -> Iterator[Site]:
    with running_sim(world, directory / "sim", **options) as sim:
        site = Site(sim, World(directory))
        (directory / "password").write_text(str(BACKUP_USER["password"]))
        code, told = site.run("init")
        assert code == 0, told
        words = ["pool", "add", "lab", sim.master.url, "--user", str(BACKUP_USER["name"])]
        words += ["--password-file", str(directory / "password")]
        code, told = site.run(*words, *(word for host in sim.hosts for word in ("--fingerprint", host.fingerprint)))
        assert code == 0, told
        yield site


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    with site_of(tmp_path, default_world()) as site:
        yield site


def methods(document: dict[str, Any]) -> list[str]:
    return [disk["method"] for vm in document["vms"] for disk in vm["point"]["disks"]]


def test_full_then_delta_over_nbd(site: Site) -> None:
    root, data = site.sim.disks("web")
    site.sim.guest_write(root, MIB, b"first" * 1000)
    first = site.backup("web")
    assert methods(first) == ["full", "full"]
    site.check(first["vms"][0]["point"], [site.content(root), site.content(data)])
    assert site.leaks(2) == []
    site.sim.guest_write(root, 3 * MIB + 5, b"second")
    second = site.backup("web")
    assert methods(second) == ["cbt", "cbt"]
    read = [disk["read"]["source_bytes"] for disk in second["vms"][0]["point"]["disks"]]
    assert read == [BLOCK, 0]
    site.check(second["vms"][0]["point"], [site.content(root), site.content(data)])
    assert site.leaks(2) == []
    transfers = [entry["method"] for entry in site.sim.journal()]
    assert "VDI.data_destroy" in " ".join(transfers)


def test_without_an_nbd_network_disks_come_over_https(tmp_path: Path) -> None:
    world = default_world(networks=[{"name": "lan", "bridge": "xenbr0"}, {"name": "lab", "bridge": "xenbr1"}])
    with site_of(tmp_path, world) as site:
        root, data = site.sim.disks("web")
        for number in range(2):
            site.sim.guest_write(root, number * MIB, b"data")
            document = site.backup("web")
            site.check(document["vms"][0]["point"], [site.content(root), site.content(data)])
            assert "over HTTPS" in document["vms"][0]["point"]["disks"][0]["reason"]
        assert methods(document) == ["cbt", "cbt"]
        assert site.leaks(2) == []


def test_all_vms_in_one_run_and_one_that_fails(site: Site) -> None:
    document = site.backup("--all")
    assert {vm["point"]["vm_name"] for vm in document["vms"]} == {"web", "db"}
    site.sim.fault("VM.snapshot", "fail", code="SR_BACKEND_FAILURE_44", params=["", "no space", ""], times=1)
    code, document = site.run("backup", "vm", "--all", "--pool", "lab", "--wait", "0")
    assert code == 46
    assert len(document["vms"]) == len(document["failed"]) == 1
    assert "no room" in document["failed"][0]["message"]
    assert site.leaks(3) == []


def test_a_pool_without_licence(tmp_path: Path) -> None:
    with site_of(tmp_path, default_world(pool={"restrictions": {"restrict_cbt": "true"}})) as site:
        for _ in range(2):
            document = site.backup("web")
            assert methods(document) == ["full", "full"]
        assert "LICENCE_RESTRICTION" in document["vms"][0]["point"]["disks"][0]["reason"]
        assert document["vms"][0]["point"]["run"]["stored_bytes"] == 0
        assert site.leaks(0) == []


def test_an_old_pool_that_can_leave_out_no_disk(tmp_path: Path) -> None:
    with site_of(tmp_path, default_world(), release="8.2") as site:
        site.backup("web", "--exclude", "1")
        document = site.backup("web", "--exclude", "1")
        assert methods(document) == ["cbt"]
        assert site.leaks(1) == []


def test_revert_means_new_disks(site: Site) -> None:
    site.backup("web")
    vm = site.sim.vm("web")["uuid"]
    snapshot = site.sim.call("VM.snapshot", f"uuid:VM:{vm}", "by hand", [])
    site.sim.guest_write(site.sim.disks("web")[0], 0, b"undone")
    site.sim.call("VM.revert", snapshot)
    site.sim.call("VM.destroy", snapshot)
    document = site.backup("web")
    assert methods(document) == ["full", "full"]
    assert "another VDI" in document["vms"][0]["point"]["disks"][0]["reason"]
    site.check(document["vms"][0]["point"], [site.content(vdi) for vdi in site.sim.disks("web")])
    assert methods(site.backup("web")) == ["cbt", "cbt"]


STEPS = [
    "VM.snapshot",
    "VM.destroy",
    *(
        pytest.param(step, marks=pytest.mark.slow)
        for step in (
            "VM.add_to_blocked_operations",
            "VM.get_VBDs",
            "VDI.add_to_other_config",
            "VDI.list_changed_blocks",
            "GET /export_metadata",
            "VDI.get_nbd_info",
            "VDI.data_destroy",
            "VDI.destroy",
            "VM.remove_from_blocked_operations",
        )
    ),
]
COMMITTED = {"VM.destroy", "VDI.data_destroy", "VDI.destroy", "VM.remove_from_blocked_operations"}
"""Steps that come after the restore point is durable."""


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """A site on which run after run is killed."""
    with site_of(tmp_path_factory.mktemp("killed"), default_world()) as site:
        site.kill_at("VDI.enable_cbt")
        assert site.run("points")[1]["points"] == []
        document = site.backup("web")
        assert methods(document) == ["full", "full"]
        assert site.leaks(2) == []
        yield site


@pytest.mark.parametrize("step", STEPS)
def test_killed_at_a_step_then_the_next_run(killed: Site, step: str) -> None:
    """Nothing leaks on the pool, no point is lost, and the chain goes on."""
    site = killed
    root, data = site.sim.disks("web")
    site.sim.guest_write(root, 2 * MIB, f"before {step}".encode())
    before = len(site.run("points")[1]["points"])
    site.kill_at(step)
    site.sim.guest_write(data, 0, f"after {step}".encode())
    document = site.backup("web")
    assert methods(document) == ["cbt", "cbt"]
    assert site.leaks(2) == []
    assert len(site.run("points")[1]["points"]) == before + 1 + (step in COMMITTED)
    site.check(document["vms"][0]["point"], [site.content(root), site.content(data)])
