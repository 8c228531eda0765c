"""xbfs restore in processes of its own, against a simulated pool: killed, cancelled, and onto another pool."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING, Any

import pytest

from tests.support.cli import Done, World
from tests.support.engine import pattern
from tests.support.restore_lab import content, state_of
from tests.support.xensim import BACKUP_USER, MIB, XenSim, default_world, running_sim, signalled_at

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


class Site:
    """A pool, a repository with a point of each of its VMs, and the command line between them."""

    def __init__(self, sim: XenSim, directory: Path) -> None:
        self.sim, self.world = sim, World(directory)
        (directory / "password").write_text(str(BACKUP_USER["password"]))
        self.good("init")
        self.add_pool("lab", sim)
        self.contents = {}
        for number, vdi in enumerate(sim.disks("web")):
            sim.guest_write(vdi, MIB, pattern(number, 2 * MIB))
            self.contents[number] = content(sim, vdi)
        self.good("backup", "vm", "web", "--pool", "lab")
        self.before = state_of(sim)

    def add_pool(self, name: str, sim: XenSim) -> None:
        words = ["pool", "add", name, sim.master.url, "--user", str(BACKUP_USER["name"])]
        words += ["--password-file", str(self.world.directory / "password")]
        self.good(*words, *(word for host in sim.hosts for word in ("--fingerprint", host.fingerprint)))

    def places(self) -> dict[str, str]:
        directory = self.world.directory
        return {"XBFS_CONFIG": str(directory / "config"), "XBFS_STATE": str(directory / "state")}

    def run(self, *words: str) -> Done:
        done = self.world.run(*words, **self.places())
        assert "OpaqueRef" not in done.err + done.out.decode(), "no references are shown, sessions least of all"
        assert str(BACKUP_USER["password"]) not in done.err + done.out.decode()
        return done

    def good(self, *words: str) -> dict[str, Any]:
        done = self.run(*words, "--json")
        assert done.code == 0, done.err
        return done.json

    def restore(self, *words: str) -> dict[str, Any]:
        return self.good("restore", "web@latest", "--pool", "lab", "--sr", "nfs", *words)

    def stopped_at(self, point: str, how: signal.Signals) -> int:
        """A restore that gets a signal when the pool has done ``point`` and not answered yet; its exit code."""
        words = ("restore", "web@latest", "--pool", "lab", "--sr", "nfs", "--as", "copy")
        return signalled_at(self.sim, point, how, words, self.world.environment(**self.places()))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    directory = tmp_path_factory.mktemp("restore")
    with running_sim(default_world(), directory / "sim") as sim:
        yield Site(sim, directory)


def remove(site: Site, document: dict[str, Any]) -> None:
    """Delete what was restored, and see that nothing else is left."""
    if "vm" in document:
        uuid = document["vm"]["uuid"]
        if document["vm"]["started"]:
            site.sim.call("VM.hard_shutdown", f"uuid:VM:{uuid}")
        site.sim.call("VM.destroy", f"uuid:VM:{uuid}")
    for disk in document["disks"]:
        site.sim.call("VDI.destroy", f"uuid:VDI:{disk['vdi_uuid']}")
    assert state_of(site.sim) == site.before


def test_a_vm_comes_back_and_runs(site: Site) -> None:
    document = site.restore("--as", "copy", "--network", "lan=lab", "--start")
    vm = site.sim.vm("copy")
    assert (document["vm"]["uuid"], document["vm"]["way"], vm["power_state"]) == (vm["uuid"], "archive", "Running")
    assert {disk["number"]: content(site.sim, disk["vdi_uuid"]) for disk in document["disks"]} == site.contents
    assert all(0 < disk["written_bytes"] < 3 * MIB for disk in document["disks"]), "sparse"
    remove(site, document)


def test_a_dry_run_changes_nothing_and_tells_everything(site: Site) -> None:
    document = site.restore("--dry-run")
    assert [disk["size_bytes"] for disk in document["disks"]] == [8 * MIB, 6 * MIB]
    assert document["vm"]["name"] == "web"
    done = site.run("restore", "web@latest", "--pool", "lab", "--sr", "nfs", "-n", "--disk", "1")
    assert done.code == 0
    assert "would make 1 VDI on SR nfs" in done.out.decode()
    assert state_of(site.sim) == site.before


def test_a_disk_is_attached(site: Site) -> None:
    document = site.restore("--disk", "1", "--attach", "db")
    (disk,) = document["disks"]
    assert content(site.sim, disk["vdi_uuid"]) == site.contents[1]
    assert site.sim.disks("db")[-1] == disk["vdi_uuid"]
    (vbd,) = (one for one in site.sim.dump("VBD")["VBD"] if one["VDI"] == disk["vdi_uuid"])
    site.sim.call("VBD.destroy", f"uuid:VBD:{vbd['uuid']}")
    remove(site, document)


def test_people_are_told_what_came_back(site: Site) -> None:
    done = site.run("restore", "web@latest", "--pool", "lab", "--sr", "nfs", "--as", "copy", "--disk", "0")
    assert done.code == 0, done.err
    text = done.out.decode()
    vm = site.sim.vm("copy")
    assert f"VM 'copy' {vm['uuid']} from restore point" in text
    assert "sent as vhd" in text
    assert "MB/s" in text
    assert "disk 1: it was not asked for" in text
    assert f"xe vm-start uuid={vm['uuid']}" in text
    (disk,) = site.sim.disks("copy")
    remove(site, {"vm": {"uuid": vm["uuid"], "started": False}, "disks": [{"vdi_uuid": disk}]})


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        (("--sr", "nowhere"), 89, "no SR 'nowhere'"),
        (("--sr", "nfs", "--network", "lan=moon"), 89, "no network 'moon'"),
        (("--sr", "nfs", "--network", "moon"), 2, "is not A=B"),
        (("--sr", "nfs", "--network", "lan=lab", "--network", "lan=lan"), 2, "twice"),
        (("--sr", "nfs", "--keep-identity"), 45, "holds a VM with the uuid"),
        (("--sr", "nfs", "--disk", "9"), 2, "has no disk 9"),
        (("--sr", "nfs", "--disk", "0", "--start"), 2, "--disk makes none"),
        (("--sr", "nfs", "--attach", "db"), 2, "--attach needs the disks"),
        (("--sr", "nfs", "--disk", "0", "--attach", "nobody"), 89, "no VM of the pool matches"),
    ],
)
def test_what_can_not_be_is_refused_with_a_hint(site: Site, words: tuple[str, ...], code: int, told: str) -> None:
    done = site.run("restore", "web@latest", "--pool", "lab", *words)
    assert done.code == code, done.err
    assert told in done.err
    assert "hint:" in done.err
    assert state_of(site.sim) == site.before


MIDDLES = [
    *("VDI.create", "VDI.add_to_other_config", "PUT /import_raw_vdi", "PUT /import_metadata", "VM.add_to_other_config"),
    *("VDI.set_other_config", "VM.set_other_config", "VM.set_blocked_operations"),
]


@pytest.mark.parametrize("point", MIDDLES)
def test_what_a_killed_restore_left_a_sweep_takes(site: Site, point: str) -> None:
    assert site.stopped_at(point, signal.SIGKILL) == -signal.SIGKILL
    done = site.run("pool", "sweep", "lab", "--json")
    assert done.code == 0, done.err
    assert state_of(site.sim) == site.before


def test_what_a_killed_restore_left_is_not_in_the_way_of_the_next(site: Site) -> None:
    site.stopped_at("PUT /import_metadata", signal.SIGKILL)
    done = site.run("restore", "web@latest", "--pool", "lab", "--sr", "nfs", "--disk", "0", "-q")
    assert done.code == 0, done.err
    assert "removed what a run that died had left: destroy VM" in done.out.decode()
    (vdi,) = (vdi for vdi in site.sim.dump("VDI")["VDI"] if vdi["name_label"].startswith("web disk 0 "))
    remove(site, {"disks": [{"vdi_uuid": vdi["uuid"]}]})


def test_a_restore_that_was_killed_at_its_end_is_complete(site: Site) -> None:
    site.stopped_at("VM.set_name_label", signal.SIGKILL)
    assert site.run("pool", "sweep", "lab", "--json").code == 0
    vm, disks = site.sim.vm("copy"), site.sim.disks("copy")
    assert {number: content(site.sim, vdi) for number, vdi in enumerate(disks)} == site.contents
    remove(site, {"vm": {"uuid": vm["uuid"], "started": False}, "disks": [{"vdi_uuid": vdi} for vdi in disks]})


@pytest.mark.parametrize("point", ["VDI.create", "PUT /import_raw_vdi", "PUT /import_metadata"])
def test_a_cancelled_restore_leaves_nothing(site: Site, point: str) -> None:
    assert site.stopped_at(point, signal.SIGINT) == 130
    assert state_of(site.sim) == site.before


def test_a_point_whose_pool_is_gone(site: Site, tmp_path: Path) -> None:
    world = default_world(vms=[], networks=[{"name": "dr", "bridge": "xenbr5"}])
    with running_sim(world, tmp_path / "sim") as sim:
        site.add_pool("dr", sim)
        words = ("restore", "web@latest", "--pool", "dr", "--sr", "lvm", "--keep-identity")
        refused = site.run(*words)
        assert refused.code == 89
        assert "'lan'" in refused.err
        document = site.good(*words, "--network", "lan=dr", "--start")
        assert document["vm"]["uuid"] == site.sim.vm("web")["uuid"]
        assert {disk["number"]: content(sim, disk["vdi_uuid"]) for disk in document["disks"]} == site.contents
