"""xbfs boot --pool, migrate and discard in processes of their own: simulated hosts mount the share of this machine.

In a network of our own, as hosts ask the NFS ports that a real one asks.
"""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.support.boot_world import BootWorld
from tests.support.engine import pattern
from tests.support.nfs_network import needs_ganesha, needs_libnfs, private_network
from tests.support.restore_lab import RESTLESS, content, state_of
from tests.support.xensim import MIB, XenSim, default_world, running_sim, signalled_at

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.support.cli import Done

pytestmark = [needs_ganesha, needs_libnfs]

BOOT = ("web@latest", "--pool", "lab", "--as", "live", "--name", "s")
LOOSE = RESTLESS | {"VDIs", "PBDs", "virtual_allocation", "physical_size"}


class Site:
    """A pool, a repository with a point of its VM web, and the command line between them."""

    def __init__(self, sim: XenSim, directory: Path) -> None:
        self.sim = sim
        bare = BootWorld(directory)
        (directory / "password").write_text(sim.root_password)
        os.environ["XBFS_CONFIG"] = str(directory / "config")
        self.world = BootWorld(directory, init=self.good(bare, "init"))
        words = ["pool", "add", "lab", sim.master.url, "--password-file", str(directory / "password")]
        self.good(self.world, *words, *(word for host in sim.hosts for word in ("--fingerprint", host.fingerprint)))
        self.contents = {}
        for number, vdi in enumerate(sim.disks("web")):
            sim.guest_write(vdi, MIB, pattern(number, 2 * MIB))
            self.contents[number] = content(sim, vdi)
        self.good(self.world, "backup", "vm", "web", "--pool", "lab")
        sim.do("coalesce")
        self.before = self.state()

    def good(self, world: BootWorld, *words: str) -> dict[str, Any]:
        done = world.run(*words, "--json", XBFS_CONFIG=str(world.directory / "config"))
        assert done.code == 0, done.err
        return done.json

    def run(self, *words: str) -> Done:
        done = self.world.run(*words, XBFS_CONFIG=str(self.world.directory / "config"))
        assert self.sim.root_password not in done.err + done.out.decode()
        assert "OpaqueRef" not in done.err + done.out.decode()
        return done

    def boot(self, *words: str) -> dict[str, Any]:
        return self.good(self.world, "boot", *BOOT, *words)

    def state(self) -> dict[str, dict[str, Any]]:
        """All that a session could leave behind or change."""
        found = state_of(self.sim) | {
            cls: {
                one["uuid"]: {key: value for key, value in one.items() if key not in LOOSE}
                for one in self.sim.dump(cls)[cls]
            }
            for cls in ("SR", "PBD")
        }
        found["task"] = {}
        return found

    def stopped_at(self, point: str, how: signal.Signals, *words: str) -> int:
        """A command that gets a signal when the pool has done ``point`` and not answered yet; its exit code."""
        environment = self.world.environment(XBFS_CONFIG=str(self.world.directory / "config"))
        return signalled_at(self.sim, point, how, ("boot", *words), environment)

    def sessions(self) -> list[str]:
        return [one["name"] for one in self.good(self.world, "boot", "list")["sessions"]]


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    directory = Path(tempfile.mkdtemp(prefix="xp-", dir="/dev/shm"))
    try:
        with private_network(), running_sim(default_world(), directory / "sim") as sim:
            site = Site(sim, directory)
            try:
                yield site
            finally:
                site.world.end()
    finally:
        shutil.rmtree(directory)


@pytest.fixture(autouse=True)
def cleaned(site: Site) -> Iterator[None]:
    yield
    site.sim.clear()
    with suppress(StopIteration):
        site.run("boot", "discard", next(iter(site.sessions())), "--force")
    assert site.state() == site.before


def write_as_guest(site: Site, booted: dict[str, Any]) -> dict[int, bytes]:
    """Over what the point has, and where it has nothing; what the disks hold now."""
    expected = {}
    for disk in booted["pool"]["disks"]:
        number, vdi = disk["number"], disk["vdi_uuid"]
        whole = bytearray(site.contents[number])
        for offset, data in ((MIB + 512, pattern(90 + number, 70_000)), (5 * MIB + 4096, pattern(80, 8192))):
            data = data[: len(data) // 512 * 512]
            site.sim.guest_write(vdi, offset, data)
            whole[offset : offset + len(data)] = data
        expected[number] = bytes(whole)
    return expected


def moved(site: Site, document: dict[str, Any]) -> dict[int, bytes]:
    return {disk["number"]: content(site.sim, disk["vdi_uuid"]) for disk in document["disks"]}


def remove(site: Site, document: dict[str, Any]) -> None:
    vm = site.sim.vm("live")
    assert vm["uuid"] == document["vm"]["uuid"]
    if vm["power_state"] == "Running":
        site.sim.call("VM.hard_shutdown", f"uuid:VM:{vm['uuid']}")
    site.sim.call("VM.destroy", f"uuid:VM:{vm['uuid']}")
    for disk in document["disks"]:
        site.sim.call("VDI.destroy", f"uuid:VDI:{disk['vdi_uuid']}")


@pytest.mark.parametrize("words", [(), ("--no-start",)])
def test_a_vm_boots_is_written_to_and_moves_away(site: Site, words: tuple[str, ...]) -> None:
    booted = site.boot(*words)
    vm = site.sim.vm("live")
    assert booted["pool"]["vm"]["uuid"] == vm["uuid"]
    assert vm["power_state"] == ("Halted" if words else "Running")
    assert {number: content(site.sim, vdi) for number, vdi in enumerate(site.sim.disks("live"))} == site.contents
    expected = write_as_guest(site, booted) if not words else site.contents
    document = site.good(site.world, "boot", "migrate", "s", "--to", "lvm")
    assert moved(site, document) == expected
    assert site.sim.vm("live")["power_state"] == vm["power_state"]
    assert site.sessions() == []
    remove(site, document)
    assert site.state() == site.before
    assert site.run("verify").code == 0


def test_a_discard_takes_all_and_the_point_is_as_it_was(site: Site) -> None:
    booted = site.boot("--isolated", "--sr-name", "mine")
    assert site.sim.vm("live")["VIFs"] == []
    write_as_guest(site, booted)
    refused = site.run("boot", "discard", "s")
    assert refused.code == 103, refused.err
    assert "--force" in refused.err
    told = site.run("boot", "discard", "s", "--dry-run")
    assert "would delete its VM on pool lab" in told.out.decode()
    site.good(site.world, "boot", "discard", "s", "--force")
    assert site.state() == site.before
    again = site.boot("--no-start")
    disks = {disk["number"]: content(site.sim, disk["vdi_uuid"]) for disk in again["pool"]["disks"]}
    assert disks == site.contents, "what was written is gone with its session"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("point", "running"), [("VDI.pool_migrate", True), ("VDI.copy", False), ("VBD.destroy", False), ("SR.forget", True)]
)
def test_a_killed_migration_is_gone_on_with(site: Site, point: str, running: bool) -> None:
    booted = site.boot(*(() if running else ("--no-start",)))
    expected = write_as_guest(site, booted) if running else site.contents
    assert site.stopped_at(point, signal.SIGKILL, "migrate", "s", "--to", "lvm") == -signal.SIGKILL
    document = site.good(site.world, "boot", "migrate", "s", "--to", "lvm")
    assert moved(site, document) == expected
    assert site.sessions() == []
    remove(site, document)
    assert site.state() == site.before


@pytest.mark.slow
@pytest.mark.parametrize(
    "call", ["SR.introduce", "PBD.create", "PBD.plug", "SR.scan", "VDI.set_name_label", "VM.set_name_label"]
)
def test_what_fails_leaves_nothing(site: Site, call: str) -> None:
    site.sim.fault(call, "fail_after", code="INTERNAL_ERROR", times=100)
    done = site.run("boot", *BOOT)
    assert done.code not in (0, 1, 3), (done.code, done.err)
    assert site.sessions() == []
    assert site.state() == site.before


@pytest.mark.slow
@pytest.mark.parametrize("call", ["SR.introduce", "PBD.plug", "PUT /import_metadata", "VM.start"])
def test_what_a_killed_boot_left_a_discard_takes(site: Site, call: str) -> None:
    assert site.stopped_at(call, signal.SIGKILL, *BOOT) == -signal.SIGKILL
    assert site.sessions() == ["s"]
    assert site.run("pool", "sweep", "lab", "--json").code == 0, "no run of ours is at work"
    site.good(site.world, "boot", "discard", "s", "--force")
    assert site.state() == site.before


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        (("--export", "nbd"), 2, "by NFS"),
        (("--network", "lan=moon"), 89, "no network 'moon'"),
        (("--host", "nobody"), 89, "no enabled host 'nobody'"),
        (("--disk", "9"), 2, "has no disk 9"),
        (("--server", "backup.example"), 2, "--server"),
    ],
)
def test_what_can_not_be_is_refused_with_a_hint(site: Site, words: tuple[str, ...], code: int, told: str) -> None:
    done = site.run("boot", "web@latest", "--pool", "lab", *words)
    assert done.code == code, done.err
    assert told in done.err
    assert "hint:" in done.err
    assert site.sessions() == []


def test_wishes_about_a_pool_need_one(site: Site) -> None:
    done = site.run("boot", "web@latest", "--isolated")
    assert done.code == 2
    assert "--pool" in done.err


@pytest.mark.slow
@pytest.mark.parametrize("call", ["PBD.plug", "VM.set_name_label"])
def test_a_cancelled_boot_leaves_nothing(site: Site, call: str) -> None:
    assert site.stopped_at(call, signal.SIGINT, *BOOT) == 130
    assert site.sessions() == []
    assert site.state() == site.before
