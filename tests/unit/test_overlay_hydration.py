"""The base comes into the overlay: at what speed, how often, from where on again, and among writers."""

from __future__ import annotations

import random  # noqa: TID251 - seeded
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from tests.support.disks import CHUNK, MemoryDisk
from xbfs.view.overlay import Layer, Region, create_overlay, freeze_all, open_overlay
from xbfs_engine.core.limits import MIB
from xbfs_engine.core.runtime import SystemClock

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    import pytest

    from xbfs.view.base import Extent
    from xbfs.view.overlay import Overlay

UNIT = 4096
SIZE = 6 * MIB + 1000
PAGE_OF_DISK = 64 * MIB


class Watched(MemoryDisk):
    """Says what was read of it, gives others the turn while it reads, and may be dead."""

    reads: list[tuple[int, int]]
    is_dead = False

    def read_at(self, offset: int, length: int) -> bytes:
        assert not self.is_dead
        self.reads.append((offset, length))
        time.sleep(0.001)
        return super().read_at(offset, length)

    def parts_cached(self, offset: int, length: int) -> list[bytes | memoryview] | None:
        assert not self.is_dead
        return super().parts_cached(offset, length)

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        assert not self.is_dead
        return super().extents(offset, length)


def watched(numbers: range) -> Watched:
    base = Watched.holding(SIZE, numbers)
    base.reads = []
    return base


def original(numbers: range) -> bytes:
    return MemoryDisk.holding(SIZE, numbers).read_at(0, SIZE)


class Time(threading.Event):
    """A clock and an event: waiting for the event is what makes the clock go."""

    def __init__(self) -> None:
        super().__init__()
        self.now_s = 100.0

    def now_ns(self) -> int:
        return 0

    def monotonic_s(self) -> float:
        return self.now_s

    def wait(self, timeout: float | None = None) -> bool:
        assert timeout is not None
        self.now_s += timeout
        return False


def hydrate(overlay: Overlay, on_progress: Callable[[int, int], None] = lambda _done, _total: None) -> None:
    overlay.hydrate(rate_bytes_s=None, clock=SystemClock(), stop=threading.Event(), on_progress=on_progress)


def test_it_is_as_fast_as_it_may_be_and_reads_data_only_and_once(tmp_path: Path) -> None:
    base, clock = watched(range(16, 80)), Time()
    told: list[tuple[int, int]] = []
    with create_overlay(tmp_path / "o", base, identity=b"") as overlay:
        overlay.write_at(2 * MIB, [b"x" * MIB])
        overlay.hydrate(rate_bytes_s=MIB, clock=clock, stop=clock, on_progress=lambda *how: told.append(how))
        assert sorted(base.reads) == [(MIB, MIB), (3 * MIB, MIB), (4 * MIB, MIB)]
        assert clock.now_s - 100 == 3
        assert told == [(at * MIB, SIZE) for at in (2, 3, 4, 5)] + [(SIZE, SIZE)]
        assert overlay.hydrated_bytes == 3 * MIB
        assert overlay.data_bytes == overlay.dirty_bytes == MIB
        assert (tmp_path / "o" / "data").stat().st_blocks * 512 <= 4 * MIB + 2 * UNIT
        hydrate(overlay)
        assert len(base.reads) == 3


def test_it_ends_when_it_is_stopped_and_goes_on_after_a_crash(tmp_path: Path) -> None:
    base, stop = watched(range(90)), threading.Event()

    def stop_in_the_middle(done: int, _total: int) -> None:
        if done >= 3 * MIB:
            stop.set()

    with create_overlay(tmp_path / "o", base, identity=b"") as overlay:
        overlay.hydrate(rate_bytes_s=None, clock=SystemClock(), stop=stop, on_progress=stop_in_the_middle)
        assert not overlay.is_hydrated
        assert overlay.hydrated_bytes == 3 * MIB
        overlay.flush()
        # The lock aside, a process that dies here leaves just this.
        shutil.copytree(tmp_path / "o", tmp_path / "copy")
    base.reads.clear()
    with open_overlay(tmp_path / "copy", base, identity=b"") as copy:
        hydrate(copy)
        assert sorted(base.reads) == [(3 * MIB, MIB), (4 * MIB, MIB), (5 * MIB, MIB * 10 // 16)]
        assert copy.is_hydrated


def test_the_base_is_not_needed_any_more(tmp_path: Path) -> None:
    base = watched(range(0, 90, 2))
    with create_overlay(tmp_path / "o", base, identity=b"") as overlay:
        overlay.write_at(CHUNK - 5, [b"before"])
        hydrate(overlay)
        base.is_dead = True
        content = bytearray(original(range(0, 90, 2)))
        content[CHUNK - 5 : CHUNK + 1] = b"before"
        assert overlay.read_at(0, SIZE) == content
        cached = overlay.read_cached(2 * CHUNK, 2 * CHUNK)
        assert cached is None or cached == content[2 * CHUNK : 4 * CHUNK]
        assert sum(extent.length for extent in overlay.extents(0, SIZE) if extent.is_data) == 45 * CHUNK + UNIT
        for at in (3 * CHUNK + 100, 4 * CHUNK + 100):
            overlay.write_at(at, [b"after"])
            content[at : at + 5] = b"after"
        overlay.write_zeroes(6 * CHUNK + 5, CHUNK // 2)
        content[6 * CHUNK + 5 : 6 * CHUNK + 5 + CHUNK // 2] = bytes(CHUNK // 2)
        overlay.resize(SIZE - 70000)
        overlay.resize(SIZE)
        content[SIZE - 70000 :] = bytes(70000)
        assert overlay.read_at(0, SIZE) == content
    with open_overlay(tmp_path / "o", base, identity=b"") as again:
        assert again.read_at(0, SIZE) == content
        hydrate(again)


def test_what_was_copied_counts_as_unchanged_until_it_is_written(tmp_path: Path) -> None:
    base = watched(range(90))
    with create_overlay(tmp_path / "o", base, identity=b"") as overlay:
        hydrate(overlay)
        assert list(overlay.changed_extents()) == []
        overlay.write_at(MIB + 1, [b"x"])
        overlay.discard(2 * MIB, MIB)
        assert [tuple(region) for region in overlay.changed_extents()] == [
            (MIB, UNIT, Layer.DATA),
            (2 * MIB, MIB, Layer.ZERO),
        ]
        (frozen,) = freeze_all([overlay])
        overlay.write_at(3 * MIB, [b"y" * MIB])
        assert len(list(frozen.changed_extents())) == 2
        assert frozen.read_at(3 * MIB, MIB) == base.read_at(3 * MIB, MIB)
        frozen.close()


def test_copies_are_told_from_writes_after_a_clean_end_and_taken_for_writes_after_a_power_cut(tmp_path: Path) -> None:
    """Only near a write: within 64 MiB of the disk."""
    size = 2 * PAGE_OF_DISK
    base = MemoryDisk.holding(size, (0, 1, 2, size // CHUNK - 1))
    with create_overlay(tmp_path / "o", base, identity=b"") as overlay:
        hydrate(overlay)
        overlay.write_at(CHUNK, [b"x" * UNIT])
        written = list(overlay.changed_extents())
        assert written == [Region(CHUNK, UNIT, Layer.DATA)]
        content = overlay.read_at(0, 4 * CHUNK)
        # A machine that goes down here leaves just this.
        shutil.copytree(tmp_path / "o", tmp_path / "crashed")
        (tmp_path / "crashed" / "recent").unlink()
        assert (tmp_path / "o" / "header").read_bytes()[8192:] == b"\1"
    assert (tmp_path / "o" / "header").stat().st_size == 4608
    for _ in range(2):
        with open_overlay(tmp_path / "o", base, identity=b"") as again:
            assert list(again.changed_extents()) == written
        with open_overlay(tmp_path / "crashed", base, identity=b"") as again:
            assert list(again.changed_extents()) == [Region(0, 3 * CHUNK, Layer.DATA)]
            assert again.read_at(0, 4 * CHUNK) == content
            assert again.hydrated_bytes == CHUNK


def test_writers_and_a_commit_among_copies(tmp_path: Path) -> None:
    """No write that was acknowledged is undone by a copy, in the disk or in what was frozen of it."""
    base = watched(range(90))
    ended = threading.Event()
    overlay = create_overlay(tmp_path / "o", base, identity=b"")
    expected = bytearray(original(range(90)))

    def guest(lane: int) -> None:
        chance = random.Random(lane)
        while not ended.is_set() or lane == 0:
            at = chance.randrange(SIZE // 1024 // 3) * 3 * 1024 + lane * 1024
            data = chance.randbytes(1024)
            if at + 1024 > SIZE:
                continue
            if chance.random() < 0.05:
                data = bytes(1024)
                overlay.discard(at, 1024)
            else:
                overlay.write_at(at, [data])
            expected[at : at + 1024] = data
            assert overlay.read_at(at, 1024) == data
            if ended.is_set():
                return

    def commit() -> None:
        while not ended.is_set():
            (frozen,) = freeze_all([overlay])
            before = frozen.read_at(0, SIZE)
            time.sleep(0.01)
            assert frozen.read_at(0, SIZE) == before
            frozen.close()

    def copy() -> None:
        try:
            overlay.hydrate(rate_bytes_s=12 * MIB, clock=SystemClock(), stop=threading.Event())
            time.sleep(0.05)
        finally:
            ended.set()

    with ThreadPoolExecutor(5) as pool:
        for run in [pool.submit(guest, 0), pool.submit(guest, 1), pool.submit(commit), pool.submit(copy)]:
            run.result(timeout=60)
    assert overlay.is_hydrated
    assert overlay.read_at(0, SIZE) == expected
    overlay.close()
    base.is_dead = True
    with open_overlay(tmp_path / "o", base, identity=b"") as again:
        assert again.read_at(0, SIZE) == expected


def test_a_disk_that_shrinks_while_it_is_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = watched(range(90))
    with create_overlay(tmp_path / "o", base, identity=b"") as overlay:
        kept = 2 * MIB + 5 * UNIT + 7

        def shrink(done: int, _total: int) -> None:
            if done == 2 * MIB:
                overlay.resize(kept)
                overlay.resize(SIZE)

        hydrate(overlay, shrink)
        assert overlay.is_hydrated
        assert overlay.hydrated_bytes == 2 * MIB + 6 * UNIT
        base.is_dead = True
        assert overlay.read_at(0, SIZE) == original(range(90))[:kept].ljust(SIZE, b"\0")
