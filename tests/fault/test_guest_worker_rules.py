"""Workers that were taken over: whatever they say, their caller believes nothing that breaks the rules, and no thread
of it waits for ever."""

from __future__ import annotations

import socket
import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING

import pytest

from tests.support.guest_workers import eventually
from tests.support.runtime import FixedClock
from tests.support.volume_images import BytesSource
from xbfs_engine.core.errors import GuestDamaged, GuestReaderFailed
from xbfs_engine.core.runtime import SystemClock
from xbfs_engine.guestfs.base import NodeId
from xbfs_engine.guestfs.volumes import Disk
from xbfs_engine.guestfs.worker import server
from xbfs_engine.guestfs.worker.blocks import BlockCache, BusyTime, RemoteSource
from xbfs_engine.guestfs.worker.client import GuestWorkers
from xbfs_engine.guestfs.worker.forms import CONTENT, DONE, REFUSED, STORAGE_FAILED
from xbfs_engine.guestfs.worker.frames import Closed, pack, receive, unpack
from xbfs_engine.guestfs.worker.launcher import Launched
from xbfs_engine.guestfs.worker.limits import Limits
from xbfs_engine.guestfs.worker.turns import Turns

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from xbfs_engine.guestfs.reading import GuestReading

SHORT = Limits(metadata_s=0.3, read_s=0.3, open_s=0.3, start_s=0.3, whole_s=0.8)
HELLO = pack(((), ("everything",)))
ROW = ("0", "xfs", "", "", 1 << 20, "disk 0", (), "filesystem", "")
SOUND = {
    "volumes": ([ROW], []),
    "info": ("xfs", "", "", 1 << 20, "clean", ""),
    "root": b"root",
}


class FakeLauncher:
    """Workers that are threads which follow a script."""

    def __init__(self, script: Callable[[socket.socket, socket.socket], None]) -> None:
        self._script = script
        self.launched = 0
        self.ended = 0

    def launch(self) -> Launched:
        self.launched += 1
        control, its_control = socket.socketpair()
        blocks, its_blocks = socket.socketpair()

        def run() -> None:
            with suppress(OSError, Closed), its_control, its_blocks:
                self._script(its_control, its_blocks)

        threading.Thread(target=run, daemon=True).start()
        return Launched(control, blocks, self._end)

    def _end(self) -> int | None:
        self.ended += 1
        return 9

    def close(self) -> None:
        """Threads end with their sockets."""


def answering(kind: str, *raw: bytes) -> Callable[[socket.socket, socket.socket], None]:
    """Sound answers up to the question of a kind; for that one these bytes, and no more."""

    def script(control: socket.socket, blocks: socket.socket) -> None:
        receive(control)
        control.sendall(HELLO)
        while True:
            request = receive(control)
            assert isinstance(request, tuple)
            if request[0] == kind:
                for piece in raw:
                    control.sendall(piece)
                receive(control)
            control.sendall(pack((DONE, SOUND[str(request[0])])))

    return script


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    eventually(lambda: set(threading.enumerate()) <= before)


def opened(launcher: FakeLauncher) -> GuestWorkers:
    return GuestWorkers(SystemClock(), limits=SHORT, launcher=launcher)


DISKS = [Disk("0", BytesSource(bytes(1 << 20)))]
STAT_BYTES = 85


@pytest.mark.parametrize(
    ("kind", "raw"),
    [
        ("volumes", b"\xff\xff\xff\xff"),
        ("volumes", b"\x01\x00\x00\x00\xc1"),
        ("volumes", pack([])),
        ("volumes", pack((DONE,))),
        ("volumes", pack((7, None))),
        ("volumes", pack((DONE, None))),
        ("volumes", pack((DONE, ([ROW, ROW], [])))),
        ("volumes", pack((DONE, ([("..", *ROW[1:])], [])))),
        ("volumes", pack((DONE, ([("a/b", *ROW[1:])], [])))),
        ("volumes", pack((DONE, ([ROW], ["\x1b[2J"])))),
        ("volumes", pack((REFUSED, ("SystemExit", "", "")))),
        ("volumes", pack((REFUSED, ("StorageUnavailable", "", "")))),
        ("volumes", pack((STORAGE_FAILED, 1))),
        ("tree", pack((DONE, ("unix", [(b"/../etc", "0", b"root", None, "")], [])))),
        ("tree", pack((DONE, ("unix", [(b"/", "other", b"root", None, "")], [])))),
        ("root", pack((DONE, b"x" * 33))),
        ("stat", pack((DONE, b"x" * (STAT_BYTES - 1)))),
        ("stat", pack((DONE, b"\xff" * STAT_BYTES))),
        ("list", pack((DONE, ([], False)))),
        ("list", pack((DONE, ([(b"a", b"node", bytes(9))], True)))),
        ("list", pack((DONE, ([(b"/", b"node", b"\x01" + bytes(8))], True)))),
        ("list", pack((DONE, ([(b"a", b"node", b"\x02" + bytes(8)), (b"b", b"node", b"\x02" + bytes(8))], True)))),
        ("lookup", pack((DONE, (b"another", b"node", b"\x01" + bytes(8))))),
        ("read", pack((DONE, bytes(101)))),
        ("read", pack((CONTENT, 101))),
        ("read", pack((CONTENT, -1))),
        ("stat", pack((CONTENT, 0))),
        ("extents", pack((DONE, ([(0, 5, True), (6, 1, True)], True)))),
        ("readlink", pack((DONE, bytes(1 << 20)))),
        ("xattrs", pack((DONE, [(b"", b"")]))),
    ],
)
def test_an_answer_that_breaks_the_rules_ends_the_worker(kind: str, raw: bytes) -> None:
    launcher = FakeLauncher(answering(kind, raw))
    with opened(launcher) as workers:
        guest = workers.open("fake", DISKS)
        node = NodeId(b"node")
        ask: dict[str, Callable[[], object]] = {
            "volumes": guest.volumes,
            "tree": guest.tree,
            "root": lambda: guest.root("0"),
            "stat": lambda: guest.stat("0", node),
            "list": lambda: guest.list("0", node),
            "lookup": lambda: guest.lookup("0", node, b"name"),
            "read": lambda: guest.read("0", node, 0, 100),
            "extents": lambda: guest.extents("0", node),
            "readlink": lambda: guest.readlink("0", node),
            "xattrs": lambda: guest.xattrs("0", node),
        }
        with pytest.raises(GuestReaderFailed, match="ended twice: it broke its rules"):
            ask[kind]()
        assert launcher.launched == launcher.ended == 2


def test_an_answer_that_comes_in_drops_is_no_answer_in_time() -> None:
    def script(control: socket.socket, blocks: socket.socket) -> None:
        receive(control)
        control.sendall(HELLO)
        control.sendall(b"\x00\x10\x00\x00")
        while True:
            control.sendall(b"x")
            time.sleep(0.05)

    with opened(FakeLauncher(script)) as workers, pytest.raises(GuestReaderFailed, match=r"did not answer within 0\.3"):
        workers.open("fake", DISKS).volumes()


def test_a_worker_that_only_reads_the_disk_is_ended_as_well() -> None:
    """Its own time hardly passes: the storage is always at work for it."""

    class Slow(BytesSource):
        def read_at(self, offset: int, length: int) -> bytes:
            time.sleep(0.05)
            return super().read_at(offset, length)

    def script(control: socket.socket, blocks: socket.socket) -> None:
        receive(control)
        control.sendall(HELLO)
        cache = BlockCache(blocks)
        while True:
            cache.ask(0, 0, 512)

    launcher = FakeLauncher(script)
    with opened(launcher) as workers, pytest.raises(GuestReaderFailed, match=r"did not answer within 0\.8"):
        workers.open("fake", [Disk("0", Slow(bytes(1 << 20)))]).volumes()
    assert launcher.launched == 2


@pytest.mark.parametrize(
    ("disk", "offset", "length"), [(1, 0, 1), (0, 0, 0), (0, 1 << 20, 1), (0, 0, (1 << 20) + 1), (0, 2**63, 1)]
)
def test_a_read_that_no_worker_asks_for_ends_it(disk: int, offset: int, length: int) -> None:
    def script(control: socket.socket, blocks: socket.socket) -> None:
        receive(control)
        control.sendall(HELLO)
        BlockCache(blocks).ask(disk, offset, length)

    with opened(FakeLauncher(script)) as workers, pytest.raises(GuestReaderFailed, match="ended twice"):
        workers.open("fake", DISKS).volumes()


@pytest.mark.parametrize("first", [b"", b"\x00", b"\x01\x00\x00\x00\xc0", pack(((), ("\n",)))])
def test_a_worker_that_does_not_greet_is_ended(first: bytes) -> None:
    def script(control: socket.socket, blocks: socket.socket) -> None:
        receive(control)
        control.sendall(first)
        receive(control)

    launcher = FakeLauncher(script)
    with opened(launcher) as workers:
        guest = workers.open("fake", DISKS)
        with pytest.raises(GuestReaderFailed):
            guest.volumes()
        assert launcher.launched == launcher.ended == 2
        # It may have been the machine's fault: it is tried again.
        with pytest.raises(GuestReaderFailed):
            guest.volumes()
        assert launcher.launched == 4


@pytest.mark.parametrize(
    "error",
    [KeyError("no"), RecursionError("too deep"), MemoryError(), UnicodeDecodeError("utf-8", b"\xff", 0, 1, "no")],
)
def test_what_a_reader_trips_over_is_damage(error: Exception) -> None:
    class Guest:
        def volumes(self) -> None:
            raise error

    guest: GuestReading = Guest()  # type: ignore[assignment]
    (frame,) = server._answer(guest, ("volumes", "", b"", 0, 0, b""))
    answer = unpack(frame[4:])
    assert isinstance(answer, tuple)
    assert answer[0] == REFUSED
    assert answer[1][0] == GuestDamaged.__name__
    assert type(error).__name__ in answer[1][1]


def test_a_disk_comes_in_the_blocks_that_were_asked_for() -> None:
    ours, theirs = socket.socketpair()
    data = bytes(range(251)) * 1500
    asked = []

    class Cache(BlockCache):
        def ask(self, disk: int, offset: int, length: int) -> bytes:
            asked.append((offset, length))
            return data[offset : offset + length]

    with ours, theirs:
        source = RemoteSource(Cache(ours), 0, len(data))
        for offset, length in ((0, 1), (65535, 2), (0, len(data)), (len(data) - 5, 5), (200_000, 65_535), (7, 0)):
            assert source.read_at(offset, length) == data[offset : offset + length]
        assert asked == [
            (0, 65536), (65536, 65536), (0, len(data)), (327680, len(data) - 327680), (196608, 65536), (262144, 65536)
        ]  # fmt: skip
        for offset, length in ((-1, 1), (0, len(data) + 1), (len(data), 1), (5, -1)):
            with pytest.raises(GuestDamaged):
                source.read_at(offset, length)


def test_turns_come_in_the_order_in_which_they_were_asked_for() -> None:
    turns = Turns()
    assert turns.take(1)
    came: list[int] = []

    def wait(number: int) -> None:
        if turns.take(0.01 if number == 2 else 10):
            came.append(number)
            turns.give()

    threads = [threading.Thread(target=wait, args=(number,)) for number in range(5)]
    for number, thread in enumerate(threads):
        thread.start()
        queued = number + 1 - (number > 2)
        if number == 2:
            thread.join()
        else:
            eventually(lambda queued=queued: len(turns._waiting) == queued)  # type: ignore[misc]
    turns.give()
    for thread in threads:
        thread.join()
    assert came == [0, 1, 3, 4]
    assert turns.take(0)


def test_only_the_workers_own_time_counts() -> None:
    clock = FixedClock()
    busy = BusyTime(clock)
    busy.serving()
    clock.advance(5)
    busy.begin()
    clock.advance(1)
    busy.served()
    clock.advance(2)
    busy.serving()
    clock.advance(4)
    assert busy.spent_s() == (2, 7)
    busy.served()
    clock.advance(1)
    assert busy.spent_s() == (3, 8)
    busy.begin()
    assert busy.spent_s() == (0, 0)
