"""Many threads at one overlay: no acknowledged byte is lost or goes back, and flushes that meet share the work."""

from __future__ import annotations

import random  # noqa: TID251 - seeded
import struct
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest

from tests.support.disks import CHUNK, MemoryDisk
from xbfs.view.overlay import Overlay, create_overlay, open_overlay
from xbfs.view.overlay.ranges import RangeLock
from xbfs.view.overlay.rounds import Rounds
from xbfs_engine.core.errors import StorageFull
from xbfs_engine.core.runtime import SystemClock

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

UNIT, SECTOR = 4096, 512
SIZE = 2 * CHUNK
BASE = MemoryDisk.full(SIZE)


class SlowDisk(MemoryDisk):
    """Lets others run while it reads, as a storage does: a fill from it takes long."""

    def parts_at(self, offset: int, length: int) -> list[bytes]:
        time.sleep(0.0005)
        return super().parts_at(offset, length)

    def read_at(self, offset: int, length: int) -> bytes:
        time.sleep(0.0005)
        return super().read_at(offset, length)


@pytest.fixture
def overlay(tmp_path: Path) -> Iterator[Overlay]:
    with create_overlay(tmp_path / "o", SlowDisk.full(SIZE), identity=b"") as made:
        yield made


def together(*works: Callable[[], None]) -> None:
    """Run all at once; the first error of any."""
    with ThreadPoolExecutor(len(works)) as pool:
        for future in [pool.submit(work) for work in works]:
            future.result(timeout=60)


def test_parts_of_the_same_new_units_are_written_at_once(overlay: Overlay) -> None:
    """Eight threads write one sector each of every unit: none's fill from the base undoes another's write."""

    def writer(place: int) -> Callable[[], None]:
        def write() -> None:
            for unit in range(SIZE // UNIT):
                data = bytes([place + 1]) * SECTOR
                overlay.write_at(unit * UNIT + place * SECTOR, [data])
                assert overlay.read_at(unit * UNIT + place * SECTOR, SECTOR) == data

        return write

    together(*map(writer, range(8)))
    assert overlay.read_at(0, SIZE) == b"".join(bytes([place + 1]) * SECTOR for place in range(8)) * (SIZE // UNIT)


def test_readers_never_see_a_sector_go_back(overlay: Overlay) -> None:
    """A writer counts in its own sectors and tells what was acknowledged; readers find that or more, flushes or not."""
    places = [number * 5 * SECTOR for number in range(SIZE // SECTOR // 5)]
    acknowledged = dict.fromkeys(places, 0)
    ended = threading.Event()

    def write(mine: list[int], seed: int) -> None:
        chance = random.Random(seed)
        for count in range(1, 40):
            for place in chance.sample(mine, len(mine)):
                overlay.write_at(place, [struct.pack("<QQ", count, ~count & 0xFFFF).ljust(SECTOR, b"c")])
                acknowledged[place] = count

    def read() -> None:
        chance = random.Random(7)
        while not ended.is_set():
            for place in chance.sample(places, 8):
                least = acknowledged[place]
                found = overlay.read_at(place, SECTOR)
                if found.endswith(b"c"):
                    count, check = struct.unpack_from("<QQ", found)
                    assert check == ~count & 0xFFFF
                    assert count >= least
                else:
                    assert least == 0
                    assert found == BASE.read_at(place, SECTOR)

    def flush() -> None:
        while not ended.is_set():
            overlay.flush()

    def hydrate() -> None:
        overlay.hydrate(rate_bytes_s=SIZE * 4, clock=SystemClock(), stop=ended)

    def writers() -> None:
        try:
            together(lambda: write(places[::2], 1), lambda: write(places[1::2], 2))
        finally:
            ended.set()

    together(writers, read, read, flush, hydrate)
    assert overlay.is_hydrated


def test_resizes_and_discards_among_readers_and_writers(overlay: Overlay) -> None:
    """What was cut off is never seen again, by nobody, while the size goes up and down."""
    ended = threading.Event()
    kept = SIZE // 2
    overlay.write_at(kept, [b"o" * kept])
    overlay.resize(kept)

    def resize() -> None:
        try:
            for count in range(60):
                overlay.resize(kept + count % 7 * 3000)
                if overlay.size_bytes > kept + UNIT:
                    overlay.write_at(kept + 5, [b"n" * 1000])
        finally:
            ended.set()

    def read() -> None:
        while not ended.is_set():
            for found in (overlay.read_at(kept - 10, SIZE), b"".join(overlay.parts_at(kept, 9000))):
                assert not set(found[10:]) - set(b"n\0"), "cut off"

    def write() -> None:
        chance = random.Random(3)
        while not ended.is_set():
            place = chance.randrange(kept - UNIT)
            overlay.discard(place // 2, UNIT)
            overlay.write_at(place, [b"w" * 100])

    together(resize, read, read, write)
    assert set(overlay.read_at(kept, SIZE)) <= set(b"n\0")


def test_flushes_that_come_together_share_one_round() -> None:
    gate, begun = threading.Semaphore(0), threading.Semaphore(0)
    runs: list[int] = []

    def work() -> None:
        runs.append(1)
        begun.release()
        gate.acquire()

    rounds = Rounds(work)
    with ThreadPoolExecutor(9) as pool:
        first = pool.submit(rounds.run)
        begun.acquire()
        others = [pool.submit(rounds.run) for _ in range(8)]
        time.sleep(0.1)
        gate.release()
        first.result(timeout=10)
        # None of them is served by the round that ran when they came.
        assert not any(other.done() for other in others)
        gate.release()
        for other in others:
            other.result(timeout=10)
    assert len(runs) == 2


def test_who_shares_a_round_that_fails_runs_one_of_its_own() -> None:
    gate, begun = threading.Semaphore(0), threading.Semaphore(0)
    outcomes = iter([StorageFull("full"), StorageFull("still"), None, None, None])

    def work() -> None:
        begun.release()
        gate.acquire()
        outcome = next(outcomes)
        if outcome:
            raise outcome

    rounds = Rounds(work)
    with ThreadPoolExecutor(4) as pool:
        first = pool.submit(rounds.run)
        begun.acquire()
        others = [pool.submit(rounds.run) for _ in range(3)]
        gate.release(9)
        errors = [str(run.exception(timeout=10)) for run in (first, *others)]
    assert errors[0] == "full"
    assert sorted(errors[1:]) == ["None", "None", "still"]


def test_ranges_wait_for_those_they_meet_and_for_no_others() -> None:
    lock = RangeLock()
    lock.acquire(10, 20)
    lock.acquire(20, 30)
    got: list[str] = []

    def take(name: str, first: int, last: int) -> None:
        lock.acquire(first, last)
        got.append(name)
        lock.release(first, last)

    wide = threading.Thread(target=take, args=("wide", 0, 100))
    wide.start()
    time.sleep(0.05)
    # Behind the wide one though it could run now: who waits for everything gets it.
    narrow = threading.Thread(target=take, args=("narrow", 40, 41))
    narrow.start()
    time.sleep(0.05)
    lock.release(10, 20)
    time.sleep(0.05)
    assert got == []
    lock.release(20, 30)
    wide.join(10)
    narrow.join(10)
    assert got == ["wide", "narrow"]


def test_what_many_threads_flushed_is_in_the_files(tmp_path: Path) -> None:
    overlay = create_overlay(tmp_path / "o", BASE, identity=b"")

    def writer(number: int) -> Callable[[], None]:
        def write() -> None:
            for unit in range(number, SIZE // UNIT, 4):
                overlay.write_at(unit * UNIT + 100, [bytes([unit + 1]) * 2000])
                overlay.flush()

        return write

    together(*map(writer, range(4)))
    # The lock aside, a process that dies here leaves just this.
    (tmp_path / "copy").mkdir()
    for name in ("header", "data", "map"):
        (tmp_path / "copy" / name).write_bytes((tmp_path / "o" / name).read_bytes())
    overlay.close()
    with open_overlay(tmp_path / "copy", BASE, identity=b"") as copy:
        for unit in range(SIZE // UNIT):
            assert copy.read_at(unit * UNIT + 99, 2002)[1:-1] == bytes([unit + 1]) * 2000
