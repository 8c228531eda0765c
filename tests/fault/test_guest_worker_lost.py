"""Workers that crash, hang or lose their storage: what their callers see, and that nobody else does."""

from __future__ import annotations

import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest

from tests.support import guest_golden, xfs_golden
from tests.support.guest_workers import CountingLauncher, TrapSource, eventually
from xbfs_engine.core.errors import ChunkCorrupt, GuestDamaged, GuestReaderFailed, StorageUnavailable, XbfsError
from xbfs_engine.core.runtime import SystemClock
from xbfs_engine.guestfs.reading import GuestReading
from xbfs_engine.guestfs.volumes import Disk
from xbfs_engine.guestfs.worker import launcher as launcher_module
from xbfs_engine.guestfs.worker.client import GuestWorkers
from xbfs_engine.guestfs.worker.limits import Limits

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from xbfs_engine.guestfs.base import NodeId

SHORT = Limits(metadata_s=1.0, read_s=0.3, open_s=10.0, waiting_s=0.5)
BLOCK = 64 << 10


class Lab:
    """A guest with a trap under one file of its XFS, and another guest. The kept image has ``of4096`` in block 525, and
    nothing else that is asked for there; ``of4097`` in block 526."""

    def __init__(self, limits: Limits = SHORT, workers_max: int = 4) -> None:
        self.launcher = CountingLauncher()
        self.workers = GuestWorkers(SystemClock(), workers_max=workers_max, limits=limits, launcher=self.launcher)
        self.trap = TrapSource(xfs_golden.image("v5"), (525 * BLOCK, BLOCK), spring=lambda: None)
        self.guest = self.workers.open("lab", [Disk("0", self.trap), Disk("1", guest_golden.image("fat"))])
        self.other = self.workers.open("other", [Disk("0", guest_golden.image("fat"))])
        self.plain = GuestReading([Disk("0", xfs_golden.image("v5"))])
        self.bad = self.node(b"of4096")
        self.good = self.node(b"of4097")

    def node(self, name: bytes) -> NodeId:
        files = self.plain.lookup("0", self.plain.root("0"), b"files")
        assert files is not None
        found = self.plain.lookup("0", files.entry.node, name)
        assert found is not None
        return found.entry.node

    def send(self, number: signal.Signals, *, once: bool = False) -> Callable[[], None]:
        """A trap that sends a signal to the worker."""

        def spring() -> None:
            if not once or self.trap.sprung == 1:
                os.kill(self.launcher.worker, number)

        return spring

    def read(self, node: NodeId) -> bytes:
        return self.guest.read("0", node, 0, 1 << 20)

    def must_serve_the_rest(self) -> None:
        assert self.read(self.good) == self.plain.read("0", self.good, 0, 1 << 20)
        assert self.guest.stat("0", self.bad) == self.plain.stat("0", self.bad)
        assert self.guest.list("1", self.guest.root("1")).entries
        assert self.other.list("0", self.other.root("0")).entries


@pytest.fixture
def lab() -> Iterator[Lab]:
    made = Lab()
    yield made
    made.workers.close()


@pytest.mark.parametrize(
    ("number", "reason"),
    [
        (signal.SIGSEGV, "it was ended by signal SIGSEGV"),
        (signal.SIGKILL, "it was ended by signal SIGKILL"),
        (signal.SIGSTOP, r"it did not answer within 0\.3 s of its own time"),
    ],
)
def test_a_request_that_ends_its_worker_twice_fails_from_then_on(lab: Lab, number: signal.Signals, reason: str) -> None:
    lab.guest.root("0")
    lab.trap.spring = lab.send(number)
    for _ in range(3):
        with pytest.raises(GuestReaderFailed, match=reason):
            lab.read(lab.bad)
        assert lab.trap.sprung == lab.launcher.launched == 2
    lab.must_serve_the_rest()
    with pytest.raises(GuestReaderFailed, match="volume 0 of lab was ended twice by it: it"):
        lab.read(lab.bad)
    assert lab.trap.sprung == 2


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGSTOP])
def test_a_request_whose_worker_ends_once_is_answered_by_the_next(lab: Lab, number: signal.Signals) -> None:
    lab.guest.root("0")
    lab.trap.spring = lab.send(number, once=True)
    assert lab.read(lab.bad) == lab.plain.read("0", lab.bad, 0, 1 << 20)
    assert lab.launcher.launched == 2


def test_a_worker_that_dies_between_requests_is_replaced_any_number_of_times(lab: Lab) -> None:
    for round_ in range(1, 9):
        lab.guest.stat("0", lab.good)
        assert lab.launcher.launched == round_
        os.kill(lab.launcher.worker, signal.SIGKILL)
        eventually(lambda: lab.workers.live == 0)


def test_a_volume_that_ended_many_workers_is_not_read_again(lab: Lab) -> None:
    names = (b"of4096", b"of4097", b"of1000003")
    root = lab.guest.root("0")
    lab.trap._traps = ((525 * BLOCK, 2 * BLOCK), (509 * BLOCK, BLOCK))
    lab.trap.spring = lab.send(signal.SIGKILL)
    for name in names:
        with pytest.raises(GuestReaderFailed, match="ended twice"):
            lab.read(lab.node(name))
    with pytest.raises(GuestReaderFailed, match="the reader of volume 0 of lab was ended too often"):
        lab.guest.list("0", root)
    assert lab.guest.list("1", lab.guest.root("1")).entries


@pytest.mark.parametrize(
    "error", [StorageUnavailable("gone for now"), ChunkCorrupt("a chunk is damaged"), XbfsError("something else")]
)
def test_an_error_of_the_storage_is_raised_as_it_is_and_costs_no_worker(lab: Lab, error: XbfsError) -> None:
    def spring() -> None:
        raise error

    lab.trap.spring = spring
    with pytest.raises(XbfsError) as caught:
        lab.read(lab.bad)
    assert caught.value is error
    lab.trap.spring = lambda: None
    assert lab.read(lab.bad) == lab.plain.read("0", lab.bad, 0, 1 << 20)
    assert lab.launcher.launched == 1


def test_an_error_of_the_storage_during_the_search_is_not_remembered_when_it_may_pass(lab: Lab) -> None:
    def spring() -> None:
        raise StorageUnavailable("gone for now")

    lab.trap._traps = ((0, BLOCK),)
    lab.trap.spring = spring
    with pytest.raises(StorageUnavailable):
        lab.guest.volumes()
    lab.trap.spring = lambda: None
    assert [row.name for row in lab.guest.volumes().rows] == ["0", "1"]
    assert lab.launcher.launched == 1


def test_a_disk_of_which_nothing_is_known_costs_no_process(lab: Lab) -> None:
    class Gone:
        @property
        def size_bytes(self) -> int:
            raise StorageUnavailable("gone for now")

        def read_at(self, offset: int, length: int) -> bytes:
            raise AssertionError

    with pytest.raises(StorageUnavailable):
        lab.workers.open("gone", [Disk("0", Gone())]).volumes()
    assert lab.workers.live == 0
    assert not lab.launcher.workers


def test_a_bug_of_a_source_is_no_fault_of_the_worker(lab: Lab) -> None:
    def spring() -> None:
        raise KeyError("oops")

    lab.trap.spring = spring
    with pytest.raises(XbfsError, match="KeyError: 'oops'"):
        lab.read(lab.bad)
    lab.must_serve_the_rest()
    assert lab.launcher.launched == 2  # one of them for the other guest


def test_storage_that_hangs_is_waited_for_and_others_are_served(lab: Lab) -> None:
    go_on, begun = threading.Event(), threading.Event()
    lab.guest.root("0")
    lab.trap.spring = lambda: (begun.set(), go_on.wait(10))[0]
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(lab.read, lab.bad)
        begun.wait(10)
        began = time.monotonic()
        with pytest.raises(GuestReaderFailed, match=r"busy: waited for 0\.5 s"):
            lab.guest.stat("0", lab.good)
        assert 0.5 <= time.monotonic() - began < 5
        assert lab.other.list("0", lab.other.root("0")).entries
        assert not waiting.done()
        go_on.set()
        assert waiting.result(10) == lab.plain.read("0", lab.bad, 0, 1 << 20)
    assert lab.launcher.launched == 2  # one of them for the other guest


@pytest.mark.parametrize("storage_hangs", [False, True])
def test_a_guest_is_closed_whatever_its_worker_does(storage_hangs: bool) -> None:
    lab = Lab(Limits(read_s=30.0))
    go_on, begun = threading.Event(), threading.Event()
    lab.guest.root("0")

    def spring() -> None:
        if not storage_hangs:
            os.kill(lab.launcher.worker, signal.SIGSTOP)
        begun.set()
        go_on.wait(10 if storage_hangs else 0)

    lab.trap.spring = spring
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(lab.read, lab.bad)
        begun.wait(10)
        began = time.monotonic()
        lab.guest.close()
        with pytest.raises(GuestReaderFailed, match="closed"):
            waiting.result(10)
        assert time.monotonic() - began < 5
    assert (lab.workers.live, lab.launcher.launched) == (0, 1)
    assert not lab.launcher.workers
    go_on.set()
    lab.workers.close()


def test_no_more_workers_than_allowed_even_if_all_are_busy() -> None:
    lab = Lab(workers_max=1)
    go_on, begun = threading.Event(), threading.Event()
    lab.guest.root("0")
    lab.trap.spring = lambda: (begun.set(), go_on.wait(10))[0]
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(lab.read, lab.bad)
        begun.wait(10)
        with pytest.raises(GuestReaderFailed, match="all 1 readers of guests are busy"):
            lab.other.volumes()
        go_on.set()
        waiting.result(10)
    assert lab.other.volumes().rows
    assert lab.workers.live == len(lab.launcher.workers) == 1
    lab.workers.close()


def test_a_zygote_that_dies_is_replaced(lab: Lab) -> None:
    lab.guest.root("0")
    os.kill(lab.launcher.zygote, signal.SIGKILL)
    eventually(lambda: lab.workers.live == 0)
    lab.must_serve_the_rest()


def test_a_zygote_that_can_not_start_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher_module, "_START", "raise ImportError('no readers here')")
    with GuestWorkers(SystemClock()) as workers:
        guest = workers.open("one", [Disk("0", guest_golden.image("fat"))])
        for _ in range(2):
            with pytest.raises(GuestReaderFailed, match="ImportError: no readers here"):
                guest.volumes()


def test_a_reader_without_memory_says_so_and_goes_on() -> None:
    lab = Lab(Limits(memory_bytes=3 << 20))

    def use_memory() -> None:
        lab.guest.root("0")
        lab.read(lab.node(b"of1000003"))

    for _ in range(3):
        with pytest.raises(GuestDamaged, match="MemoryError"):
            use_memory()
    assert lab.guest.volumes().rows
    assert lab.launcher.launched == 1
    lab.workers.close()
