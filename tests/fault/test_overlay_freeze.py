"""Frozen, copying and passed-through disks when something fails: the guest's disk never pays for it."""

from __future__ import annotations

import os
import subprocess
import sys
from threading import Event
from typing import TYPE_CHECKING

import pytest

from tests.fault.test_overlay_disk import small_disk
from tests.support.disks import CHUNK, MemoryDisk
from tests.support.overlays import faulty
from xbfs.view.overlay import Layer, create_overlay, freeze_all, open_overlay
from xbfs_engine.core.errors import ChunkCorrupt, SessionBusy, StorageError, StorageFull
from xbfs_engine.core.limits import KIB
from xbfs_engine.core.runtime import SystemClock

if TYPE_CHECKING:
    from pathlib import Path

    from xbfs.view.overlay import Overlay

__all__ = ["small_disk"]

UNIT = 4096
BASE = MemoryDisk.full(4 * CHUNK)
CONTENT = BASE.read_at(0, BASE.size_bytes)


def hydrated(overlay: Overlay) -> None:
    overlay.hydrate(rate_bytes_s=None, clock=SystemClock(), stop=Event())


def test_a_freeze_that_has_no_room_ends_and_the_guest_writes_on(small_disk: Path) -> None:
    base = MemoryDisk.full(64 * CHUNK)
    with create_overlay(small_disk / "o", base, identity=b"") as overlay:
        overlay.write_at(0, [b"a" * 600 * KIB])
        (frozen,) = freeze_all([overlay])
        for at in range(0, 600 * KIB, 8 * KIB):
            overlay.write_at(at, [b"b" * 8 * KIB])
        for read in (
            lambda: frozen.read_at(0, 10),
            lambda: frozen.read_at(599 * KIB, 10),
            lambda: list(frozen.changed_extents()),
            lambda: list(frozen.extents(0, 10)),
        ):
            with pytest.raises(StorageFull, match="the frozen disk is lost"):
                read()
        assert frozen.read_cached(0, 10) is None
        assert overlay.read_at(0, 600 * KIB) == b"b" * 600 * KIB
        frozen.close()
        # Its room is free again, for the next try too.
        overlay.write_at(600 * KIB, [b"c" * 300 * KIB])
        (frozen,) = freeze_all([overlay])
        overlay.write_at(0, [b"d" * UNIT])
        assert frozen.read_at(0, UNIT + 1) == b"b" * (UNIT + 1)
        frozen.close()
        overlay.flush()


def test_what_a_freeze_has_saved_gives_way_to_the_guest(small_disk: Path) -> None:
    """The last room was taken by what was saved: a write of new units needs it more."""
    base = MemoryDisk.full(64 * CHUNK)
    with create_overlay(small_disk / "o", base, identity=b"") as overlay:
        overlay.write_at(0, [b"a" * 400 * KIB])
        (frozen,) = freeze_all([overlay])
        overlay.write_at(0, [b"b" * 400 * KIB])
        assert frozen.read_at(0, 400 * KIB) == b"a" * 400 * KIB
        overlay.write_at(1 << 20, [b"c" * 500 * KIB])
        with pytest.raises(StorageFull, match="the frozen disk is lost"):
            frozen.read_at(0, 10)
        assert overlay.read_at(1 << 20, 500 * KIB) == b"c" * 500 * KIB
        # Nothing gives way any more: the guest is told.
        with pytest.raises(StorageFull, match="data at"):
            overlay.write_at(2 << 20, [b"c" * 500 * KIB])
        frozen.close()


def test_bytes_that_can_not_be_read_break_the_freeze_and_not_the_write(tmp_path: Path) -> None:
    with faulty(tmp_path / "o", BASE) as (overlay, fails):
        overlay.write_at(0, [b"a" * UNIT])
        (frozen,) = freeze_all([overlay])
        fails["data"]["read_at"] = StorageError("medium error")
        overlay.write_at(0, [b"b" * UNIT])
        fails["data"].clear()
        assert overlay.read_at(0, UNIT) == b"b" * UNIT
        with pytest.raises(StorageError, match=r"the frozen disk is lost.*medium error"):
            frozen.read_at(CHUNK, 1)
        frozen.close()


def test_no_side_file_no_freeze(tmp_path: Path) -> None:
    with (
        faulty(tmp_path / "a", BASE) as (good, _),
        faulty(tmp_path / "b", BASE) as (bad, fails),
    ):
        fails["data"]["unnamed"] = StorageFull("no room")
        with pytest.raises(StorageFull):
            freeze_all([good, bad])
        fails["data"].clear()
        for frozen in freeze_all([bad, good]):
            frozen.close()


def test_a_disk_that_is_closed_is_frozen_no_more(tmp_path: Path) -> None:
    overlay = create_overlay(tmp_path / "o", BASE, identity=b"")
    (frozen,) = freeze_all([overlay])
    overlay.write_at(0, [b"x"])
    overlay.close()
    with pytest.raises(StorageError, match="closed"):
        frozen.read_at(0, 1)
    frozen.close()
    with pytest.raises(StorageError, match="closed"):
        frozen.read_at(0, 1)
    assert sorted(path.name for path in (tmp_path / "o").iterdir()) == ["data", "header", "map", "recent"]


KILLED = """
import os, signal, sys
from pathlib import Path
from tests.support.disks import CHUNK, MemoryDisk
from xbfs.view.overlay import create_overlay, freeze_all

overlay = create_overlay(Path(sys.argv[1]), MemoryDisk.full(4 * CHUNK), identity=b"")
overlay.write_at(0, [b"a" * CHUNK])
frozen = freeze_all([overlay])
overlay.write_at(0, [b"b" * CHUNK])
overlay.discard(CHUNK, CHUNK)
overlay.flush()
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_freeze_leaves_nothing_when_its_process_is_killed(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path or "." for path in sys.path)}
    done = subprocess.run([sys.executable, "-c", KILLED, tmp_path / "o"], env=environment, check=False)
    assert done.returncode == -9
    assert sorted(path.name for path in (tmp_path / "o").iterdir()) == ["data", "header", "map", "recent"]
    with open_overlay(tmp_path / "o", BASE, identity=b"") as overlay:
        assert overlay.read_at(0, 3 * CHUNK) == b"b" * CHUNK + bytes(CHUNK) + CONTENT[2 * CHUNK : 3 * CHUNK]
        freeze_all([overlay])[0].close()


def test_hydration_leaves_the_guest_its_room(small_disk: Path) -> None:
    with create_overlay(small_disk / "o", MemoryDisk.full(32 * CHUNK), identity=b"") as overlay:
        overlay.write_at(0, [b"x" * 960 * KIB])
        with pytest.raises(StorageFull, match="are left for what the guest writes"):
            hydrated(overlay)
        overlay.write_at(960 * KIB, [b"x" * 4 * UNIT])


def test_a_base_that_can_not_be_read_is_told_and_hydration_can_go_on(tmp_path: Path) -> None:
    class Failing(MemoryDisk):
        fails = True

        def read_at(self, offset: int, length: int) -> bytes:
            if self.fails:
                raise ChunkCorrupt("not what was written")
            return super().read_at(offset, length)

    base = Failing.full(BASE.size_bytes)
    with create_overlay(tmp_path / "o", base, identity=b"") as overlay:
        with pytest.raises(ChunkCorrupt):
            hydrated(overlay)
        assert not overlay.is_hydrated
        base.fails = False
        hydrated(overlay)
        assert overlay.is_hydrated
        base.fails = True
        assert overlay.read_at(0, BASE.size_bytes) == CONTENT


@pytest.mark.parametrize("deed", ["write", "zero", "pass"])
def test_a_full_disk_at_the_claim_of_a_copied_unit_changes_nothing(tmp_path: Path, deed: str) -> None:
    """The disk must know that copied units may be the guest's before their bytes change, at the next try too."""
    with faulty(tmp_path / "o", BASE) as (overlay, fails):
        hydrated(overlay)
        fails["header"]["write_at"] = StorageFull("no room")
        deeds = {
            "write": lambda: overlay.write_at(5, [b"x"]),
            "zero": lambda: overlay.discard(0, UNIT),
            "pass": overlay.passthrough_fd,
        }
        for _ in range(2):
            with pytest.raises(StorageFull):
                deeds[deed]()
            # A write that did not wait for the claim would be here.
            with pytest.raises(StorageFull):
                overlay.write_at(0, [b"x" * UNIT])
            assert (tmp_path / "o" / "data").read_bytes() == CONTENT
        assert list(overlay.changed_extents()) == []
        fails["header"].clear()
        deeds[deed]()
        overlay.flush()
        assert next(overlay.changed_extents()).layer is (Layer.ZERO if deed == "zero" else Layer.DATA)


def test_what_the_kernel_writes_by_itself_is_the_disk_and_survives_a_flush(tmp_path: Path) -> None:
    base = MemoryDisk.holding(BASE.size_bytes + 100, (0, 2))
    overlay = create_overlay(tmp_path / "o", base, identity=b"")
    assert overlay.passthrough_fd() is None
    overlay.write_at(CHUNK + 5, [b"x" * UNIT])
    overlay.discard(2 * CHUNK, 2 * UNIT)
    expected = bytearray(overlay.read_at(0, base.size_bytes))
    hydrated(overlay)
    (frozen,) = freeze_all([overlay])
    with pytest.raises(SessionBusy):
        overlay.passthrough_fd()
    frozen.close()
    fd = overlay.passthrough_fd()
    assert fd is not None
    assert os.pread(fd, 1 << 20, 0) == expected
    for at in (7, 2 * CHUNK + UNIT, 3 * CHUNK, base.size_bytes - 5):
        os.pwrite(fd, b"hello", at)
        expected[at : at + 5] = b"hello"
    overlay.discard(3 * CHUNK + UNIT, UNIT)
    os.pwrite(fd, b"again", 3 * CHUNK + UNIT)
    expected[3 * CHUNK + UNIT : 3 * CHUNK + 2 * UNIT] = b"again".ljust(UNIT, b"\0")
    for refused in (lambda: freeze_all([overlay]), lambda: overlay.resize(5)):
        with pytest.raises(SessionBusy):
            refused()
    assert overlay.read_at(0, 1 << 20) == expected
    assert [tuple(region) for region in overlay.changed_extents()] == [(0, base.size_bytes, Layer.DATA)]
    overlay.flush()
    overlay.end_passthrough()
    (frozen,) = freeze_all([overlay])
    overlay.resize(CHUNK)
    assert frozen.read_at(0, 1 << 20) == expected
    frozen.close()
    overlay.close()
    with open_overlay(tmp_path / "o", base, identity=b"") as again:
        assert again.read_at(0, 1 << 20) == expected[:CHUNK]
        assert again.is_hydrated
