"""xbfs boot --pool, migrate and discard in processes of their own: simulated hosts mount the share of this machine.

In a network of our own, as hosts ask the NFS ports that a real one asks.
"""

from __future__ import annotations

import signal
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import pytest

from tests.support.boot_pool_site import boot_pool_site
from tests.support.engine import pattern
from tests.support.nfs_network import needs_ganesha, needs_libnfs
from tests.support.restore_lab import content
from tests.support.xensim import MIB

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.support.boot_pool_site import Site

pytestmark = [needs_ganesha, needs_libnfs]

BOOT = ("web@latest", "--pool", "lab", "--as", "live", "--name", "s")


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    with boot_pool_site() as made:
        yield made


@pytest.fixture(autouse=True)
def cleaned(site: Site) -> Iterator[None]:
    yield
    site.sim.clear()
    with suppress(StopIteration):
        site.run("boot", "discard", next(iter(site.sessions())), "--force")
    assert site.state() == site.before


def boot(site: Site, *words: str) -> dict[str, Any]:
    return site.good(site.world, "boot", *BOOT, *words)


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
    booted = boot(site, *words)
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
    booted = boot(site, "--isolated", "--sr-name", "mine")
    (listed,) = site.good(site.world, "boot", "list")["sessions"]
    assert listed["pool"] == "lab"
    assert "pool lab" in site.run("boot", "list").out.decode()
    (vif,) = (one for one in site.sim.dump("VIF")["VIF"] if one["VM"] == site.sim.vm("live")["uuid"])
    (network,) = (one for one in site.sim.dump("network")["network"] if one["uuid"] == vif["network"])
    assert network["name_label"].startswith("mine (isolated ")
    assert network["PIFs"] == []
    write_as_guest(site, booted)
    refused = site.run("boot", "discard", "s")
    assert refused.code == 103, refused.err
    assert "--force" in refused.err
    told = site.run("boot", "discard", "s", "--dry-run")
    assert "would delete its VM on pool lab" in told.out.decode()
    site.good(site.world, "boot", "discard", "s", "--force")
    assert site.state() == site.before
    again = boot(site, "--no-start")
    disks = {disk["number"]: content(site.sim, disk["vdi_uuid"]) for disk in again["pool"]["disks"]}
    assert disks == site.contents, "what was written is gone with its session"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("point", "running"), [("VDI.pool_migrate", True), ("VDI.copy", False), ("VBD.destroy", False), ("SR.forget", True)]
)
def test_a_killed_migration_is_gone_on_with(site: Site, point: str, running: bool) -> None:
    booted = boot(site, *(() if running else ("--no-start",)))
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
