"""What an overlay shows, what it keeps where, and what it costs: against its document and against the file system."""

from __future__ import annotations

import hashlib
import os
import struct
import tracemalloc
from threading import Event
from typing import TYPE_CHECKING

import pytest

from tests.support.disks import CHUNK, MemoryDisk
from xbfs.view.base import Extent
from xbfs.view.overlay import (
    IDENTITY_BYTES_MAX,
    Header,
    Layer,
    Overlay,
    Region,
    create_overlay,
    open_overlay,
    read_header,
)
from xbfs_engine.core.errors import BlobNotFound, OverlayMismatch, TargetExists, UsageError
from xbfs_engine.core.limits import DISK_SIZE_MAX, GIB, MIB
from xbfs_engine.core.runtime import SystemClock

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

UNIT = 4096
SIZE = 4 * CHUNK + 1000
IDENTITY = b"point 7, disk 0"
PAGE_OF_DISK = 64 * MIB


@pytest.fixture
def base() -> MemoryDisk:
    return MemoryDisk.holding(SIZE, (0, 1, 4))


@pytest.fixture
def overlay(tmp_path: Path, base: MemoryDisk) -> Iterator[Overlay]:
    with create_overlay(tmp_path / "o", base, identity=IDENTITY) as made:
        yield made


class Hole:
    """A base of any size that is all hole, and says how often it was asked."""

    def __init__(self, size_bytes: int) -> None:
        self.size_bytes = size_bytes

    def read_at(self, offset: int, length: int) -> bytes:
        return bytes(max(0, min(length, self.size_bytes - offset)))

    def read_cached(self, offset: int, length: int) -> bytes:
        return self.read_at(offset, length)

    def parts_at(self, offset: int, length: int) -> list[bytes]:
        return [self.read_at(offset, length)]

    def parts_cached(self, offset: int, length: int) -> list[bytes]:
        return [self.read_at(offset, length)]

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        yield Extent(offset, min(length, self.size_bytes - offset), False)


def test_a_new_overlay_shows_the_base_and_takes_no_room(overlay: Overlay, base: MemoryDisk, tmp_path: Path) -> None:
    assert overlay.read_at(0, 1 << 40) == base.read_at(0, SIZE)
    assert list(overlay.extents(0, SIZE)) == list(base.extents(0, SIZE))
    assert list(overlay.regions(0, SIZE)) == [Region(0, SIZE, Layer.BASE)]
    assert list(overlay.changed_extents()) == []
    assert overlay.dirty_bytes == 0
    assert (tmp_path / "o" / "data").stat().st_blocks == 0


def test_regions_and_extents_of_all_layers(overlay: Overlay) -> None:
    overlay.write_at(2 * UNIT + 5, [b"x"])
    overlay.write_at(2 * CHUNK, [bytes(UNIT), b"y"])
    overlay.discard(CHUNK, 2 * UNIT)
    overlay.write_zeroes(SIZE - 1000, 1000)
    assert list(overlay.changed_extents()) == [
        Region(2 * UNIT, UNIT, Layer.DATA),
        Region(CHUNK, 2 * UNIT, Layer.ZERO),
        Region(2 * CHUNK, 2 * UNIT, Layer.DATA),
        Region(SIZE - 1000, 1000, Layer.ZERO),
    ]
    assert [tuple(extent) for extent in overlay.extents(UNIT, 1 << 40)] == [
        (UNIT, CHUNK - UNIT, True),
        (CHUNK, 2 * UNIT, False),
        (CHUNK + 2 * UNIT, CHUNK, True),
        (2 * CHUNK + 2 * UNIT, 2 * CHUNK + 1000 - 2 * UNIT, False),
    ]
    assert overlay.data_bytes == 3 * UNIT
    assert overlay.dirty_bytes == 6 * UNIT


def test_a_discard_gives_the_room_back(overlay: Overlay, tmp_path: Path) -> None:
    overlay.write_at(0, [b"x" * MIB][:1] if SIZE >= MIB else [b"x" * SIZE])
    overlay.flush()
    before = (tmp_path / "o" / "data").stat().st_blocks * 512
    overlay.discard(100, SIZE - 200)
    overlay.flush()
    assert (tmp_path / "o" / "data").stat().st_blocks * 512 <= 2 * UNIT < before
    assert overlay.read_at(0, SIZE) == b"x" * 100 + bytes(SIZE - 200) + b"x" * 100


def test_what_is_cut_off_never_comes_back(overlay: Overlay, base: MemoryDisk, tmp_path: Path) -> None:
    overlay.write_at(2 * CHUNK, [b"x" * CHUNK])
    overlay.resize(2 * CHUNK + 10)
    overlay.resize(CHUNK + 10)
    overlay.resize(SIZE + CHUNK)
    kept = base.read_at(0, CHUNK + 10)
    assert overlay.read_at(0, 1 << 40) == kept.ljust(SIZE + CHUNK, b"\0")
    assert list(overlay.changed_extents()) == [Region(CHUNK + 10, SIZE - 10, Layer.ZERO)]
    overlay.write_at(CHUNK + 20, [b"y"])
    overlay.close()
    with open_overlay(tmp_path / "o", base, identity=IDENTITY) as again:
        assert again.read_at(0, 1 << 40) == (kept + bytes(10) + b"y").ljust(SIZE + CHUNK, b"\0")


def test_pages_of_the_map_that_are_cut_off_never_come_back(tmp_path: Path) -> None:
    base = Hole(5 * PAGE_OF_DISK)
    with create_overlay(tmp_path / "o", base, identity=b"") as overlay:
        for page in range(5):
            overlay.write_at(page * PAGE_OF_DISK + UNIT, [b"flushed"])
            if page == 3:
                overlay.flush()
        overlay.resize(PAGE_OF_DISK + 2 * UNIT)
        overlay.resize(5 * PAGE_OF_DISK)
        expected = [
            Region(UNIT, UNIT, Layer.DATA),
            Region(PAGE_OF_DISK + UNIT, UNIT, Layer.DATA),
            Region(PAGE_OF_DISK + 2 * UNIT, 4 * PAGE_OF_DISK - 2 * UNIT, Layer.ZERO),
        ]
        assert list(overlay.changed_extents()) == expected
        assert overlay.data_bytes == 2 * UNIT
    with open_overlay(tmp_path / "o", base, identity=b"") as again:
        assert list(again.changed_extents()) == expected
        assert not any(again.read_at(2 * PAGE_OF_DISK, 2 * UNIT))


@pytest.mark.parametrize(("offset", "length"), [(SIZE, 1), (SIZE - 1, 2), (-1, 1), (-1, 3 * UNIT), (0, SIZE + 1)])
def test_writing_behind_the_end_is_refused(overlay: Overlay, base: MemoryDisk, offset: int, length: int) -> None:
    with pytest.raises(UsageError):
        overlay.write_at(offset, [bytes(length)])
    with pytest.raises(UsageError):
        overlay.write_zeroes(offset, length)
    assert overlay.read_at(0, SIZE) == base.read_at(0, SIZE)


def test_sizes_that_are_refused(overlay: Overlay) -> None:
    for size in (-1, DISK_SIZE_MAX + 1):
        with pytest.raises(UsageError):
            overlay.resize(size)
    assert overlay.size_bytes == SIZE


def test_nothing_is_written_by_nothing(overlay: Overlay) -> None:
    overlay.write_at(5, [])
    overlay.write_at(SIZE, [b""])
    overlay.discard(5, 0)
    assert overlay.dirty_bytes == 0


def test_more_buffers_than_a_system_call_takes(overlay: Overlay, base: MemoryDisk) -> None:
    pieces = [bytes([number % 251]) * 3 for number in range(3000)]
    overlay.write_at(7, pieces)
    assert overlay.read_at(0, SIZE) == base.read_at(0, 7) + b"".join(pieces) + base.read_at(9007, SIZE)


def test_what_the_files_hold(tmp_path: Path) -> None:
    """docs/overlay-format.md, byte by byte, made here from the document."""
    base = MemoryDisk.full(20 * CHUNK + 1)
    with create_overlay(tmp_path / "o", base, identity=IDENTITY) as overlay:
        overlay.write_at(UNIT, [b"a" * 3 * UNIT])
        overlay.discard(5 * UNIT, 2 * UNIT)
        overlay.resize(base.size_bytes + UNIT)
    body = struct.pack("<8sIIQQQQ", b"XBFSOVL\0", 1, 15, 2, *[base.size_bytes] * 2, base.size_bytes + UNIT)
    body += IDENTITY + bytes(432 - 15)
    copy = body + hashlib.sha256(body).digest()
    assert (tmp_path / "o" / "header").read_bytes() == copy + bytes(4096 - 512) + copy
    assert (tmp_path / "o" / "map").read_bytes() == bytes([0b01_01_01_00, 0b00_10_10_00]) + bytes(4094)
    data = (tmp_path / "o" / "data").read_bytes()
    assert data == (bytes(UNIT) + b"a" * 3 * UNIT).ljust(base.size_bytes + UNIT, b"\0")


def test_what_the_files_hold_of_a_copied_base(tmp_path: Path) -> None:
    base = MemoryDisk(6 * UNIT + 10 + CHUNK, {0: b"b" * UNIT + bytes(UNIT) + b"c" * (CHUNK - 2 * UNIT)})
    with create_overlay(tmp_path / "o", base, identity=IDENTITY) as overlay:
        overlay.write_at(2 * UNIT + 5, [b"a"])
        overlay.discard(3 * UNIT, UNIT)
        overlay.hydrate(rate_bytes_s=None, clock=SystemClock(), stop=Event())
        overlay.write_at(4 * UNIT, [b"d"])
        assert overlay.hydrated_bytes == CHUNK - 3 * UNIT
    body = struct.pack("<8sIHHQQQQ", b"XBFSOVL\0", 1, 15, 1, 2, *[base.size_bytes] * 3)
    body += IDENTITY + bytes(432 - 15)
    copy = body + hashlib.sha256(body).digest()
    assert (tmp_path / "o" / "header").read_bytes() == copy + bytes(4096 - 512) + copy
    packed = bytes([0b10_01_11_11, 0b11_11_11_01, 0xFF, 0xFF])
    assert (tmp_path / "o" / "map").read_bytes() == packed.ljust(4096, b"\0")
    data = bytearray(base.read_at(0, base.size_bytes))
    data[2 * UNIT + 5 : 2 * UNIT + 6] = b"a"
    data[3 * UNIT : 4 * UNIT] = bytes(UNIT)
    data[4 * UNIT : 4 * UNIT + 1] = b"d"
    assert (tmp_path / "o" / "data").read_bytes() == data
    # Neither the hole of the base nor its unit of zeros takes room.
    assert (tmp_path / "o" / "data").stat().st_blocks * 512 <= 14 * UNIT


def test_the_identity_can_be_asked_for_while_the_overlay_is_open(overlay: Overlay, tmp_path: Path) -> None:
    assert read_header(tmp_path / "o") == Header(IDENTITY, SIZE, SIZE, SIZE, generation=1)
    assert overlay.identity == IDENTITY


def test_creating_twice_opening_nothing_and_opening_over_another_disk(tmp_path: Path, base: MemoryDisk) -> None:
    place = tmp_path / "o"
    with pytest.raises(BlobNotFound):
        open_overlay(place, base, identity=IDENTITY)
    with pytest.raises(UsageError):
        create_overlay(place, base, identity=bytes(IDENTITY_BYTES_MAX + 1))
    create_overlay(place, base, identity=IDENTITY).close()
    with pytest.raises(TargetExists):
        create_overlay(place, base, identity=IDENTITY)
    with pytest.raises(OverlayMismatch, match="point 7, disk 0"):
        open_overlay(place, base, identity=b"another")
    with pytest.raises(OverlayMismatch):
        open_overlay(place, Hole(SIZE + 1), identity=IDENTITY)
    open_overlay(place, base, identity=IDENTITY).close()


def test_a_creation_that_was_cut_short_can_be_repeated(tmp_path: Path, base: MemoryDisk) -> None:
    place = tmp_path / "o"
    place.mkdir()
    (place / "header").touch()
    with pytest.raises(BlobNotFound):
        read_header(place)
    (place / "data").touch()
    os.truncate(place / "data", 10)
    (place / "map").touch()
    with pytest.raises(BlobNotFound):
        open_overlay(place, base, identity=IDENTITY)
    with create_overlay(place, base, identity=IDENTITY) as overlay:
        assert overlay.read_at(0, SIZE) == base.read_at(0, SIZE)


def test_a_disk_of_many_tebibytes_costs_what_is_written_of_it(tmp_path: Path) -> None:
    size = 15 << 40
    tracemalloc.start()
    with create_overlay(tmp_path / "o", Hole(size), identity=b"") as overlay:
        for number in range(300):
            overlay.write_at(number * 50 * GIB + 4095, [b"ab"])
        assert overlay.data_bytes == 600 * UNIT
        assert len(list(overlay.changed_extents())) == 300
        overlay.flush()
        assert len(list(overlay.changed_extents())) == 300
    with open_overlay(tmp_path / "o", Hole(size), identity=b"") as overlay:
        assert overlay.data_bytes == 600 * UNIT
        assert overlay.read_at(299 * 50 * GIB + 4094, 4) == b"\0ab\0"
        assert len(list(overlay.extents(0, size))) == 600
    assert tracemalloc.get_traced_memory()[1] < 32 * MIB
    tracemalloc.stop()


def test_zeroing_a_big_disk_stays_within_bounds(tmp_path: Path) -> None:
    """More pages of the map than may wait: the writer flushes, and none is forgotten."""
    size = 200 * GIB
    with create_overlay(tmp_path / "o", Hole(size), identity=b"") as overlay:
        tracemalloc.start()
        overlay.write_zeroes(10, size - 10)
        assert tracemalloc.get_traced_memory()[1] < 64 * MIB
        tracemalloc.stop()
        assert list(overlay.changed_extents()) == [Region(0, UNIT, Layer.DATA), Region(UNIT, size - UNIT, Layer.ZERO)]
        assert overlay.dirty_bytes == size


def test_cached_reads_tell_bytes_or_nothing(overlay: Overlay, base: MemoryDisk) -> None:
    overlay.read_at(0, SIZE)
    overlay.write_at(CHUNK - 10, [b"x" * 20])
    assert overlay.read_cached(CHUNK - 11, 22) in (
        None,
        base.read_at(CHUNK - 11, 1) + b"x" * 20 + base.read_at(CHUNK + 10, 1),
    )
    assert overlay.read_cached(3 * CHUNK, 10) == bytes(10)
    base.cold.add(0)
    assert overlay.read_cached(0, 10) is None
