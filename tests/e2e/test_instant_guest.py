"""A guest runs from a restore point by every export; what it was told is durable outlives kill -9 of everything."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from contextlib import contextmanager, nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import pytest

from tests.support.instant_lab import Lab, blockdev, lab
from tests.support.micro_guest import BOOTED, acknowledged, database, micro_disk, server_disk
from tests.support.nfs_network import needs_ganesha, private_network
from tests.support.qemu_guest import BOOT_S, Guest

if TYPE_CHECKING:
    from collections.abc import Iterator
    from contextlib import AbstractContextManager

WAYS = {
    "file": ("file", ["--export", "file"]),
    "vhd": ("file", ["--export", "file", "--format", "vhd"]),
    "nbd": ("unix", ["--export", "nbd"]),
    "nbd-tls": ("tls", ["--export", "nbd"]),
    "nfs": ("nfs", ["--export", "nfs", "--format", "raw"]),
    "nfs-vhd": ("nfs", ["--export", "nfs"]),
}
"""By which a guest gets at its disk: how QEMU opens it, and the options of `xbfs boot`."""
LOADED = 60


def started(made: Lab, scratch: Path, way: str, *, words: str, address: str = "") -> Guest:
    """A guest on a session of its own named as the way, made if there is none. QEMU connects to NBD again."""
    by, options = WAYS[way]
    client = ["--client", address] if by == "nfs" else []
    told = made.session(way) or made.boot("--name", way, *options, *client)
    disk, objects = blockdev(told, by)
    if disk["driver"] == "nbd":
        disk["reconnect-delay"] = 60
    return Guest(disk, scratch, words=words, objects=objects)


def lose_and_find(made: Lab, scratch: Path, way: str, address: str = "") -> None:
    """Load the database, kill everything in the middle, start again: all that was acknowledged is there."""
    with started(made, scratch / "first", way, words="check write=before load", address=address) as guest:
        guest.wait_for("XBFS-ACK", count=LOADED)
        guest.process.kill()
        made.kill_all()
        guest.kill()
        console = guest.console()
    assert "XBFS-WRITTEN before" in console
    with made.serving(), started(made, scratch / "second", way, words="check write=after off") as guest:
        found = database(again := guest.wait())
    assert is_sound(again)
    assert found.integrity == "ok"
    assert found.whole
    assert found.transactions == found.highest >= acknowledged(console) >= LOADED


def is_sound(console: str) -> bool:
    """Whether the guest's file system is: after its journal was replayed there is nothing to correct."""
    checks = re.findall(r"XBFS-FSCK(-AGAIN)? status=(\d+)", console)
    return (
        "XBFS-BOOT-OK" in console
        and checks != []
        and all(status in "01"[: 2 - bool(again)] for again, status in checks)
    )


def test_a_guest_outlives_everything_on_a_file() -> None:
    with lab(micro_disk()) as made, scratch() as folder:
        lose_and_find(made, folder, "file")
        made.good("boot", "discard", "file")
        assert made.sessions() == []
        assert len(made.points()) == 1


@pytest.mark.parametrize(
    "way",
    [
        *(pytest.param(way, marks=pytest.mark.slow) for way in ("vhd", "nbd")),
        "nbd-tls",
        pytest.param("nfs", marks=needs_ganesha),
    ],
)
def test_a_guest_boots_and_writes_by(way: str) -> None:
    with network_for(way) as address, lab(micro_disk()) as made, scratch() as folder:
        with started(made, folder, way, words="write=something off", address=address) as guest:
            console = guest.wait()
        assert BOOTED in console
        assert "XBFS-WRITTEN something" in console


@pytest.mark.slow
@pytest.mark.parametrize(
    "way", ["vhd", "nbd", "nbd-tls", *(pytest.param(way, marks=needs_ganesha) for way in ("nfs", "nfs-vhd"))]
)
def test_a_guest_outlives_everything_by(way: str) -> None:
    with network_for(way) as address, lab(micro_disk()) as made, scratch() as folder:
        lose_and_find(made, folder, way, address)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["nbd", "nbd-tls", pytest.param("nfs-vhd", marks=needs_ganesha)])
def test_a_guest_goes_on_when_the_server_dies_under_it(way: str) -> None:
    """It loses no power, so nothing that it was told is written may be lost, flushed or not."""
    with network_for(way) as address, lab(micro_disk()) as made, scratch() as folder:
        with started(made, folder / "first", way, words="check stream load", address=address) as guest:
            for death in range(1, 6):
                guest.wait_for(f"XBFS-STREAM pass={death}")
                os.kill(made.server(), signal.SIGKILL)
            assert "wrong=0" in guest.wait_for("XBFS-STREAMED wrong=")
            for death in range(1, 4):
                guest.wait_for("XBFS-ACK", count=LOADED * death)
                os.kill(made.server(), signal.SIGKILL)
            console = guest.wait_for("XBFS-ACK", count=LOADED * 4)
        with started(made, folder / "second", way, words="check off", address=address) as guest:
            found = database(again := guest.wait())
    assert is_sound(again)
    assert found.integrity == "ok"
    assert found.transactions == found.highest >= acknowledged(console)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["file", "nbd"])
def test_a_guest_waits_while_the_disk_of_sessions_is_full(way: str) -> None:
    with lab(micro_disk()) as made, scratch() as folder:
        state = with_little_room(made)
        with started(made, folder / "first", way, words="check stream off") as guest:
            guest.wait_for("XBFS-STREAM pass=1")
            end = time.monotonic() + BOOT_S
            while guest.qmp("query-status")["status"] != "io-error":
                assert time.monotonic() < end, guest.console()
                time.sleep(0.1)
            subprocess.run(["mount", "-o", "remount,size=200m", state], check=True)
            guest.qmp("cont")
            console = guest.wait()
        assert "XBFS-STREAMED wrong=0" in console
        with started(made, folder / "second", way, words="check off") as guest:
            assert is_sound(guest.wait())


@pytest.mark.slow
@pytest.mark.parametrize("way", ["vhd", "nbd", pytest.param("nfs-vhd", marks=needs_ganesha)])
def test_a_server_with_postgresql_outlives_everything(way: str) -> None:
    with network_for(way) as address, lab(server_disk()) as made, scratch() as folder:
        lose_and_find(made, folder, way, address)


def with_little_room(made: Lab) -> Path:
    """Where sessions of a lab are to be: a file system of 32 MiB, which the lab unmounts in the end."""
    state = made.directory / "state"
    state.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32m", "tmpfs", state], check=True)
    return state


def network_for(way: str) -> AbstractContextManager[str]:
    return private_network() if way.startswith("nfs") else nullcontext("")


@contextmanager
def scratch() -> Iterator[Path]:
    with TemporaryDirectory(prefix="xbfs-") as directory:
        yield Path(directory)
