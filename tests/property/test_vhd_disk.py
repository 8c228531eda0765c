"""The guest's disk in a VHD a host wrote: against a plain bytearray, and with every field of the tables broken."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.disks import MemoryDisk, dynamic_vhd
from tests.support.vhd_writer import BLOCK, HostWriter, resummed, with_footer
from xbfs.instant.vhd_disk import VhdDisk
from xbfs.view.base import Extent
from xbfs.view.overlay import Layer, Region
from xbfs_engine.core.errors import CommitRefused, IntegrityError

if TYPE_CHECKING:
    from collections.abc import Iterator

SIZE = 4 * BLOCK - 700 * 1024
DISK = MemoryDisk.holding(SIZE, (0, 5, 70, 110))  # blocks 0, 2 and 3; block 1 has no place
BASE = dynamic_vhd(DISK)
BASE_BYTES = BASE.read_at(0, BASE.size_bytes)
ROUNDED = 4 * BLOCK

writes = st.lists(
    st.tuples(st.integers(0, SIZE // 512 - 1), st.integers(1, 40), st.integers(0, 255)), min_size=1, max_size=12
)


class Bytes:
    """A file in memory, all of it cached."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.size_bytes = len(data)

    def read_at(self, offset: int, length: int) -> bytes:
        return self.data[offset : offset + length]

    def read_cached(self, offset: int, length: int) -> bytes:
        return self.read_at(offset, length)

    def parts_at(self, offset: int, length: int) -> list[bytes | memoryview]:
        return [self.read_at(offset, length)]

    def parts_cached(self, offset: int, length: int) -> list[bytes | memoryview]:
        return [self.read_at(offset, length)]

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        end = min(offset + length, self.size_bytes)
        if offset < end:
            yield Extent(offset, end - offset, True)


def disk_of(writer: HostWriter) -> VhdDisk:
    regions = [Region(unit * 4096, 4096, Layer.DATA) for unit in sorted(writer.touched)]
    return VhdDisk(Bytes(bytes(writer.file)), lambda: iter(regions), BASE, SIZE)


def written(operations: list[tuple[int, int, int]]) -> tuple[HostWriter, bytearray]:
    writer, plain = HostWriter(bytearray(BASE_BYTES)), bytearray(DISK.read_at(0, SIZE))
    for sector, count, byte in operations:
        data = bytes([byte]) * (min(count, SIZE // 512 - sector) * 512)
        writer.write(sector * 512, data)
        plain[sector * 512 : sector * 512 + len(data)] = data
    return writer, plain


@settings(max_examples=25, deadline=None)
@given(writes, st.booleans(), st.integers(0, SIZE), st.integers(0, 3 << 20))
def test_a_hosts_writes_are_the_guests(
    operations: list[tuple[int, int, int]], closed: bool, offset: int, length: int
) -> None:
    writer, plain = written(operations)
    if closed:
        writer.close()
    disk = disk_of(writer)
    assert disk.size_bytes == SIZE
    assert disk.read_at(0, SIZE + 1) == plain
    part = bytes(plain[offset : offset + length])
    assert disk.read_at(offset, length) == part
    assert disk.read_cached(offset, length) == part
    at = 0
    for extent in disk.extents(0, SIZE):
        assert extent.offset == at
        at += extent.length
        assert extent.is_data or not any(plain[extent.offset : at])
    assert at == SIZE
    again = bytearray(DISK.read_at(0, SIZE))
    total = end = 0
    for region in disk.changed_extents():
        assert end <= region.offset < region.offset + region.length <= SIZE
        end = region.offset + region.length
        again[region.offset : end] = plain[region.offset : end]
        total += region.length
    assert again == plain
    assert total <= sum(count * 512 + 8192 for _, count, _ in operations)
    assert list(disk.changed_extents()) == list(disk.changed_extents())


def test_an_untouched_file_has_no_changes() -> None:
    writer = HostWriter(bytearray(BASE_BYTES))
    assert list(disk_of(writer).changed_extents()) == []


def test_metadata_alone_is_no_change() -> None:
    writer = HostWriter(bytearray(BASE_BYTES))
    writer.touched = {0}  # with the first block's bitmap
    assert list(disk_of(writer).changed_extents()) == []


def test_what_is_written_behind_the_disks_end_is_kept() -> None:
    writer = HostWriter(bytearray(BASE_BYTES))
    writer.write(ROUNDED - 512, b"G" * 512)
    disk = disk_of(writer)
    assert disk.size_bytes == ROUNDED
    assert disk.read_at(ROUNDED - 512, 600) == b"G" * 512


def test_a_bitmap_that_lost_bits_and_a_block_that_was_dropped_are_changes() -> None:
    writer, first_place = HostWriter(bytearray(BASE_BYTES)), int.from_bytes(BASE_BYTES[1536:1540], "big") * 512
    writer._put(first_place, b"\x7f")
    disk = disk_of(writer)
    assert disk.read_at(0, 1024) == bytes(512) + DISK.read_at(512, 512)
    assert next(iter(disk.changed_extents()))[:2] == (0, BLOCK)
    writer._put(1536, b"\xff" * 4)
    disk = disk_of(writer)
    assert not any(disk.read_at(0, BLOCK))
    assert next(iter(disk.changed_extents()))[:2] == (0, BLOCK)


def test_a_moved_block_is_a_change() -> None:
    writer = HostWriter(bytearray(BASE_BYTES))
    place = int.from_bytes(BASE_BYTES[1536:1540], "big") * 512
    room = bytes(writer.file[place : place + 512 + BLOCK])
    moved = writer._append(0)
    writer._put(moved, room)
    writer.close()
    disk = disk_of(writer)
    assert disk.read_at(0, SIZE) == DISK.read_at(0, SIZE)
    assert [region[:2] for region in disk.changed_extents()] == [(0, BLOCK)]


def test_a_resized_disk_has_its_new_size() -> None:
    writer = HostWriter(bytearray(BASE_BYTES))
    writer.close(3 * BLOCK)
    assert disk_of(writer).size_bytes == 3 * BLOCK


def test_a_guests_own_vhd_at_the_files_end_is_not_the_footer() -> None:
    writer, plain = written([(BLOCK // 512, 1, 7)])
    foreign = with_footer(BASE_BYTES[:512], 68, b"\x11" * 16)
    place = writer._place(1)
    assert place is not None
    writer.write(BLOCK + 512, with_footer(foreign, 48, BLOCK.to_bytes(8, "big")))
    del writer.file[place + 512 + 1024 :]
    disk = disk_of(writer)
    assert disk.size_bytes == SIZE
    assert disk.read_at(BLOCK, 512) == plain[BLOCK : BLOCK + 512]


@pytest.mark.parametrize("change", [(60, b"\0\0\0\4"), (85, b"\1"), (60, b"\0\0\0\2")])
def test_half_a_disk_is_refused(change: tuple[int, bytes]) -> None:
    footer = with_footer(BASE_BYTES[-512:], *change)
    if change[1] == b"\0\0\0\2":
        footer = with_footer(footer, 16, b"\xff" * 8)
    with pytest.raises(CommitRefused) as caught:
        VhdDisk(Bytes(BASE_BYTES[:-512] + footer), lambda: (), BASE, SIZE)
    assert caught.value.hint


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(["footer", "header", "table"]), st.data())
def test_broken_tables_give_typed_errors_only(what: str, data: st.DataObject) -> None:
    at, size, checksum_at = {"footer": (0, 512, 64), "header": (512, 1024, 36), "table": (1536, 16, -1)}[what]
    field = data.draw(st.integers(0, min(size, 96) - 1))
    value = data.draw(st.binary(min_size=1, max_size=8))[: size - field]
    record = BASE_BYTES[at : at + size]
    if what == "table":
        record = record[:field] + value + record[field + len(value) :]
    else:
        record = resummed(record, field, value, checksum_at)
    file = bytearray(BASE_BYTES)
    file[at : at + size] = record
    if what == "footer":
        file[-512:] = record
    try:
        disk = VhdDisk(Bytes(bytes(file)), lambda: [Region(0, len(file), Layer.DATA)], BASE, SIZE)
        for offset in range(0, min(disk.size_bytes, ROUNDED), BLOCK):
            disk.read_at(offset, 4096)
        list(disk.changed_extents())
    except (IntegrityError, CommitRefused):
        pass


@pytest.mark.parametrize("length", [0, 511, 1023, 1536, 1540, 2048, len(BASE_BYTES) - BLOCK])
def test_a_cut_file_is_an_integrity_error(length: int) -> None:
    with pytest.raises(IntegrityError):
        VhdDisk(Bytes(BASE_BYTES[:length]), lambda: (), BASE, SIZE).read_at(0, SIZE)
