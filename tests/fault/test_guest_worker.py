"""Guests read in workers give the same answers as without; and what workers do to each other and to their caller."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.support import guest_golden
from tests.support.guest_workers import (
    CountingLauncher,
    children,
    eventually,
    everything,
    golden_guest,
    pages,
    process,
)
from xbfs_engine.core.errors import GuestNotFound, GuestReaderFailed
from xbfs_engine.core.runtime import SystemClock
from xbfs_engine.guestfs.reading import GuestReading
from xbfs_engine.guestfs.volumes import Disk
from xbfs_engine.guestfs.worker.client import GuestWorkers

if TYPE_CHECKING:
    from collections.abc import Iterator

    from xbfs_engine.guestfs.guest import Guest

CALLER = """
import sys, time
from tests.support.guest_workers import golden_guest
from xbfs_engine.core.runtime import SystemClock
from xbfs_engine.guestfs.worker.client import GuestWorkers
workers = GuestWorkers(SystemClock())
for name in "ab":
    workers.open(name, golden_guest()[:2]).info("0")
print(workers._launcher._zygote._process.pid, flush=True)
time.sleep(60)
"""


@pytest.fixture(scope="module")
def workers() -> Iterator[GuestWorkers]:
    with GuestWorkers(SystemClock()) as made:
        yield made


def ext4() -> list[Disk]:
    return [Disk("0", guest_golden.image("ext4"))]


@pytest.mark.parametrize("each_max", [50, pytest.param(100_000, marks=pytest.mark.slow)])
def test_every_answer_is_the_same_as_without_a_worker(workers: GuestWorkers, each_max: int) -> None:
    disks = golden_guest()
    expected = everything(GuestReading(disks), each_max)
    assert len(expected) > 1_000
    guest: Guest = workers.open("all", disks)
    assert everything(guest, each_max) == expected


def test_nothing_starts_before_it_is_needed_and_all_ends_at_the_close() -> None:
    launcher = CountingLauncher()
    threads = set(threading.enumerate())
    workers = GuestWorkers(SystemClock(), launcher=launcher)
    guest = workers.open("one", ext4())
    assert guest.confinement is None
    assert (workers.live, launcher.launched) == (0, 0)
    guest.info("0")
    assert (workers.live, launcher.launched) == (1, 1)
    there = [process(pid) for pid in (launcher.zygote, *launcher.workers)]
    assert len(there) == 2
    assert all(there)
    workers.close()
    assert workers.live == 0
    eventually(lambda: not any(one.is_there for one in there if one))
    eventually(lambda: set(threading.enumerate()) <= threads)
    with pytest.raises(GuestReaderFailed, match="closed"):
        guest.root("0")


def test_the_sandbox_is_in_force_around_a_worker() -> None:
    launcher = CountingLauncher()
    with GuestWorkers(SystemClock(), launcher=launcher) as workers:
        guest = workers.open("one", ext4())
        guest.info("0")
        assert guest.confinement is not None
        place = Path("/proc") / str(launcher.worker)
        status = dict(line.split(":\t", 1) for line in (place / "status").read_text().splitlines())
        in_force = {layer.split()[0] for layer in guest.confinement.in_force}
        assert len(in_force) + len(guest.confinement.missing) == 7
        assert status["NoNewPrivs"] == "1"
        assert status["Threads"] == "1"
        if "capabilities" in in_force:
            assert int(status["CapEff"], 16) == int(status["CapPrm"], 16) == 0
        if "seccomp" in in_force:
            assert status["Seccomp"] == "2"
        if os.geteuid() == 0:
            assert len(set(status["Uid"].split())) == len(set(status["Gid"].split())) == 1
            assert int(status["Uid"].split()[0]) >= 0x70000000
            assert status["Groups"].split() == []
            assert sorted(file.name for file in (place / "fd").iterdir()) == ["0", "1", "2", "3", "4"]
            if "namespaces" in in_force:
                assert (place / "ns/net").readlink() != Path("/proc/self/ns/net").readlink()
        assert "\nMax processes             0 " in (place / "limits").read_text()


def test_nothing_outlives_a_caller_that_is_killed() -> None:
    root = Path(__file__).parents[2]
    caller = subprocess.Popen(
        [sys.executable, "-c", CALLER],
        stdout=subprocess.PIPE,
        text=True,
        env={"PYTHONPATH": os.pathsep.join([str(root / "engine"), str(root)])},
    )
    assert caller.stdout is not None
    with caller, caller.stdout:
        zygote = int(caller.stdout.readline())
        there = [process(pid) for pid in (zygote, *children(zygote))]
        assert len(there) == 3
        # Not even one that takes no part.
        os.kill(children(zygote)[0], signal.SIGSTOP)
        caller.kill()
    eventually(lambda: not any(one.is_there for one in there if one))


def test_the_least_recently_used_worker_ends_for_another() -> None:
    launcher = CountingLauncher()
    with GuestWorkers(SystemClock(), workers_max=2, launcher=launcher) as workers:
        guests = [workers.open(name, ext4()) for name in "abc"]
        root = guests[0].root("0")
        guests[1].root("0")
        guests[0].stat("0", root)
        assert launcher.launched == 2
        guests[2].root("0")
        assert workers.live == len(launcher.workers) == 2
        guests[0].stat("0", root)
        assert launcher.launched == 3
        guests[1].stat("0", root)
        assert (launcher.launched, workers.live) == (4, 2)


def test_what_is_known_of_a_guest_needs_no_worker() -> None:
    launcher = CountingLauncher()
    with GuestWorkers(SystemClock(), workers_max=1, launcher=launcher) as workers:
        first, second = (workers.open(name, ext4()) for name in "ab")
        known = first.volumes(), first.tree(), first.info("0"), first.root("0")
        second.volumes()
        assert (first.volumes(), first.tree(), first.info("0"), first.root("0")) == known
        assert launcher.launched == 2


def test_an_idle_worker_ends_and_another_goes_on_where_it_was() -> None:
    launcher = CountingLauncher()
    with GuestWorkers(SystemClock(), idle_s=0.2, launcher=launcher) as workers:
        guest = workers.open("one", [Disk("0", guest_golden.image("btrfs"))])
        root = guest.root("0")
        before = guest.list("0", root)
        eventually(lambda: workers.live == 0)
        eventually(lambda: not launcher.workers)
        assert guest.list("0", root) == before
        assert launcher.launched == 2


def test_many_threads_may_ask_at_once(workers: GuestWorkers) -> None:
    disks = golden_guest()[:3]
    plain = GuestReading(disks)
    guest = workers.open("busy", disks)

    def walk(number: int) -> None:
        volume = str(number % 3)
        root = guest.root(volume)
        for page in pages(guest, volume, root):
            for entry, stat in page.entries:
                assert guest.stat(volume, entry.node) == stat == plain.stat(volume, entry.node)
                assert guest.lookup(volume, root, entry.name) == plain.lookup(volume, root, entry.name)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(walk, range(8)))


def test_an_error_is_the_one_of_the_reader(workers: GuestWorkers) -> None:
    guest = workers.open("one", ext4())
    with pytest.raises(GuestNotFound, match="there is no volume 7") as caught:
        guest.info("7")
    assert caught.value.hint == "there are: 0"
    assert guest.lookup("0", guest.root("0"), b"x" * 256) is None
