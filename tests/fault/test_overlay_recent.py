"""Marks that a killed process left, when the disk fails or somebody else wrote them: never wrong bytes."""

from __future__ import annotations

import struct
from threading import Event
from typing import TYPE_CHECKING

import pytest

from tests.support.disks import CHUNK, MemoryDisk
from tests.support.overlays import FaultyFile, faulty
from xbfs.view.overlay import open_overlay
from xbfs.view.overlay.files import existing_files, make_files
from xbfs.view.overlay.opening import begin, resume
from xbfs.view.overlay.recent import RecentMarks, boot_id
from xbfs_engine.core.errors import StorageError, StorageFull
from xbfs_engine.core.runtime import SystemClock

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from typing_extensions import Buffer

    from xbfs.view.overlay.files import StateFile

UNIT = 4096
BASE = MemoryDisk.full(4 * CHUNK)
CONTENT = BASE.read_at(0, BASE.size_bytes)


def test_what_a_failed_sync_lost_is_not_shown_as_written(tmp_path: Path) -> None:
    with faulty(tmp_path / "o", BASE) as (overlay, fails):
        overlay.write_at(0, [b"x" * UNIT])
        fails["data"]["sync"] = StorageError("medium error")
        with pytest.raises(StorageError, match="medium error"):
            overlay.flush()
    # The process dies, and the kernel has dropped the page that it could not write.
    with (tmp_path / "o" / "data").open("r+b") as data:
        data.write(bytes(UNIT))
    with open_overlay(tmp_path / "o", BASE, identity=b"") as again:
        assert again.read_at(0, UNIT) == CONTENT[:UNIT]
        again.write_at(0, [b"y"])


def test_marks_that_another_process_left_are_lost_if_their_bytes_can_not_be_synced(tmp_path: Path) -> None:
    with faulty(tmp_path / "o", BASE) as (overlay, _):
        overlay.write_at(0, [b"x" * UNIT])
    real = existing_files(tmp_path / "o")
    files = real._replace(data=FaultyFile(real.data, {"sync": StorageError("medium error")}))
    with pytest.raises(StorageError, match="medium error"):
        resume(files, BASE, RecentMarks(files.recent, boot_id()), identity=b"")
    real.close()
    with (tmp_path / "o" / "data").open("r+b") as data:
        data.write(bytes(UNIT))
    with open_overlay(tmp_path / "o", BASE, identity=b"") as again:
        assert again.read_at(0, UNIT) == CONTENT[:UNIT]


@pytest.mark.parametrize("content", [b"", b"\0" * 8192, b"\xff" * (1 << 20), b"x" * 4097, "another boot"])
def test_recent_marks_of_nobody_are_none(tmp_path: Path, content: bytes | str) -> None:
    with faulty(tmp_path / "o", BASE) as (overlay, _):
        overlay.write_at(0, [b"x" * UNIT])
    recent = tmp_path / "o" / "recent"
    if isinstance(content, str):
        recent.write_bytes(recent.read_bytes().replace(boot_id(), bytes(16)))
    else:
        recent.write_bytes(content)
    for _ in range(2):
        with open_overlay(tmp_path / "o", BASE, identity=b"") as again:
            assert again.read_at(0, 4 * CHUNK) == CONTENT
            again.write_at(UNIT, [CONTENT[UNIT : 2 * UNIT]])


def test_marks_of_hostile_places_are_cut_to_the_disk(tmp_path: Path) -> None:
    """Whoever can write there can write the data, too; but nothing may be read behind the end, or for ever."""
    with faulty(tmp_path / "o", BASE) as (overlay, _):
        overlay.write_at(0, [b"x" * UNIT])
    with (tmp_path / "o" / "recent").open("r+b") as file:
        for number, first in enumerate(((1 << 42) - 1, len(CONTENT) // UNIT - 1), 2):
            file.seek(4096 + 32 * number)
            file.write(boot_id() + struct.pack("<QQ", number, first << 22 | (1 << 22) - 3))
    with open_overlay(tmp_path / "o", BASE, identity=b"") as again:
        assert again.size_bytes == len(CONTENT)
        assert again.data_bytes == 2 * UNIT
        assert again.read_at(0, len(CONTENT)) == b"x" * UNIT + CONTENT[UNIT:-UNIT] + bytes(UNIT)


@pytest.mark.parametrize("is_same_boot", [True, False])
def test_what_was_copied_is_still_a_copy_unless_marks_are_lost(tmp_path: Path, is_same_boot: bool) -> None:
    with faulty(tmp_path / "o", BASE) as (overlay, _):
        overlay.hydrate(rate_bytes_s=None, clock=SystemClock(), stop=Event())
        overlay.write_at(UNIT, [b"x" * UNIT])
    if not is_same_boot:
        recent = tmp_path / "o" / "recent"
        recent.write_bytes(recent.read_bytes().replace(boot_id(), bytes(16)))
    with open_overlay(tmp_path / "o", BASE, identity=b"") as again:
        assert again.read_at(UNIT, UNIT) == b"x" * UNIT
        assert again.data_bytes == (UNIT if is_same_boot else len(CONTENT))
        assert again.data_bytes + again.hydrated_bytes == len(CONTENT)
    with open_overlay(tmp_path / "o", BASE, identity=b"") as again:
        assert again.data_bytes == (UNIT if is_same_boot else len(CONTENT))


class NoRoomForRecords:
    """The file of recent marks on a disk that is full: its head has its place already."""

    def __init__(self, file: StateFile) -> None:
        self._file = file
        self.is_full = False

    def write_at(self, offset: int, buffers: Sequence[Buffer]) -> None:
        if self.is_full and offset:
            raise StorageFull("full")
        self._file.write_at(offset, buffers)

    def __getattr__(self, name: str) -> object:
        return getattr(self._file, name)


def test_what_was_copied_and_then_written_counts_as_written_without_its_mark(tmp_path: Path) -> None:
    real = make_files(tmp_path / "o")
    recent = NoRoomForRecords(real.recent)
    overlay = begin(real, BASE, RecentMarks(recent, boot_id()), identity=b"")
    overlay.hydrate(rate_bytes_s=None, clock=SystemClock(), stop=Event())
    recent.is_full = True
    overlay.write_at(UNIT, [b"x" * UNIT])
    real.close()
    with open_overlay(tmp_path / "o", BASE, identity=b"") as again:
        assert again.read_at(UNIT, UNIT) == b"x" * UNIT
        changed = [(region.offset, region.offset + region.length) for region in again.changed_extents()]
        assert any(start <= UNIT and stop >= 2 * UNIT for start, stop in changed)
