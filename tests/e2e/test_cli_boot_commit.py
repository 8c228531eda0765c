"""boot commit: what is written to a session while it runs becomes a restore point, whole or not at all."""

from __future__ import annotations

import os
import signal
import struct
import subprocess
import threading
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import trio

from tests.support.boot_world import BootWorld, boot_world, wait_until
from tests.support.cli import COMMAND, MIB, Done
from tests.support.runtime import SeededRandom
from xbfs_engine.core.runtime import Runtime, SystemClock, SystemRandom
from xbfs_engine.source.xapi.ledger import Ledgers

if TYPE_CHECKING:
    from collections.abc import Iterator

BLOCK = 4096
BLOCKS = 256
BIG = 1 << 30
LOG_AT = 2 * MIB
COUNTER = struct.Struct("<Q")


@pytest.fixture(scope="module")
def world() -> Iterator[BootWorld]:
    """VM "db" has three disks: one of 1 GiB, mostly holes, and two small ones."""
    with boot_world() as world:
        images = [world.directory / f"db{number}.raw" for number in range(3)]
        for number, image in enumerate(images):
            with image.open("wb") as file:
                file.truncate(BIG if number == 0 else 4 * MIB + 512)
                file.seek(MIB)
                file.write(SeededRandom(number).token(MIB))
        world.good("backup", "image", *images, "--vm", "db")
        yield world


@pytest.fixture(autouse=True)
def discarded(world: BootWorld) -> Iterator[None]:
    yield
    world.discard_all()


def begin(world: BootWorld, name: str, *words: str) -> list[Path]:
    """A session of the first point of "db"; its files."""
    point = next(point["id"] for point in points(world, "db") if point["parent"] is None)
    told = world.good("boot", point, "--name", name, "--json", *words).json["session"]
    return [Path(place["file"]) for place in told["places"]]


def points(world: BootWorld, vm: str) -> list[dict[str, Any]]:
    return [point for point in world.good("points", "--json").json["points"] if point["vm_name"] == vm]


def committed(world: BootWorld, name: str) -> dict[str, Any]:
    return world.good("boot", "commit", name, "--json").json


def write(disk: Path, offset: int, data: bytes) -> None:
    fd = os.open(disk, os.O_RDWR)
    try:
        assert os.pwrite(fd, data, offset) == len(data)
        os.fsync(fd)
    finally:
        os.close(fd)


def exported(world: BootWorld, point: str, number: int) -> Path:
    out = world.directory / "out.raw"
    out.unlink(missing_ok=True)
    world.good("export", point, "--disk", str(number), "-o", out)
    return out


class Writer:
    """Writes the numbers from 1 on, one after the other, round and round in the log of each disk; each is safe on all
    disks before the next one is written on any."""

    def __init__(self, disks: list[Path]) -> None:
        self.disks = disks
        self.written = 0
        self._is_over = threading.Event()

    def run(self) -> None:
        files = [os.open(disk, os.O_RDWR) for disk in self.disks]
        try:
            while not self._is_over.is_set():
                number = self.written + 1
                for file in files:
                    os.pwrite(file, block(number), LOG_AT + place(number))
                    os.fsync(file)
                self.written = number
                time.sleep(0.002)  # others want the processor
        finally:
            for file in files:
                os.close(file)

    @contextmanager
    def running(self) -> Iterator[None]:
        thread = threading.Thread(target=self.run)
        thread.start()
        try:
            wait_until(lambda: self.written > 20)
            yield
            before = self.written
            wait_until(lambda: self.written > before)  # it was not hurt
        finally:
            self._is_over.set()
            thread.join()


def place(number: int) -> int:
    return number % BLOCKS * BLOCK


def block(number: int) -> bytes:
    return COUNTER.pack(number) * (BLOCK // COUNTER.size)


def last_of_log(image: Path) -> int:
    """The last number in an image's log, which holds it and all before it but for those that were overwritten."""
    with image.open("rb") as file:
        file.seek(LOG_AT)
        log = file.read(BLOCKS * BLOCK)
    blocks = [log[at : at + BLOCK] for at in range(0, len(log), BLOCK)]
    last: int = max(COUNTER.unpack_from(block)[0] for block in blocks)
    for number in range(max(1, last - BLOCKS + 1), last + 1):
        assert blocks[number % BLOCKS] == block(number), f"{number} of {last}"
    if last < BLOCKS:
        assert all(not any(blocks[number % BLOCKS]) for number in range(last + 1, BLOCKS + 1))
    return last


def test_a_commit_holds_one_moment_of_all_disks_that_are_written_to(world: BootWorld) -> None:
    disks = begin(world, "busy", "--disk", "1", "--disk", "2")
    before = {number: exported(world, points(world, "db")[0]["id"], number).read_bytes() for number in (1, 2)}
    writer = Writer(disks)
    moments = []
    with writer.running():
        for _ in range(2):
            least = writer.written
            told = committed(world, "busy")
            moments.append((least, told["point"]["id"], writer.written))
    ids = [one["id"] for one in points(world, "db")]
    assert len(set(ids)) == 3
    for least, point, most in moments:
        first, second = (last_of_log(exported(world, point, number)) for number in (1, 2))
        assert least <= second <= first <= second + 1 <= most + 2
    world.good("check")
    world.good("verify")
    base = next(one["id"] for one in points(world, "db") if one["parent"] is None)
    assert before == {number: exported(world, base, number).read_bytes() for number in (1, 2)}


def test_only_what_was_written_is_read_and_stored(world: BootWorld) -> None:
    disk = begin(world, "small")[0]
    data = SeededRandom(7).token(2 * MIB)
    write(disk, 500 * MIB, data)
    write(disk, BIG - BLOCK, data[:BLOCK])
    would = world.good("boot", "commit", "small", "--dry-run", "--json").json
    number_of_points = len(points(world, "db"))
    told = committed(world, "small")
    assert len(points(world, "db")) == number_of_points + 1
    assert told["read_bytes"] == would["read_bytes"] == 2 * MIB + (64 << 10)
    assert told["point"]["parent"] == would["base"]
    assert 2 * MIB < told["point"]["run"]["stored_bytes"] < 2 * MIB + (128 << 10)
    out = exported(world, told["point"]["id"], 0)
    subprocess.run(["cmp", out, disk], check=True)
    again = committed(world, "small")
    assert again["read_bytes"] == told["read_bytes"]
    assert again["point"]["run"]["stored_bytes"] == 0
    assert again["point"]["parent"] == told["point"]["parent"]
    assert again["point"]["time_ns"] // 10**9 > told["point"]["time_ns"] // 10**9


def test_disks_that_are_not_in_the_session_are_as_they_were(world: BootWorld) -> None:
    disk = begin(world, "one", "--disk", "1")[0]
    write(disk, 0, b"x" * 512)
    told = committed(world, "one")["point"]
    base = next(point for point in points(world, "db") if point["parent"] is None)
    assert [disk["number"] for disk in told["disks"]] == [0, 1, 2]
    assert told["vm_uuid"] == base["vm_uuid"]
    for number in (0, 2):
        assert exported(world, told["id"], number).read_bytes() == exported(world, base["id"], number).read_bytes()
    assert exported(world, told["id"], 1).read_bytes() == disk.read_bytes()
    assert "one" in told["disks"][0]["reason"]
    assert "one" in told["disks"][1]["reason"]


def test_zeroes_and_a_grown_disk_are_committed(world: BootWorld) -> None:
    disk = begin(world, "zeroes", "--disk", "1")[0]
    write(disk, MIB, bytes(MIB))
    os.truncate(disk, 6 * MIB)
    write(disk, 6 * MIB - 5, b"grown")
    told = committed(world, "zeroes")["point"]
    assert exported(world, told["id"], 1).read_bytes() == disk.read_bytes() == bytes(6 * MIB - 5) + b"grown"


def test_a_vhd_is_committed_as_the_disk_that_is_in_it(world: BootWorld) -> None:
    vhd = begin(world, "as-vhd", "--disk", "1", "--format", "vhd")[0]
    # In a block that the VHD has, over its edge, and in one that it gets.
    writes = [f"write -P {number} {at} 70k" for number, at in ((1, MIB + 512), (2, 2 * MIB - 512), (3, 3 * MIB))]
    subprocess.run(["qemu-io", "-f", "vpc", *[word for write in writes for word in ("-c", write)], vhd], check=True)
    told = committed(world, "as-vhd")
    expected = world.directory / "expected.raw"
    subprocess.run(["qemu-img", "convert", "-f", "vpc", "-O", "raw", vhd, expected], check=True)
    out = exported(world, told["point"]["id"], 1).read_bytes()
    assert len(out) == 4 * MIB + 512
    assert out == expected.read_bytes()[: len(out)]
    assert out[3 * MIB : 3 * MIB + 100] == b"\3" * 100
    assert told["read_bytes"] == 2 * MIB + 3 * (64 << 10)  # QEMU says of a new block that all of it was written


def test_what_can_not_be_committed_is_refused(world: BootWorld) -> None:
    before = len(points(world, "db"))
    assert world.run("boot", "commit", "nobody").code == 101
    vhd = begin(world, "vhd", "--disk", "1", "--format", "vhd")[0]
    snapshot = vhd.with_name("child.vhd")
    snapshot.write_bytes(b"")
    refused = world.run("boot", "commit", "vhd")
    assert refused.code == 108
    assert "snapshots" in refused.err
    snapshot.unlink()
    vhd.rename(snapshot)
    assert world.run("boot", "commit", "vhd").code == 108
    disk = begin(world, "shrunk", "--disk", "1")[0]
    os.truncate(disk, MIB)
    assert world.run("boot", "commit", "shrunk").code == 108
    assert world.run("boot", "commit", "shrunk", "--dry-run").code == 108
    assert len(points(world, "db")) == before


def test_a_vm_that_is_backed_up_is_not_committed_at_the_same_time(world: BootWorld) -> None:
    begin(world, "late", "--disk", "1")
    pool = Ledgers(world.directory / "s/pools/prod/runs", Runtime(SystemClock(), SystemRandom()))
    vm_uuid = points(world, "db")[0]["vm_uuid"]

    async def in_its_turn() -> Done:
        async with pool.turn(vm_uuid) as is_ours:
            assert is_ours
            return await trio.to_thread.run_sync(world.run, "boot", "commit", "late")

    before = len(points(world, "db"))
    assert trio.run(in_its_turn).code == 108
    assert len(points(world, "db")) == before
    assert committed(world, "late")["point"]["vm_uuid"] == vm_uuid


def frozen(world: BootWorld) -> list[str]:
    return [shown.name for shown in (world.state / "live/.frozen").iterdir()]


@contextmanager
def stopped_commit(world: BootWorld, name: str) -> Iterator[subprocess.Popen[bytes]]:
    """A commit that was stopped (SIGSTOP) once the session was frozen and a pack was stored."""
    packs = world.packs()
    process = subprocess.Popen(
        [*COMMAND, "boot", "commit", name],
        env=world.environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        end = time.monotonic() + 60
        while world.packs() == packs:
            assert process.poll() is None
            assert time.monotonic() < end
            time.sleep(0.001)
        process.send_signal(signal.SIGSTOP)
        yield process
    finally:
        with suppress(ProcessLookupError):
            process.kill()
        process.communicate()


def fill(disk: Path, seed: int) -> None:
    """More than a pack holds."""
    for at in range(6):
        write(disk, (200 + 16 * at) * MIB, SeededRandom(seed + at).token(16 * MIB))


def test_a_commit_that_is_killed_leaves_no_point_and_no_frozen_disk(world: BootWorld) -> None:
    disk = begin(world, "killed")[0]
    fill(disk, 100)
    before = len(points(world, "db"))
    with stopped_commit(world, "killed") as process:
        assert frozen(world) == ["killed"]
        second = world.run("boot", "commit", "killed")
        assert (second.code, len(points(world, "db"))) == (108, before)
        assert world.run("boot", "discard", "killed").code == 103
        write(disk, 200 * MIB, b"meanwhile")
        process.kill()
        process.wait()
    wait_until(lambda: frozen(world) == [])
    assert len(points(world, "db")) == before
    told = committed(world, "killed")["point"]
    subprocess.run(["cmp", exported(world, told["id"], 0), disk], check=True)
    world.good("check")


def test_a_live_server_that_is_killed_fails_the_commit(world: BootWorld) -> None:
    disk = begin(world, "alone")[0]
    fill(disk, 200)
    before = len(points(world, "db"))
    with stopped_commit(world, "alone") as process:
        server = world.server()
        os.kill(server, signal.SIGKILL)
        wait_until(lambda: server not in world.processes())
        process.send_signal(signal.SIGCONT)
        out, err = process.communicate(timeout=60)
        failed = Done(process.returncode, out, err.decode())
    assert failed.code == 104, failed.err
    assert len(points(world, "db")) == before
    wait_until(lambda: disk.exists())
    committed(world, "alone")


def test_a_session_that_is_discarded_by_force_fails_the_commit(world: BootWorld) -> None:
    disk = begin(world, "forced")[0]
    fill(disk, 300)
    before = len(points(world, "db"))
    with stopped_commit(world, "forced") as process:
        world.good("boot", "discard", "forced", "--force")
        process.send_signal(signal.SIGCONT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 101, err
    assert len(points(world, "db")) == before
