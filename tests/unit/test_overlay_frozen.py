"""What a frozen disk costs, and what meets it just between two steps of a reader."""

from __future__ import annotations

import threading
import tracemalloc
from typing import TYPE_CHECKING

import pytest

from tests.support.disks import CHUNK, MemoryDisk
from tests.support.overlays import UNIT
from tests.unit.test_overlay import PAGE_OF_DISK, Hole
from xbfs.view.overlay import Layer, Region, create_overlay, freeze_all
from xbfs.view.overlay.files import make_files
from xbfs.view.overlay.opening import begin
from xbfs.view.overlay.recent import RecentMarks, boot_id
from xbfs_engine.core.limits import GIB, MIB
from xbfs_engine.core.runtime import SystemClock

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from xbfs.view.overlay.files import StateFile

BASE = MemoryDisk.full(4 * CHUNK)
CONTENT = BASE.read_at(0, BASE.size_bytes)


def test_pages_of_the_map_that_are_cut_off_are_frozen(tmp_path: Path) -> None:
    with create_overlay(tmp_path / "o", Hole(5 * PAGE_OF_DISK), identity=b"") as overlay:
        changed = []
        for page in (0, 2, 3):
            overlay.write_at(page * PAGE_OF_DISK + 2 * UNIT, [b"there"])
            changed.append(Region(page * PAGE_OF_DISK + 2 * UNIT, UNIT, Layer.DATA))
        overlay.flush()
        (frozen,) = freeze_all([overlay])
        overlay.resize(PAGE_OF_DISK)
        overlay.resize(5 * PAGE_OF_DISK)
        overlay.write_at(4 * PAGE_OF_DISK, [b"new"])
        assert list(frozen.changed_extents()) == changed
        assert frozen.read_at(3 * PAGE_OF_DISK + 2 * UNIT, 6) == b"there\0"
        frozen.close()


def test_a_frozen_disk_costs_room_for_what_is_overwritten_and_little_memory(tmp_path: Path) -> None:
    """More pages of the map change than may be kept in memory."""
    size = 40 * GIB
    with create_overlay(tmp_path / "o", Hole(size), identity=b"") as overlay:
        places = range(5 * UNIT, size, PAGE_OF_DISK)
        for at in places:
            overlay.write_at(at, [b"old"])
        (frozen,) = freeze_all([overlay])
        tracemalloc.start()
        overlay.write_zeroes(0, size)
        assert tracemalloc.get_traced_memory()[1] < 48 * MIB
        tracemalloc.stop()
        assert list(frozen.changed_extents()) == [Region(at, UNIT, Layer.DATA) for at in places]
        assert all(frozen.read_at(at - 1, 5) == b"\0old\0" for at in places)
        assert list(overlay.changed_extents()) == [Region(0, size, Layer.ZERO)]
        frozen.close()


class Between:
    """A data file that does something just after it was read from memory."""

    def __init__(self, file: StateFile) -> None:
        self._file = file
        self.then: Callable[[], None] = lambda: None

    def __getattr__(self, name: str) -> object:
        return getattr(self._file, name)

    def read_now(self, offset: int, length: int) -> bytes | None:
        self.then()
        return self._file.read_now(offset, length)


def test_a_write_between_the_state_and_the_bytes_is_not_in_a_cached_read(tmp_path: Path) -> None:
    files = make_files(tmp_path / "o")
    data = Between(files.data)
    with begin(files._replace(data=data), BASE, RecentMarks(files.recent, boot_id()), identity=b"") as overlay:
        overlay.write_at(0, [b"a" * UNIT])
        (frozen,) = freeze_all([overlay])
        assert frozen.read_cached(0, UNIT) in (None, b"a" * UNIT)
        data.then = lambda: overlay.write_at(0, [b"b" * UNIT])
        assert frozen.read_cached(0, UNIT) is None
        data.then = lambda: None
        assert frozen.read_at(0, UNIT) == b"a" * UNIT
        frozen.close()


@pytest.mark.parametrize("name", ["states", "states_cached"])
def test_hydration_that_ends_between_the_states_and_the_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """What was absent when the reader asked has been copied since: it is no zero."""
    with create_overlay(tmp_path / "o", BASE, identity=b"") as overlay:
        states = getattr(overlay._state.map, name)

        def states_and_hydrate(first: int, last: int) -> bytes:
            monkeypatch.undo()
            found: bytes = states(first, last)
            overlay.hydrate(rate_bytes_s=None, clock=SystemClock(), stop=threading.Event())
            return found

        overlay.read_at(0, 1)
        monkeypatch.setattr(overlay._state.map, name, states_and_hydrate)
        read = overlay.read_at if name == "states" else overlay.read_cached
        assert read(0, CHUNK) == CONTENT[:CHUNK]
        assert overlay.is_hydrated
