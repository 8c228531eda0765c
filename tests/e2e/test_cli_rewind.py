"""xbfs rewind in processes of its own, against a simulated pool: HTTPS, NBD over TLS, stops, kills."""

from __future__ import annotations

import signal
import subprocess
import time
from typing import TYPE_CHECKING, Any

import pytest

from tests.e2e.test_cli_backup_vm import Site, site_of
from tests.support.cli import COMMAND
from tests.support.xensim import MIB, default_world

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

BLOCK = 64 << 10


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    with site_of(tmp_path, default_world()) as site:
        yield site


def rewind(site: Site, vm: str, *words: str) -> tuple[int, dict[str, Any]]:
    return site.run("rewind", vm, "--pool", "lab", *words)


def point_of(document: dict[str, Any]) -> str:
    return str(document["vms"][0]["point"]["id"])


def settled(site: Site) -> dict[str, list[dict[str, Any]]]:
    """What is on the pool once it has done by itself what it does after a backup: let go of disks, merge VHDs."""
    site.sim.do("coalesce")
    for _ in range(200):
        found = site.sim.dump()
        if not any(vm["VBDs"] for vm in found["VM"] if vm["is_control_domain"]):
            return found
        time.sleep(0.05)
    raise AssertionError("dom0 holds disks for ever")


def test_back_and_forth(site: Site) -> None:
    root, data = site.sim.disks("web")
    site.sim.guest_write(root, MIB, b"first" * 1000)
    first = point_of(site.backup("web"))
    before = [site.content(root), site.content(data)]
    site.sim.guest_write(root, 3 * MIB + 5, b"second")
    site.sim.guest_write(data, 0, b"third" * 20000)
    present = [site.content(root), site.content(data)]
    code, document = rewind(site, "web", "--to", first)
    assert code == 45, document
    code, document = rewind(site, "web", "--to", first, "--stop", "--start")
    assert code == 0, document
    assert [site.content(root), site.content(data)] == before
    assert [disk["way"] for disk in document["disks"]] == ["maps", "maps"]
    assert [disk["differing_bytes"] for disk in document["disks"]] == [BLOCK, 2 * BLOCK]
    assert site.sim.vm("web")["power_state"] == "Running"
    assert site.leaks(2) == []
    after = site.backup("web")["vms"][0]["point"]
    assert [disk["method"] for disk in after["disks"]] == ["cbt", "cbt"]
    assert [disk["read"]["source_bytes"] for disk in after["disks"]] == [BLOCK, 2 * BLOCK]
    site.check(after, before)
    code, document = rewind(site, "web", "--to", document["safety_point"], "--stop", "--no-safety-point")
    assert code == 0, document
    assert [site.content(root), site.content(data)] == present


def test_a_dry_run_changes_nothing_on_the_pool(site: Site) -> None:
    (root,) = site.sim.disks("db")
    site.sim.guest_write(root, MIB, b"first" * 1000)
    first = point_of(site.backup("db"))
    site.sim.guest_write(root, 2 * MIB, b"second")
    state, content = settled(site), site.content(root)
    code, document = rewind(site, "db", "--to", first, "--dry-run")
    assert code == 0, document
    (disk,) = document["disks"]
    assert (disk["way"], disk["differing_bytes"], disk["read_bytes"]) == ("cbt", BLOCK, BLOCK)
    assert (settled(site), site.content(root)) == (state, content)


def test_without_nbd_and_with_a_full_compare(tmp_path: Path) -> None:
    world = default_world(networks=[{"name": "lan", "bridge": "xenbr0"}, {"name": "lab", "bridge": "xenbr1"}])
    with site_of(tmp_path, world) as site:
        (root,) = site.sim.disks("db")
        first = point_of(site.backup("db"))
        before = site.content(root)
        site.sim.guest_write(root, 2 * MIB, b"second")
        code, document = rewind(site, "db", "--to", first, "--no-safety-point", "--full-compare")
        assert code == 0, document
        assert site.content(root) == before
        assert (document["disks"][0]["way"], document["disks"][0]["differing_bytes"]) == ("full", BLOCK)


def test_killed_while_it_writes(site: Site) -> None:
    (root,) = site.sim.disks("db")
    site.sim.guest_write(root, 0, b"first" * 10000)
    first = point_of(site.backup("db"))
    before = site.content(root)
    site.sim.guest_write(root, 2 * MIB, b"second")
    fault = site.sim.fault("PUT /import_raw_vdi", "hold")
    command = [*COMMAND, "rewind", "db", "--pool", "lab", "--to", first]
    environment = site.world.environment(**site._places())
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            site.sim.wait_fault(fault)
        finally:
            process.send_signal(signal.SIGKILL)
    site.sim.clear(fault)
    blocked = site.sim.vm("db")["blocked_operations"]
    assert set(blocked) == {"start", "start_on", "snapshot", "pool_migrate", "migrate_send"}
    code, document = site.run("pool", "sweep", "lab")
    assert code == 0, document
    assert site.sim.vm("db")["blocked_operations"] == blocked
    assert "rewinding to restore point" in str(document)
    code, document = rewind(site, "db", "--to", first)
    assert code == 3, document
    assert "half-written" in str(document["warnings"])
    assert site.content(root) == before
    assert site.sim.vm("db")["blocked_operations"] == {}
    site.check(site.backup("db")["vms"][0]["point"], [before])
    assert site.leaks(1) == []


def test_stopped_while_it_writes_and_given_up(site: Site) -> None:
    (root,) = site.sim.disks("db")
    site.sim.guest_write(root, 0, b"first" * 10000)
    first = point_of(site.backup("db"))
    site.sim.guest_write(root, 2 * MIB, b"second")
    fault = site.sim.fault("PUT /import_raw_vdi", "hold")
    command = [*COMMAND, "rewind", "db", "--pool", "lab", "--to", first]
    environment = site.world.environment(**site._places())
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        site.sim.wait_fault(fault)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    site.sim.clear(fault)
    assert process.returncode == 130
    assert b"64.0 KiB of 4.0 MiB to write" in out
    assert b"half-written" in err
    assert b"nothing half-done" not in err
    code, document = rewind(site, "db", "--abandon")
    assert code == 0, document
    assert document["abandoned"]["point"] == first[:16]
    assert site.sim.vm("db")["blocked_operations"] == {}


def test_nothing_to_abandon(site: Site) -> None:
    code, document = rewind(site, "db", "--abandon")
    assert (code, document["abandoned"]) == (0, None)
    code, document = rewind(site, "db", "--abandon", "--start")
    assert code == 2
