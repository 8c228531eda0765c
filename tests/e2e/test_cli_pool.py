"""xbfs pool add, list, remove and trust in processes of their own, with a terminal and without."""

from __future__ import annotations

import json
import os
import pty
import select
import subprocess
import time
from typing import TYPE_CHECKING

import pytest

from tests.support.cli import COMMAND, TIMEOUT_S, World
from tests.support.xapi_fake import PASSWORD, SESSION, fake_hosts, login, refuse
from tests.support.xensim import BACKUP_USER, default_world, running_sim

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.support.xapi_fake import FakeHost


@pytest.fixture
def world(tmp_path: Path) -> World:
    (tmp_path / "password").write_text(PASSWORD + "\n")
    return World(tmp_path)


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[list[FakeHost]]:
    """A pool of two: the first is a member, the second the master, which knows both certificates."""
    with fake_hosts(tmp_path, 2) as (member, master):
        member.methods["session.login_with_password"] = refuse("HOST_IS_SLAVE", master.address.host)
        both = {"OpaqueRef:1": member, "OpaqueRef:2": master}
        records = {
            ref: {"name_label": f"xen{number}", "address": host.address.host}
            for number, (ref, host) in enumerate(both.items(), 1)
        }
        certificates = {
            f"{ref}c": {"type": "host", "host": ref, "fingerprint_sha256": host.fingerprint}
            for ref, host in both.items()
        }
        master.methods |= {
            "host.get_all_records": lambda _: records,
            "Certificate.get_all_records": lambda _: certificates,
        }
        yield [member, master]


def run(world: World, *words: str) -> tuple[int, dict[str, object], str]:
    done = world.run("pool", *words, "--json", XBFS_CONFIG=str(world.directory / "config"))
    assert PASSWORD not in done.err + done.out.decode()
    assert SESSION not in done.err + done.out.decode()
    return done.code, done.json, done.err


def add(world: World, *words: str) -> tuple[int, dict[str, object], str]:
    return run(world, "add", "prod", *words, "--password-file", str(world.directory / "password"))


def test_add_list_remove(world: World, hosts: list[FakeHost]) -> None:
    _, master = hosts
    code, document, err = add(world, f"https://{master.address}", "--fingerprint", master.fingerprint.lower())
    assert code == 0, err
    assert [(host["name"], host["fingerprint"]) for host in document["hosts"]] == [
        ("xen1", hosts[0].fingerprint),
        ("xen2", hosts[1].fingerprint),
    ]
    assert master.calls[0][1][:2] == ("root", PASSWORD)
    assert master.calls[-1][0] == "session.logout"
    code, document, _ = run(world, "list")
    (pool,) = document["pools"]
    assert pool["name"] == "prod"
    assert pool["addresses"] == [str(master.address), str(hosts[0].address)]
    assert pool["pins"] == {host.address.host: host.fingerprint for host in hosts}
    assert pool["password"] == f"file {world.directory / 'password'}"
    table = world.run("pool", "list", XBFS_CONFIG=str(world.directory / "config")).out.decode()
    assert str(master.address) in table.splitlines()[1]
    # A name is taken once; a dry run removes nothing.
    assert add(world, "https://127.0.0.1")[0] == 82
    assert run(world, "remove", "prod", "--dry-run")[0] == 0
    assert run(world, "remove", "prod")[0] == 0
    assert run(world, "remove", "prod")[0] == 81
    assert run(world, "list")[1]["pools"] == []


def test_a_certificate_nobody_confirmed_gets_no_password(world: World, hosts: list[FakeHost]) -> None:
    member, master = hosts
    code, document, err = add(world, f"https://{master.address}")
    assert code == 85
    assert master.fingerprint in err
    assert "openssl x509" in document["error"]["hint"]
    assert add(world, f"https://{master.address}", "--fingerprint", member.fingerprint)[0] == 85
    assert add(world, f"https://{master.address}", "--fingerprint", "AB:CD")[0] == 85
    assert not master.received
    assert not (world.directory / "config" / "pools.json").exists()


def test_the_way_to_the_master_is_confirmed_too(world: World, hosts: list[FakeHost]) -> None:
    member, master = hosts
    code, _, err = add(world, f"https://{member.address}", "--fingerprint", member.fingerprint)
    assert code == 85
    assert master.fingerprint in err
    assert not master.received
    both = ("--fingerprint", member.fingerprint, "--fingerprint", master.fingerprint)
    code, document, err = add(world, f"https://{member.address}", *both)
    assert code == 0, err
    assert len(document["hosts"]) == 2


def test_bad_input(world: World, hosts: list[FakeHost]) -> None:
    _, master = hosts
    known = (f"https://{master.address}", "--fingerprint", master.fingerprint)
    master.methods["session.login_with_password"] = refuse("SESSION_AUTHENTICATION_FAILED", "root", "no")
    code, document, _ = add(world, *known)
    assert (code, document["error"]["class"]) == (84, "LoginRefused")
    assert add(world, "http://xen1")[0] == 2
    assert add(world, "https://127.0.0.9:1")[0] == 83
    assert run(world, "add", "a/b", *known)[0] == 2
    assert run(world, "add", "prod", *known)[0] == 84  # no password, and nobody to ask
    assert run(world, "trust", "prod")[0] == 81
    assert add(world, *known, "--password-env", "X")[0] == 2


def test_trust_pins_a_renewed_certificate_after_it_was_confirmed(world: World, hosts: list[FakeHost]) -> None:
    _, master = hosts
    assert add(world, f"https://{master.address}", "--fingerprint", master.fingerprint)[0] == 0
    code, document, err = run(world, "trust", "prod")
    assert (code, document["changed"]) == (0, []), err
    file = world.directory / "config" / "pools.json"
    configured = json.loads(file.read_text())
    old = ":".join(["AB"] * 32)
    configured["pools"]["prod"]["pins"][master.address.host] = old
    file.write_text(json.dumps(configured))
    before = len(master.received)
    code, _, err = run(world, "trust", "prod")
    assert code == 85
    assert master.fingerprint in err
    assert len(master.received) == before
    code, document, err = run(world, "trust", "prod", "--fingerprint", master.fingerprint)
    assert (code, document["changed"]) == (0, [master.address.host]), err
    assert json.loads(file.read_text())["pools"]["prod"]["pins"][master.address.host] == master.fingerprint


def test_a_pool_that_contradicts_what_its_host_shows_is_told(world: World, hosts: list[FakeHost]) -> None:
    _, master = hosts
    other = ":".join(["CD"] * 32)
    lie = {"c": {"type": "host", "host": "OpaqueRef:2", "fingerprint_sha256": other}}
    master.methods |= {
        "Certificate.get_all_records": lambda _: lie,
        "host.get_server_certificate": refuse("HOST_OFFLINE", "OpaqueRef:1"),
    }
    code, document, _ = add(world, f"https://{master.address}", "--fingerprint", master.fingerprint)
    assert code == 3
    messages = [warning["message"] for warning in document["warnings"]]
    assert any(other in message and master.fingerprint in message for message in messages)
    assert any("xen1" in message for message in messages)


def test_a_simulated_pool_is_added_by_one_of_its_members(world: World) -> None:
    with running_sim(default_world(), world.directory / "sim") as sim:
        (world.directory / "password").write_text(BACKUP_USER["password"])
        pins = [word for host in sim.hosts for word in ("--fingerprint", host.fingerprint)]
        code, document, err = add(world, sim.hosts[1].url, "--user", BACKUP_USER["name"], *pins)
        assert code == 0, err
        assert document["hosts"] == [
            {"name": host.name, "address": host.address, "fingerprint": host.fingerprint} for host in sim.hosts
        ]
        # Also when only the other host is the master.
        sim.do("set_master", host=sim.hosts[1].name)
        assert run(world, "trust", "prod")[0] == 0
        assert not [task for task in sim.dump("task")["task"] if task["status"] == "pending"]


def test_at_a_terminal_certificate_and_password_are_asked_for(world: World, hosts: list[FakeHost]) -> None:
    _, master = hosts
    master.methods["session.login_with_password"] = login
    command = [*COMMAND, "pool", "add", "prod", f"https://{master.address}", "--user", "backup"]
    leader, follower = pty.openpty()
    environment = world.environment(XBFS_CONFIG=str(world.directory / "config"))
    process = subprocess.Popen(
        command, env=environment, stdin=follower, stdout=follower, stderr=follower, start_new_session=True
    )
    os.close(follower)
    try:
        shown = _until(leader, b"[yes/no]")
        assert master.fingerprint in shown
        assert not master.received
        os.write(leader, b"yes\n")
        _until(leader, b"password of backup")
        os.write(leader, PASSWORD.encode() + b"\n")
        rest = _until(leader, b"added pool prod")
        assert PASSWORD not in rest
        assert process.wait(TIMEOUT_S) == 0
    finally:
        process.kill()
        process.wait()
        os.close(leader)
    assert master.calls[0][1][:2] == ("backup", PASSWORD)
    assert (world.directory / "config" / "credentials").stat().st_mode & 0o777 == 0o600
    # The stored password is used, until others could read it.
    assert run(world, "trust", "prod")[0] == 0
    (world.directory / "config" / "credentials").chmod(0o644)
    assert run(world, "trust", "prod")[0] == 86


def _until(terminal: int, expected: bytes) -> str:
    """What the terminal shows until ``expected`` is among it."""
    shown, deadline = b"", time.monotonic() + 30
    while expected not in shown:
        ready, _, _ = select.select([terminal], [], [], max(deadline - time.monotonic(), 0))
        assert ready, shown
        shown += os.read(terminal, 4096)
    return shown.decode()
