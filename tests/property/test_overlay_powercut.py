"""Power cuts and SIGKILLs in the middle of anything: what a disk kept of what was not synced may be any part of it.

The files are models: a file has what programs see, what is durable, and the operations between the two. A cut comes
before any operation on any file; then, file by file, each sector of each operation since the last sync is kept or lost;
those of the header may be torn as well. Each sector of the overlay that is opened again must hold what it held at the
last flush that returned, or something younger; if there were only SIGKILLs, what it held when the last change returned.
What it takes for unchanged must be the base's, and once it says that it
needs the base no more, the base is dead. Disks are frozen and thawed in between: nothing of that survives, or matters.
"""

from __future__ import annotations

import random  # noqa: TID251 - seeded
from contextlib import suppress
from itertools import product
from threading import Event
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.disks import CHUNK, MemoryDisk
from tests.support.power import SECTOR, ModelFile, Power, PowerCut
from xbfs.view.base import Extent
from xbfs.view.overlay import FrozenOverlay, Layer, freeze_all
from xbfs.view.overlay.files import StateFiles
from xbfs.view.overlay.opening import begin, resume
from xbfs.view.overlay.recent import RecentMarks
from xbfs.view.overlay.unitmap import UnitMap
from xbfs_engine.core.errors import BlobNotFound, XbfsError
from xbfs_engine.core.runtime import SystemClock

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from xbfs.view.overlay import Overlay

UNIT = 4096
SIZE = CHUNK + 3 * UNIT + 3 * SECTOR
SIZE_MAX = 2 * CHUNK
HOLE, ZEROED = range(4 * UNIT, 6 * UNIT), range(9 * UNIT, 10 * UNIT)


class Base(MemoryDisk):
    """A disk with two units that are a hole, one that is full of zeros, and an end."""

    def __init__(self) -> None:
        full = MemoryDisk.full(SIZE)
        chunks = {number: bytearray(full.read_at(number * CHUNK, CHUNK).ljust(CHUNK, b"\0")) for number in range(2)}
        for gap in (HOLE, ZEROED):
            chunks[0][gap.start : gap.stop] = bytes(len(gap))
        super().__init__(SIZE, {number: bytes(chunk) for number, chunk in chunks.items()})
        self.is_dead = False

    def read_at(self, offset: int, length: int) -> bytes:
        assert not self.is_dead, "read after the overlay was hydrated"
        return super().read_at(offset, length)

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        assert not self.is_dead, "asked after the overlay was hydrated"
        end = min(offset + length, SIZE)
        for low, high, is_data in ((0, HOLE.start, True), (HOLE.start, HOLE.stop, False), (HOLE.stop, SIZE, True)):
            if max(low, offset) < min(high, end):
                yield Extent(max(low, offset), min(high, end) - max(low, offset), is_data)


CONTENT = Base().read_at(0, SIZE)


class Guest:
    """Does things to an overlay, and knows what each sector may hold if the power goes now."""

    def __init__(self, chance: random.Random, *, lying: str = "") -> None:
        self.chance = chance
        self.power = Power()
        self.lying = lying
        self.files = StateFiles(*[ModelFile(self.power) for _ in StateFiles._fields])
        self.files.data.makes_holes = chance.random() < 0.8
        self.versions = [CONTENT]
        self.base = Base()
        # The last version that was acknowledged, and the oldest that the next opening may show.
        self.acknowledged = self.oldest = 0
        self.boots = 0
        self.overlay: Overlay | None = None
        self.frozen: tuple[FrozenOverlay, bytes] | None = None

    def recent(self) -> RecentMarks:
        """Of this boot; so few that writers have to flush."""
        return RecentMarks(self.files.recent, self.boots.to_bytes(16, "little"), records=8)

    def acknowledge(self, versions: list[bytes]) -> None:
        """The last of these was reached, and each of them may be there after a power cut."""
        self.versions = versions
        self.acknowledged = len(versions) - 1

    def sectors(self, below: int) -> tuple[int, int]:
        offset = self.chance.randrange(below // SECTOR + 1)
        length = self.chance.choice((1, 3, 8, 8, 16, 24, 80))
        return offset * SECTOR, min(offset + length, below // SECTOR) * SECTOR

    def live(self, deeds: Sequence[str]) -> None:
        """Open or create the overlay and do ``deeds``; raises PowerCut when the power goes."""
        if self.overlay is None:
            try:
                self.overlay = resume(self.files, self.base, self.recent(), identity=b"i")
            except BlobNotFound:
                self.overlay = begin(self.files, self.base, self.recent(), identity=b"i")
                for name, file in self.files._asdict().items():
                    file.forgets, file.tears = name == self.lying, 0.3 * (name == "header")
        self.check(self.overlay)
        for deed in deeds:
            getattr(self, deed)(self.overlay)
            self.acknowledge(self.versions)
            assert self.overlay.read_at(0, SIZE_MAX) == self.versions[-1]
            if self.frozen is not None:
                assert self.frozen[0].read_at(0, SIZE_MAX) == self.frozen[1]

    def check(self, overlay: Overlay) -> None:
        """After opening: an allowed state, which is durable from now on."""
        self.base.is_dead = overlay.is_hydrated
        found = overlay.read_at(0, SIZE_MAX)
        for offset, length, layer in overlay.regions(0, SIZE_MAX):
            assert layer is not Layer.BASE or found[offset : offset + length] == CONTENT[offset : offset + length]
        for extent in overlay.extents(0, SIZE_MAX):
            assert extent.is_data or not any(found[extent.offset : extent.offset + extent.length])
        allowed = [np.frombuffer(one, np.uint8) for one in self.versions[self.oldest :] if len(one) == len(found)]
        assert allowed, f"{len(found)} bytes"
        # A size that is no whole number of sectors: the rest is compared as a sector of its own.
        for at in range(0, len(found), SECTOR):
            sector = np.frombuffer(found, np.uint8)[at : at + SECTOR]
            assert any(np.array_equal(sector, version[at : at + SECTOR]) for version in allowed), f"sector at {at}"
        self.acknowledge([found])
        self.acknowledged = self.oldest = 0

    def write(self, overlay: Overlay) -> None:
        start, end = self.sectors(overlay.size_bytes)
        data = self.chance.randbytes(end - start)
        self.change(start, data)
        overlay.write_at(start, [data])

    def rewrite(self, overlay: Overlay) -> None:
        """The same unit in many ways."""
        for deed in self.chance.choices((self.write, self.zero), k=3):
            state = self.chance.getstate()
            self.chance.seed(1)
            deed(overlay)
            self.chance.setstate(state)
            self.chance.random()

    def zero(self, overlay: Overlay) -> None:
        start, end = self.sectors(overlay.size_bytes)
        self.change(start, bytes(end - start))
        overlay.discard(start, end - start)

    def change(self, start: int, data: bytes) -> None:
        old = self.versions[-1]
        self.versions.append(old[:start] + data + old[start + len(data) :])

    def flush(self, overlay: Overlay) -> None:
        overlay.flush()
        self.acknowledge(self.versions[-1:])

    def resize(self, overlay: Overlay) -> None:
        old = self.versions
        size = self.chance.randrange(SIZE_MAX)
        shown = [version[:size].ljust(size, b"\0") for version in old]
        self.versions = old + shown
        overlay.resize(size)
        self.acknowledge(shown[-1:] if size < len(old[-1]) else shown)

    def regrow(self, overlay: Overlay) -> None:
        """Shrink, and be as big as before at once."""
        size = overlay.size_bytes
        self.resize(overlay)
        old = self.versions
        shown = [version[:size].ljust(size, b"\0") for version in old]
        self.versions = old + shown
        overlay.resize(size)
        self.acknowledge(shown[-1:] if size < len(old[-1]) else shown)

    def hydrate(self, overlay: Overlay) -> None:
        overlay.hydrate(rate_bytes_s=None, clock=SystemClock(), stop=Event())
        assert overlay.is_hydrated
        if self.frozen is None:
            self.base.is_dead = True

    def freeze(self, overlay: Overlay) -> None:
        if self.frozen is None:
            self.base.is_dead = False
            self.frozen = freeze_all([overlay])[0], self.versions[-1]
        else:
            self.frozen[0].close()
            self.frozen = None
            self.base.is_dead = overlay.is_hydrated

    def pass_through(self, overlay: Overlay) -> None:
        """The kernel writes the data file by itself for a while."""
        if self.frozen is not None or overlay.passthrough_fd() is None:
            return
        for _ in range(3):
            start, end = self.sectors(overlay.size_bytes)
            data = self.chance.randbytes(end - start)
            self.change(start, data)
            self.files.data.write_at(start, [data])
            self.chance.choice((self.zero, self.flush, self.write))(overlay)
        overlay.end_passthrough()

    def lose_power(self, **kept: float) -> None:
        """``kept``: how much each file keeps of what was not synced."""
        self.power.left = self.frozen = None
        for name, file in self.files._asdict().items():
            file.cut(self.chance, kept.get(name, self.chance.choice((0.0, 0.5, 1.0))))
        self.overlay = None
        self.boots += 1
        self.acknowledged = self.oldest = 0

    def die(self) -> None:
        """SIGKILL: what was not synced is in the kernel's memory still."""
        self.power.left = self.frozen = None
        self.overlay = None
        self.oldest = self.acknowledged


Life = tuple[list[str], int, bool]
deeds = st.lists(
    st.sampled_from(
        ["write", "rewrite", "zero", "flush", "resize", "regrow", "flush", "write", "hydrate", "freeze", "pass_through"]
    ),
    max_size=9,
)
lives = st.lists(
    st.tuples(deeds, st.one_of(st.integers(0, 250), st.integers(0, 1000)), st.sampled_from([True, True, False])),
    min_size=1,
    max_size=4,
)


def history(lived: list[Life], seed: int, *, lying: str = "") -> None:
    guest = Guest(random.Random(seed), lying=lying)
    for what, until, is_cut in lived:
        guest.power.left = until
        with suppress(PowerCut):
            guest.live(what)
        if is_cut:
            guest.lose_power()
        else:
            guest.die()
    guest.live([])


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(lives, st.integers(0, 1 << 32))
def test_every_sector_is_as_flushed_or_younger(lived: list[Life], seed: int) -> None:
    history(lived, seed)


@pytest.mark.parametrize("lying", ["header", "data", "map"])
def test_the_model_finds_out_a_disk_that_does_not_sync(lying: str) -> None:
    """Proof that the test above can fail: any one file that is not synced when it should be is found out."""

    def all_survive() -> None:
        for seed in range(300):
            chance = random.Random(seed)
            lived = [(chance.choices(["write", "zero", "flush", "regrow"], k=8), 100_000, True) for _ in range(2)]
            history(lived, seed, lying=lying)

    with pytest.raises((AssertionError, XbfsError)):
        all_survive()


def test_what_is_written_while_a_flush_syncs_the_data_is_not_told_of_by_that_flush() -> None:
    guest = Guest(random.Random(1))
    guest.live([])
    overlay = guest.overlay
    assert overlay is not None
    overlay.write_at(0, [b"a" * UNIT])
    guest.files.data.during_sync = lambda: overlay.write_at(UNIT, [b"b" * UNIT])
    overlay.flush()
    guest.lose_power(data=0.0, map=1.0)
    again = resume(guest.files, guest.base, guest.recent(), identity=b"i")
    assert again.read_at(0, SIZE) == b"a" * UNIT + CONTENT[UNIT:]


def test_a_flush_between_the_mark_of_a_unit_and_the_acknowledgement_has_its_data(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    guest = Guest(random.Random(1))
    guest.live([])
    overlay = guest.overlay
    assert overlay is not None
    mark = UnitMap.mark

    def mark_and_flush(self: UnitMap, first: int, last: int, state: int) -> None:
        mark(self, first, last, state)
        overlay.flush()

    monkeypatch.setattr(UnitMap, "mark", mark_and_flush)
    overlay.write_at(0, [b"a" * UNIT])
    guest.lose_power(data=0.0, map=0.0)
    assert resume(guest.files, guest.base, guest.recent(), identity=b"i").read_at(0, UNIT) == b"a" * UNIT


@pytest.mark.parametrize("size", [5 * UNIT, SIZE_MAX])
@pytest.mark.parametrize("is_killed", [False, True])
def test_a_header_that_is_torn_wherever_the_power_goes_can_be_read(size: int, is_killed: bool) -> None:
    """After a cut or a kill at any place: what that left must not be all that the next cut harms."""
    for first, second in product(range(9), range(9)):
        guest = Guest(random.Random(1))
        guest.live(["write", "flush"])
        guest.files.header.tears = 1.0
        for left, wanted, is_kill in ((first, size, is_killed), (second, SIZE - UNIT, False)):
            guest.power.left = left
            with suppress(PowerCut):
                guest.overlay = guest.overlay or resume(guest.files, guest.base, guest.recent(), identity=b"i")
                guest.overlay.resize(wanted)
            if is_kill:
                guest.die()
            else:
                guest.lose_power(header=1.0)
        assert resume(guest.files, guest.base, guest.recent(), identity=b"i").size_bytes in (SIZE, size, SIZE - UNIT)
