"""The disk that sessions are kept on is full, with the server's log on it: guests get errors, nothing hangs or ends."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
from typing import TYPE_CHECKING

import pytest

from tests.support.boot_world import BootWorld, boot_world, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a small file system")
BLOCK = 64 << 10


@pytest.fixture
def small() -> Iterator[BootWorld]:
    """A world whose sessions have 16 MiB."""
    with boot_world() as world:
        state = world.directory / "s"
        state.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", state], check=True)
        try:
            yield world
        finally:
            world.end()
            subprocess.run(["umount", state], check=True)


def fill(disk: Path, first: int) -> int:
    """Write blocks from number ``first`` on until there is no room; the number of the one that did not fit."""
    with disk.open("r+b", buffering=0) as file:
        for number in range(first, first + 1000):
            try:
                os.pwrite(file.fileno(), block(number), number * BLOCK)
            except OSError as exc:
                if exc.errno != errno.ENOSPC:
                    raise
                return number
    raise AssertionError("there is room for all")


def block(number: int) -> bytes:
    return number.to_bytes(4, "big") * (BLOCK // 4)


def written(disk: Path, last: int) -> bool:
    """Whether all blocks below ``last`` are there; not while nobody serves them."""
    try:
        with disk.open("rb") as file:
            return all(os.pread(file.fileno(), BLOCK, number * BLOCK) == block(number) for number in range(last))
    except OSError:
        return False


def test_a_full_disk_is_the_guests_error_alone(small: BootWorld) -> None:
    disk, other = small.boot("s1"), small.boot("s2", "--hydrate")
    before = other.read_bytes()
    log = small.state / "server.log"
    last = fill(disk, 0)
    while log.stat().st_size % 4096:  # a page of tmpfs that is begun has room
        with log.open("ab") as file:
            file.write(b"\n")
    for number in range(20):  # more often than the server has threads
        last = fill(disk, last) if number % 2 else last
        with disk.open("r+b", buffering=0) as file, pytest.raises(OSError, match="No space left"):
            os.pwrite(file.fileno(), block(0), (last + 9 + number) * BLOCK)
    assert written(disk, last)
    assert other.read_bytes() == before
    assert small.sessions()["s1"]["served"]

    for _ in range(2):
        server = small.server()
        os.kill(server, signal.SIGKILL)
        wait_until(lambda: written(disk, last))
        assert small.server() != server
    assert other.read_bytes() == before
    full = small.run("boot", "web@latest", "--name", "s3")
    assert full.code != 0
    assert b"free space where sessions are kept" in full.err.encode()
    small.good("boot", "discard", "s2")
    assert fill(disk, last) > last
    assert written(disk, last)
