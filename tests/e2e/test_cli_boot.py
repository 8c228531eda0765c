"""boot: sessions begun, written to, served over every crash, listed and discarded, by the real command line."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import parse_qs, urlsplit

import pytest

from tests.support.boot_world import BootWorld, boot_world, wait_until
from xbfs.fuse.mountpoint import mounts
from xbfs.instant.server import IDLE_S

if TYPE_CHECKING:
    from collections.abc import Iterator

WRITTEN = b"written by a guest".ljust(4096, b"\0")


@pytest.fixture(scope="module")
def world() -> Iterator[BootWorld]:
    with boot_world() as world:
        yield world


@pytest.fixture(autouse=True)
def discarded(world: BootWorld) -> Iterator[None]:
    yield
    world.discard_all()


def write(disk: Path, offset: int, data: bytes = WRITTEN, *, flush: bool = True) -> None:
    """As a guest does, which is told of it when it is safe unless it does not ask."""
    fd = os.open(disk, os.O_RDWR)
    try:
        assert os.pwrite(fd, data, offset) == len(data)
        if flush:
            os.fsync(fd)
    finally:
        os.close(fd)


def read(disk: Path, offset: int, size: int) -> bytes | None:
    """None while nobody serves it."""
    try:
        with disk.open("rb") as file:
            file.seek(offset)
            return file.read(size)
    except OSError:
        return None


def has_socket(pid: int) -> bool:
    found = []
    for place in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(OSError):
            found.append(str(place.readlink()))
    return any(target.startswith("socket:") for target in found)


def test_a_session_shows_the_point_takes_writes_and_is_discarded(world: BootWorld) -> None:
    disk = world.boot("one")
    assert disk.read_bytes() == world.gen2.read_bytes()
    write(disk, 8192)
    listed = world.sessions()["one"]
    assert (listed["served"], listed["dirty_bytes"], listed["problem"]) == (True, 4096, None)
    assert listed["pool"] is None
    assert b"one" in world.good("boot", "list").out
    told = world.good("boot", "discard", "one", "--dry-run")
    assert b"4.0 KiB" in told.out
    assert disk.exists()
    world.good("boot", "discard", "one")
    wait_until(lambda: not disk.exists())  # the kernel is told a moment later
    assert world.names() == []
    assert world.run("boot", "discard", "one").code == 101


def test_sessions_of_one_point_do_not_see_each_other(world: BootWorld) -> None:
    first, second = world.boot("first"), world.boot("second")
    write(first, 0)
    assert read(second, 0, 4096) == world.gen2.read_bytes()[:4096]
    assert world.run("boot", "web@latest", "--name", "first").code == 102
    assert read(first, 0, 4096) == WRITTEN


@pytest.mark.parametrize("victim", ["server", "supervisor", "both"])
def test_what_was_acknowledged_survives_kill_9(world: BootWorld, victim: str) -> None:
    disk = world.boot("k")
    write(disk, 4096)
    write(disk, 16384, flush=False)
    server, supervisor = world.server(), world.supervisor()
    if victim != "server":
        os.kill(supervisor, signal.SIGKILL)
    if victim != "supervisor":
        os.kill(server, signal.SIGKILL)
    if victim == "server":
        wait_until(lambda: read(disk, 4096, 4096) == WRITTEN, 10)
        assert world.server() != server
    else:
        # As after a restart of the machine, but that a stale mount may be left: the next command serves all again.
        wait_until(lambda: not world.processes())
        if victim == "both":
            shutil.rmtree(world.directory / "xbfs")  # sockets lie in memory
        assert not world.sessions()["k"]["served"]
        world.boot("other")
    assert read(disk, 4096, 4096) == read(disk, 16384, 4096) == WRITTEN
    assert world.told("k")["dirty_bytes"] == 8192


def test_a_disk_in_use_is_not_thrown_away(world: BootWorld) -> None:
    disk = world.boot("busy")
    with disk.open("rb"):
        done = world.run("boot", "discard", "busy")
        assert done.code == 103, done.err
        assert world.told("busy")["busy"]
    world.good("boot", "discard", "busy")


@pytest.mark.slow
def test_in_the_foreground_it_ends_when_told_and_everything_is_flushed(world: BootWorld) -> None:
    disk = world.boot("fore")
    world.end()
    with world.started("boot", "serve") as process:
        wait_until(lambda: read(disk, 0, 1) is not None)
        write(disk, 0)
        assert world.run("boot", "serve").code == 103
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
    assert not disk.exists()
    world.boot("again")
    assert read(disk, 0, 4096) == WRITTEN


def test_a_server_in_the_background_ends_with_the_last_session(world: BootWorld) -> None:
    world.boot("first")
    world.boot("last")
    world.ask("discard", name="first")
    server = world.server()
    world.ask("discard", name="last")
    wait_until(lambda: not world.processes(), 10)
    assert str(world.state / "live") not in mounts()
    disk = world.boot("next")
    assert world.server() != server
    assert read(disk, 0, 4096) == world.gen2.read_bytes()[:4096]


@pytest.mark.slow
def test_a_server_in_the_foreground_stays_without_sessions(world: BootWorld) -> None:
    world.end()
    with world.started("boot", "serve") as process:
        wait_until(lambda: str(world.state / "live") in mounts())
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(IDLE_S + 2)
        assert read(world.boot("late"), 0, 4096) == world.gen2.read_bytes()[:4096]
        assert world.supervisor() == process.pid


def test_a_session_that_is_begun_just_when_the_server_ends_is_served_by_the_next(world: BootWorld) -> None:
    world.boot("before")
    ending = [world.server(), world.supervisor()]
    for pid in ending:
        os.kill(pid, signal.SIGSTOP)
    with world.started("boot", "web@latest", "--name", "just") as process:
        # It has made the session, found the server, and waits for what that says.
        wait_until(lambda: (world.state / "sessions/just/session.json").exists() and has_socket(process.pid))
        for pid in ending:
            os.kill(pid, signal.SIGKILL)
        assert process.wait(60) == 0
    assert read(world.state / "live/just/0.raw", 0, 4096) == world.gen2.read_bytes()[:4096]
    assert not set(ending) & set(world.processes())


def test_a_server_that_lost_its_socket_is_told_of_and_found_again(world: BootWorld) -> None:
    world.boot("one")
    supervisor = world.supervisor()
    Path((world.state / "control").read_text()).unlink()
    problem = world.sessions()["one"]["problem"]
    assert f"process {supervisor}" in problem["message"]
    assert f"kill {supervisor}" in problem["hint"]
    write(world.boot("two"), 0)
    assert world.sessions()["one"]["served"]
    assert world.supervisor() == supervisor


def test_without_a_server_sessions_are_discarded_too(world: BootWorld) -> None:
    world.boot("dead")
    world.end()
    world.good("boot", "discard", "dead")
    assert world.names() == []
    assert world.processes() == []


@pytest.mark.slow
def test_the_mount_leads_to_the_sessions(world: BootWorld, tmp_path: Path) -> None:
    disk = world.boot("seen")
    mount = tmp_path / "mnt"
    mount.mkdir()
    world.good("mount", mount, "--background")
    try:
        assert (mount / "live/seen").readlink() == disk.parent
        write(mount / "live/seen" / disk.name, 0)
        assert read(disk, 0, 4096) == WRITTEN
        world.boot("later")
        wait_until(lambda: {place.name for place in (mount / "live").iterdir()} == {"later", "seen"})
        world.good("boot", "discard", "later")
        wait_until(lambda: not os.path.lexists(mount / "live/later"))
    finally:
        world.good("umount", mount)


@pytest.mark.slow
def test_a_session_is_copied_in_the_background(world: BootWorld) -> None:
    disk = world.boot("copied", "--hydrate")
    wait_until(lambda: world.sessions()["copied"]["hydrated"] == 1.0)
    assert disk.read_bytes() == world.gen2.read_bytes()


@pytest.mark.slow
def test_a_session_whose_point_has_gone_is_told_and_others_are_served(world: BootWorld) -> None:
    record = world.good("boot", f"{world.ids[0]}", "--name", "lost", "--json").json["session"]
    disk = world.boot("kept")
    world.end()
    manifest = world.repository / "points" / record["point"]
    away = world.directory / "away"
    manifest.rename(away)
    try:
        write(world.boot("third"), 0)
        assert read(disk, 0, 1) is not None
        lost = world.sessions()["lost"]
        assert not lost["served"]
        assert "restore point" in lost["problem"]["message"]
    finally:
        away.rename(manifest)


@pytest.mark.slow
def test_nbd_serves_the_disk_and_is_there_again_after_a_crash(world: BootWorld) -> None:
    record = world.good("boot", "web@latest", "--name", "net", "--export", "nbd", "--json").json["session"]
    place = record["places"][0]

    def pattern() -> bool:
        done = subprocess.run(
            ["qemu-io", "-r", "-f", "raw", "-c", "read -P 0x57 8192 4096", place["local_uri"]],
            capture_output=True,
            check=False,
        )
        return done.returncode == 0 and b"verification failed" not in done.stdout

    write_pattern = ["qemu-io", "-f", "raw", "-c", "write -P 0x57 8192 4096", "-c", "flush", place["local_uri"]]
    subprocess.run(write_pattern, check=True, capture_output=True)
    assert read(Path(place["file"]), 8192, 4096) == b"\x57" * 4096
    os.kill(world.server(), signal.SIGKILL)
    wait_until(pattern, 20)
    assert world.sessions()["net"]["places"] == record["places"]


@pytest.mark.slow
def test_a_client_that_connects_again_finds_what_it_had_not_flushed(world: BootWorld) -> None:
    record = world.good("boot", "web@latest", "--name", "again", "--export", "nbd", "--json").json["session"]
    uri = urlsplit(record["places"][0]["local_uri"])
    (socket,) = parse_qs(uri.query)["socket"]
    server = {"server.type": "unix", "server.path": socket, "export": uri.path.lstrip("/"), "reconnect-delay": "30"}
    options = ",".join(["driver=nbd", *(f"{name}={value}" for name, value in server.items())])
    client = ["stdbuf", "-oL", "qemu-io", "--image-opts", options]
    with subprocess.Popen(client, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as guest:
        assert guest.stdin is not None
        assert guest.stdout is not None

        def does(command: str, answer: str) -> None:
            print(command, file=guest.stdin, flush=True)
            while answer not in (line := guest.stdout.readline()):
                assert line, f"{command}: qemu-io ended"
                assert "verification failed" not in line
                assert "error" not in line

        try:
            for number in range(1, 4):
                does(f"write -P {number} {number * 65536} 40960", "wrote 40960/40960")
                os.kill(world.server(), signal.SIGKILL)
                for earlier in range(1, number + 1):
                    does(f"read -P {earlier} {earlier * 65536} 40960", "read 40960/40960")
            does("write -f 0 4096", "wrote 4096/4096")  # flushes
        finally:
            guest.kill()


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (("boot", "web@latest", "--disk", "7"), 2),
        (("boot", "web@latest", "--client", "10.0.0.0/8"), 2),
        (("boot", "web@latest", "--export", "nfs", "--client", "nobody"), 2),
        (("boot", "web@latest", "--name", "../x"), 2),
        (("boot", "nothing@latest"), 15),
    ],
)
def test_mistakes_are_told_and_leave_nothing(world: BootWorld, words: tuple[str, ...], code: int) -> None:
    done = world.run(*words)
    assert done.code == code, done.err
    assert world.names() == []
