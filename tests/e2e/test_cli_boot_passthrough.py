"""boot --passthrough by the real command line: listed, refused, committed, exported, and thrown away while in use."""

from __future__ import annotations

import os
import signal
import subprocess
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest

from tests.support.boot_world import BootWorld, boot_world, wait_until
from xbfs_engine.core.errors import SessionBusy

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.geteuid() != 0, reason="the kernel takes files from root only"),
    pytest.mark.skipif(
        tuple(map(int, os.uname().release.split(".")[:2])) < (6, 9), reason="the kernel does not know it before 6.9"
    ),
]

PROGRAM = """
import os, sys
fd = os.open(sys.argv[1], os.O_RDWR)
for number, word in enumerate((b"one", b"two")):
    os.pwrite(fd, word, 4096 * number)
    print(flush=True)
    sys.stdin.readline()
"""
WRITTEN = b"written by a guest".ljust(4096, b"\0")


@pytest.fixture(scope="module")
def world() -> Iterator[BootWorld]:
    with boot_world() as world:
        yield world


@pytest.fixture(autouse=True)
def discarded(world: BootWorld) -> Iterator[None]:
    yield
    world.discard_all()


def begin(world: BootWorld, name: str, *words: str) -> Path:
    disk = world.boot(name, "--hydrate", "--passthrough", *words)
    wait_until(lambda: world.told(name)["hydrated"] == 1.0)
    return disk


def is_passed(world: BootWorld, name: str) -> bool:
    (place,) = world.sessions()[name]["places"]
    return bool(place["passthrough"])


@contextmanager
def running(*command: object) -> Iterator[Any]:
    with subprocess.Popen([*map(str, command)], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        try:
            yield process
        finally:
            process.kill()


def kill_server(world: BootWorld) -> None:
    """And wait for the next."""
    supervisor, before = world.supervisor(), world.server()
    os.kill(before, signal.SIGKILL)
    wait_until(lambda: set(world.processes()) - {supervisor, before} and before not in world.processes())


def test_a_commit_is_refused_until_the_disk_is_closed(world: BootWorld) -> None:
    disk = begin(world, "web-pass")
    assert not is_passed(world, "web-pass")
    fd = os.open(disk, os.O_RDWR)
    os.pwrite(fd, WRITTEN, 8192)
    assert is_passed(world, "web-pass")
    assert "in use, passed through" in world.good("boot", "list").out.decode()
    refused = world.run("boot", "commit", "web-pass")
    assert refused.code == SessionBusy.exit_code
    assert "shut the VM down first" in refused.err
    os.close(fd)
    record = world.good("boot", "commit", "web-pass", "--json").json
    assert not is_passed(world, "web-pass")
    wanted = bytearray(world.gen2.read_bytes())
    wanted[8192:12288] = WRITTEN
    image = world.directory / "committed.raw"
    world.good("export", record["point"]["id"], "-o", image)
    assert image.read_bytes() == wanted
    assert disk.read_bytes() == wanted


def test_a_server_that_dies_is_followed_once_the_program_has_ended(world: BootWorld) -> None:
    disk = begin(world, "web-dies")
    with running("python3", "-c", PROGRAM, disk) as holder:
        holder.stdout.readline()
        kill_server(world)
        holder.stdin.write(b"\n")
        holder.stdin.flush()
        holder.stdout.readline()
        wait_until(lambda: "still writes" in str(world.sessions()["web-dies"]["problem"]))
    wait_until(lambda: world.sessions()["web-dies"]["served"])
    with disk.open("rb") as file:
        found = file.read(8192)
    assert (found[:3], found[4096:4099]) == (b"one", b"two")


def test_a_session_is_thrown_away_by_force_while_the_kernel_has_its_disk(world: BootWorld) -> None:
    disk = begin(world, "web-gone")
    before = disk.read_bytes()
    fd = os.open(disk, os.O_RDWR)
    os.pwrite(fd, WRITTEN, 0)
    assert world.run("boot", "discard", "web-gone").code == SessionBusy.exit_code
    world.good("boot", "discard", "web-gone", "--force")
    assert not disk.exists()
    assert "web-gone" not in world.sessions()
    os.close(fd)
    again = begin(world, "web-gone")
    assert again.read_bytes() == before


def test_nbd_reads_and_writes_it_also_after_a_crash(world: BootWorld) -> None:
    words = ("boot", "web@latest", "--name", "net", "--export", "nbd", "--hydrate", "--passthrough", "--json")
    place = world.good(*words).json["session"]["places"][0]
    wait_until(lambda: world.told("net")["hydrated"] == 1.0)

    def qemu_io(*commands: str) -> bool:
        options = [word for command in commands for word in ("-c", command)]
        done = subprocess.run(["qemu-io", "-f", "raw", *options, place["local_uri"]], capture_output=True, check=False)
        return done.returncode == 0 and b"failed" not in done.stdout

    # nbdkit has the disk open while somebody is connected.
    assert qemu_io("write -P 0x57 8192 4096", "discard 65536 65536", "flush", "read -P 0x57 8192 4096")
    with running("qemu-io", "-f", "raw", place["local_uri"]):
        wait_until(lambda: is_passed(world, "net"))
        kill_server(world)
    wait_until(lambda: qemu_io("read -P 0x57 8192 4096", "read -P 0 65536 65536"))


@pytest.mark.parametrize("words", [["--passthrough"], ["--passthrough", "--hydrate", "--format", "vhd"]])
def test_it_is_for_raw_disks_that_are_copied(world: BootWorld, words: list[str]) -> None:
    refused = world.run("boot", "web@latest", *words)
    assert refused.code == 2
    assert "--hydrate" in refused.err
    assert world.names() == []
