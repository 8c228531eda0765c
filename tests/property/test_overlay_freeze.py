"""Frozen disks against plain bytes: whatever the guest does afterwards, and whoever races with whom."""

from __future__ import annotations

import random  # noqa: TID251 - seeded
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import precondition, rule

from tests.property.test_overlay_machine import UNIT, OverlayMachine, lengths, offsets
from tests.support.disks import CHUNK, MemoryDisk
from xbfs.view.overlay import FrozenOverlay, Layer, create_overlay, freeze_all
from xbfs_engine.core.errors import SessionBusy
from xbfs_engine.core.runtime import SystemClock

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from xbfs.view.overlay import Overlay


class FreezeMachine(OverlayMachine):
    """The machine of the overlay, which may be frozen while all of that happens to it."""

    frozen: FrozenOverlay | None = None

    @precondition(lambda self: self.frozen is None)
    @rule()
    def freeze(self) -> None:
        (self.frozen,) = freeze_all([self.overlay])
        self.kept = bytes(self.content)
        self.changed = [tuple(region) for region in self.overlay.changed_extents()]

    @precondition(lambda self: self.frozen is not None)
    @rule(offset=offsets, length=lengths)
    def read_frozen(self, offset: int, length: int) -> None:
        assert self.frozen is not None
        expected = self.kept[offset : offset + length]
        assert self.frozen.read_at(offset, length) == expected
        assert self.frozen.read_cached(offset, length) in (None, expected)
        at = offset
        for extent in self.frozen.extents(offset, length):
            assert extent.offset == at
            assert extent.is_data or not any(self.kept[at : at + extent.length])
            at += extent.length
        assert at == max(offset, min(offset + length, len(self.kept)))

    @precondition(lambda self: self.frozen is not None)
    @rule()
    def thaw(self) -> None:
        self.check_frozen()
        assert self.frozen is not None
        self.frozen.close()
        self.frozen = None

    @rule()
    def reopen(self) -> None:
        if self.frozen is not None:
            self.thaw()
        super().reopen()

    def check_frozen(self) -> None:
        assert self.frozen is not None
        assert self.frozen.size_bytes == len(self.kept)
        assert self.frozen.read_at(0, 1 << 40) == self.kept
        assert [tuple(region) for region in self.frozen.changed_extents()] == self.changed

    def teardown(self) -> None:
        try:
            if self.frozen is not None:
                self.thaw()
        finally:
            super().teardown()


TestFreezeMachine = FreezeMachine.TestCase
TestFreezeMachine.settings = settings(
    max_examples=60, stateful_step_count=30, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)

SIZE = 4 * CHUNK
SECTOR = 512
STAMP = b"stamp".ljust(8, b".")


@pytest.fixture
def disks(tmp_path: Path) -> Iterator[list[Overlay]]:
    base = MemoryDisk.full(SIZE)
    made = [create_overlay(tmp_path / str(number), base, identity=b"") for number in range(2)]
    yield made
    for overlay in made:
        overlay.close()


def together(*works: Callable[[], None]) -> None:
    with ThreadPoolExecutor(len(works)) as pool:
        for future in [pool.submit(work) for work in works]:
            future.result(timeout=60)


@pytest.mark.parametrize("seed", range(3))
def test_one_moment_for_all_disks(disks: list[Overlay], seed: int) -> None:
    """A guest of two threads numbers its writes, each acknowledged before the next is begun, now on one disk, now on
    the other: what is frozen of a thread is a beginning of its row, with nothing missing in between."""
    ended = threading.Event()
    acknowledged = [0, 0]
    places = [[(disk, at) for disk in range(2) for at in range(lane * SECTOR, SIZE, 2 * SECTOR)] for lane in range(2)]
    rows: list[list[tuple[int, int]]] = [[], []]

    def guest(lane: int) -> None:
        chance = random.Random(seed * 2 + lane)
        while not ended.is_set():
            disk, at = chance.choice(places[lane])
            number = len(rows[lane]) + 1
            rows[lane].append((disk, at))
            if number % 97 == 0:
                disks[disk].flush()
            disks[disk].write_at(at, [STAMP + number.to_bytes(8, "little") * (SECTOR // 8 - 1)])
            acknowledged[lane] = number

    def committer() -> None:
        try:
            for _ in range(6):
                target = sum(acknowledged) + 100
                while sum(acknowledged) < target:
                    pass
                least = list(acknowledged)
                frozen = freeze_all(disks)
                most = [len(row) for row in rows]
                first = [disk.read_at(0, SIZE) for disk in frozen]
                check(first, least, most)
                assert [disk.read_at(0, SIZE) for disk in frozen] == first
                for disk, content in zip(frozen, first, strict=True):
                    changed = b"".join(content[region.offset :][: region.length] for region in disk.changed_extents())
                    assert changed.count(STAMP) == content.count(STAMP)
                    disk.close()
        finally:
            ended.set()

    def check(content: list[bytes], least: list[int], most: list[int]) -> None:
        for lane in range(2):
            found = {}
            for disk, at in places[lane]:
                sector = content[disk][at : at + SECTOR]
                if sector.startswith(STAMP):
                    assert sector[8:16] * (SECTOR // 8 - 1) == sector[8:], "torn"
                    found[disk, at] = int.from_bytes(sector[8:16], "little")
            last = max(found.values(), default=0)
            assert least[lane] <= last <= most[lane]
            expected = {place: number for number, place in enumerate(rows[lane][:last], 1)}
            assert found == expected

    together(lambda: guest(0), lambda: guest(1), committer)


@pytest.mark.parametrize("seed", range(3))
def test_frozen_bytes_hold_against_all_that_writers_do(disks: list[Overlay], seed: int) -> None:
    """Readers of a frozen disk race with writes, discards, shrinks and growth of the same units."""
    chance = random.Random(seed)
    overlay = disks[0]
    for _ in range(40):
        overlay.write_at(chance.randrange(SIZE - 9000), [chance.randbytes(chance.randrange(9000))])
    overlay.discard(UNIT * chance.randrange(20), 7 * UNIT)
    overlay.resize(SIZE - 1234)
    expected = overlay.read_at(0, SIZE)
    changed = list(overlay.changed_extents())
    ended = threading.Event()
    (frozen,) = freeze_all([overlay])

    def writer(number: int) -> None:
        mine = random.Random(number)
        try:
            for _ in range(150):
                at = mine.randrange(SIZE // 2)
                match mine.randrange(5):
                    case 0:
                        overlay.discard(at, mine.randrange(SIZE // 4))
                    case 1 if number == 0:
                        overlay.resize(SIZE // 2 + SIZE // 4 + mine.randrange(SIZE // 2))
                    case _:
                        overlay.write_at(at, [mine.randbytes(mine.randrange(9000))])
        finally:
            ended.set()

    def reader(number: int) -> None:
        mine = random.Random(number)
        while not ended.is_set():
            at, length = mine.randrange(SIZE), mine.randrange(3 * CHUNK)
            assert frozen.read_at(at, length) == expected[at : at + length]
            cached = frozen.read_cached(at, 5000)
            assert cached is None or bytes(cached) == expected[at : at + 5000]
            assert list(frozen.changed_extents()) == changed
            for extent in frozen.extents(0, SIZE):
                assert extent.is_data or not any(expected[extent.offset :][: extent.length])

    together(lambda: writer(0), lambda: writer(1), lambda: reader(2), lambda: reader(3))
    assert frozen.read_at(0, SIZE) == expected
    assert [region for region in frozen.changed_extents() if region.layer is Layer.BASE] == []
    frozen.close()


def test_one_freeze_at_a_time_and_all_or_none(disks: list[Overlay]) -> None:
    (frozen,) = freeze_all(disks[1:])
    with pytest.raises(SessionBusy):
        freeze_all(disks)
    # The other disk was not frozen by the try.
    (other,) = freeze_all(disks[:1])
    other.close()
    frozen.close()
    frozen.close()
    for disk in freeze_all(disks):
        disk.close()


def test_a_cut_unit_that_is_copied_later_is_frozen_as_it_was(disks: list[Overlay]) -> None:
    """The base ends earlier for the disk than for what was frozen, and the disk alone needs it no more."""
    overlay = disks[0]
    (frozen,) = freeze_all([overlay])
    overlay.resize(CHUNK + 100)
    overlay.resize(SIZE)
    overlay.hydrate(rate_bytes_s=None, clock=SystemClock(), stop=threading.Event())
    assert overlay.is_hydrated
    assert frozen.read_at(0, SIZE) == MemoryDisk.full(SIZE).read_at(0, SIZE)
    assert list(frozen.changed_extents()) == []
    assert all(extent.is_data for extent in frozen.extents(0, SIZE))
    frozen.close()
