"""Backups through the whole engine: what is read, what is stored, and that every point reads back exactly."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import trio

from tests.support.engine import CHUNK, LEAF, Engine, MemorySource, blobs, pattern
from xbfs_engine.catalog.blockmap import NodeStore, differing_chunks
from xbfs_engine.core.errors import (
    BitmapInvalid,
    DiskShrunk,
    NoBasePoint,
    UsageError,
)
from xbfs_engine.core.limits import MIB
from xbfs_engine.store.reader import ChunkReader

if TYPE_CHECKING:
    from pathlib import Path

    from xbfs_engine.catalog.restore_point import RestorePoint


@pytest.fixture
def engine(tmp_path: Path) -> Engine:
    return Engine.fresh(tmp_path / "cache")


def statistics(point: RestorePoint, number: int = 0) -> dict[str, object]:
    disk = point.disk(number)
    assert disk is not None
    return disk.statistics.to_record()


SIZES = [0, 1, 511, CHUNK - 1, CHUNK, CHUNK + 1, LEAF - 1, LEAF, LEAF + 1, 3 * LEAF + 777]


@pytest.mark.parametrize("size", SIZES)
def test_a_full_disk_of_any_size_reads_back(engine: Engine, size: int) -> None:
    content = pattern(size, size)
    point = engine.backup(content)
    assert engine.read(point.disks[0]) == content
    assert statistics(point)["new_bytes"] == size
    assert point.disks[0].data_bytes == size


@pytest.mark.parametrize("size", SIZES)
def test_a_disk_of_zeros_stores_nothing(engine: Engine, size: int) -> None:
    point = engine.backup(bytes(size))
    assert point.disks[0].root is None
    assert engine.read(point.disks[0]) == bytes(size)
    assert statistics(point)["zero_bytes"] == size
    assert (point.run.packs, point.disks[0].data_bytes) == (0, 0)


def test_one_byte_that_is_not_zero_is_found_anywhere(engine: Engine) -> None:
    for at in (0, 63, 64, 4096, CHUNK - 1, CHUNK, 2 * CHUNK + 100):
        content = bytearray(2 * CHUNK + 101)
        content[at] = 1
        point = engine.backup(content, new_chain=True)
        assert engine.read(point.disks[0]) == content


def test_a_buffer_s_old_bytes_never_show_in_a_later_short_chunk(engine: Engine) -> None:
    """The worker reuses its buffer: what an earlier segment left there must not reach the disk's last chunk."""
    content = pattern(1, LEAF) + bytes(LEAF) + bytes(100)
    point = engine.backup(content, threads=1)
    assert engine.read(point.disks[0]) == content
    assert len(engine.chunks(point.disks[0])) == LEAF // CHUNK


def test_an_incremental_reads_exactly_the_changed_chunks(engine: Engine) -> None:
    content = bytearray(pattern(1, 3 * LEAF + 777))
    engine.backup(content)
    changed = [(5 * CHUNK + 17, 100), (LEAF - 1, 2), (3 * LEAF + 700, 77)]
    for number, (offset, length) in enumerate(changed):
        content[offset : offset + length] = pattern(10 + number, length)
    source = MemorySource.of(content)
    point = engine.backup(source, changed=changed)
    assert engine.read(point.disks[0]) == content
    assert sorted(source.reads) == [
        (5 * CHUNK, CHUNK),
        (LEAF - CHUNK, CHUNK),
        (LEAF, CHUNK),
        (3 * LEAF, 777),
    ]
    assert statistics(point)["new_bytes"] == source.read_bytes == 3 * CHUNK + 777


def test_an_over_reporting_bitmap_costs_reads_only(engine: Engine) -> None:
    content = pattern(1, 2 * LEAF)
    first = engine.backup(content)
    source = MemorySource.of(content)
    point = engine.backup(source, changed=[(0, 2 * LEAF)])
    assert source.read_bytes == 2 * LEAF
    assert (point.disks[0].root, point.run.packs) == (first.disks[0].root, 0)


def test_an_empty_bitmap_reads_nothing_and_keeps_the_map(engine: Engine) -> None:
    content = pattern(1, LEAF + 5)
    first = engine.backup(content)
    source = MemorySource.of(content)
    point = engine.backup(source, changed=[])
    assert (source.reads, point.disks[0].root) == ([], first.disks[0].root)
    assert point.disks[0].data_map == first.disks[0].data_map
    assert engine.read(point.disks[0]) == content


def test_a_full_read_of_an_unchanged_disk_stores_nothing(engine: Engine) -> None:
    content = pattern(1, 2 * LEAF + 3)
    first = engine.backup(content)
    before = blobs(engine.storage)
    point = engine.backup(content)
    assert statistics(point)["unchanged_bytes"] == len(content)
    assert point.disks[0].root == first.disks[0].root
    assert blobs(engine.storage).keys() - before.keys() == {f"points/{point.id}"}


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_an_identical_clone_stores_nothing(engine: Engine, threads: int) -> None:
    content = pattern(1, 3 * LEAF + 3)
    first = engine.backup(content)
    clone = engine.backup(content, vm_uuid="vm-2", threads=threads)
    assert statistics(clone)["duplicate_bytes"] == len(content)
    assert clone.run.stored_bytes == 0
    assert clone.disks[0].root is not None
    assert first.disks[0].root is not None
    assert clone.disks[0].root.ref.id == first.disks[0].root.ref.id
    assert engine.read(clone.disks[0]) == content


def test_two_disks_of_one_run_share_chunks(engine: Engine) -> None:
    content = pattern(1, LEAF)
    point = engine.backup(content, content + pattern(2, 10))
    assert statistics(point, 1)["duplicate_bytes"] == LEAF
    assert [engine.read(disk) for disk in point.disks] == [content, content + pattern(2, 10)]


def test_duplicates_within_a_disk_are_stored_once(engine: Engine) -> None:
    content = pattern(1) * (2 * LEAF // CHUNK)
    point = engine.backup(content)
    assert statistics(point)["new_bytes"] == CHUNK
    assert engine.read(point.disks[0]) == content


def test_only_what_the_source_says_it_holds_is_read(engine: Engine) -> None:
    source = MemorySource(40 * LEAF, {LEAF + 5: b"x" * 10, 30 * LEAF: pattern(1, 2 * CHUNK)})
    point = engine.backup(source)
    assert sorted(source.reads) == [(LEAF, CHUNK), (30 * LEAF, 2 * CHUNK)]
    assert set(engine.chunks(point.disks[0])) == {64, 30 * 64, 30 * 64 + 1}


def test_a_hole_that_was_data_becomes_zero_in_a_full_read(engine: Engine) -> None:
    engine.backup(pattern(1, 2 * LEAF))
    point = engine.backup(MemorySource(2 * LEAF, {LEAF: b"kept"}))
    assert engine.read(point.disks[0]) == bytes(LEAF) + b"kept" + bytes(LEAF - 4)
    assert point.disks[0].data_bytes == MIB


def test_zeroed_chunks_leave_map_and_data_map(engine: Engine) -> None:
    content = bytearray(pattern(1, 2 * LEAF))
    engine.backup(content)
    content[:LEAF] = bytes(LEAF)
    point = engine.backup(content, changed=[(0, LEAF)])
    assert engine.read(point.disks[0]) == content
    assert point.disks[0].data_bytes == LEAF
    content[LEAF:] = bytes(LEAF)
    last = engine.backup(content, changed=[(LEAF, LEAF)])
    assert (last.disks[0].root, last.disks[0].data_bytes) == (None, 0)


GROWTH = [
    (0, 1),
    (0, 2 * LEAF),
    (1, 2),
    (100, CHUNK),
    (CHUNK - 1, CHUNK + 1),
    (CHUNK, 2 * CHUNK),
    (LEAF - 1, LEAF),
    (LEAF - 1, LEAF + 1),
    (LEAF, LEAF + 1),
    (2 * LEAF + 5, 300 * LEAF + 7),
]


@pytest.mark.parametrize(("old", "new"), GROWTH)
@pytest.mark.parametrize("full", [False, True])
def test_a_grown_disk_reads_back(engine: Engine, old: int, new: int, *, full: bool) -> None:
    content = pattern(3, old)
    before = engine.backup(content)
    tail = b"grown"[: new - old]
    source = MemorySource(new, {0: content, new - len(tail): tail})
    point = engine.backup(source, changed=None if full else [(new - len(tail), len(tail))])
    chunks = engine.chunks(point.disks[0])
    whole = {at * CHUNK: data for at, data in chunks.items()}
    expected = MemorySource(new, {0: content, new - len(tail): tail})
    for offset, data in whole.items():
        buffer = bytearray(min(CHUNK, new - offset))
        expected.read_into(offset, memoryview(buffer))
        assert data == buffer, offset
    assert whole.keys() >= {0, (new - 1) // CHUNK * CHUNK} if old else {(new - 1) // CHUNK * CHUNK}
    assert engine.read(before.disks[0]) == content, "the old point is as it was"


def test_growth_alone_rereads_the_old_short_chunk_only(engine: Engine) -> None:
    content = pattern(3, LEAF + 100)
    engine.backup(content)
    source = MemorySource(5 * LEAF, {0: content})
    point = engine.backup(source, changed=[])
    assert source.reads == [(LEAF, CHUNK)]
    assert engine.chunks(point.disks[0])[64] == content[LEAF:] + bytes(CHUNK - 100)


def test_a_disk_of_64_tib_with_a_few_chunks(engine: Engine) -> None:
    size = 64 << 40
    positions = [0, 1, size // 2 // CHUNK, size // CHUNK - 1]
    pieces = {at * CHUNK: pattern(at) for at in positions}
    point = engine.backup(MemorySource(size, pieces))
    assert engine.chunks(point.disks[0]) == {at: pieces[at * CHUNK] for at in positions}
    assert point.disks[0].data_bytes == 3 * MIB
    pieces[size // 4] = pattern(9)
    later = MemorySource(size, pieces)
    second = engine.backup(later, changed=[(size // 4, 1)])
    assert later.reads == [(size // 4, CHUNK)]
    nodes = NodeStore(ChunkReader(engine.storage, engine.repository.keys, engine.index))
    maps = [engine.block_map(each.disks[0]) for each in (point, second)]
    assert list(differing_chunks(*maps, nodes)) == [(size // 4 // CHUNK, True)]


def test_a_shrunk_disk_needs_a_new_chain(engine: Engine) -> None:
    engine.backup(pattern(1, CHUNK))
    with pytest.raises(DiskShrunk):
        engine.backup(pattern(1, CHUNK - 1))
    point = engine.backup(pattern(1, CHUNK - 1), new_chain=True)
    assert (point.parent, engine.read(point.disks[0])) == (None, pattern(1, CHUNK - 1))


def test_a_delta_needs_a_base(engine: Engine) -> None:
    with pytest.raises(NoBasePoint):
        engine.backup(pattern(1), changed=[(0, 1)])
    engine.backup(pattern(1))
    with pytest.raises(NoBasePoint):
        trio.run(engine.run({1: (MemorySource.of(b"x"), [(0, 1)])}).run)
    assert len(engine.points()) == 1


def test_extents_beyond_the_disk_are_refused(engine: Engine) -> None:
    engine.backup(pattern(1))
    with pytest.raises(BitmapInvalid):
        engine.backup(pattern(1), changed=[(CHUNK, 1)])
    with pytest.raises(BitmapInvalid):
        engine.backup(MemorySource(CHUNK, {}, extents=[(0, CHUNK + 1)]))
    assert len(engine.points()) == 1


def test_a_run_without_disks_is_refused(engine: Engine) -> None:
    with pytest.raises(UsageError):
        engine.backup()


def test_points_of_one_vm_have_seconds_of_their_own_and_ascend(engine: Engine) -> None:
    points = [engine.backup(b"a"), engine.backup(b"b")]
    engine.clock.set(1)
    points.append(engine.backup(b"c"))
    seconds = [point.time_ns // 10**9 for point in points]
    assert seconds == sorted(set(seconds))
    assert [point.parent for point in points] == [None, points[0].id, points[1].id]


def test_a_bitmap_of_another_vdi_has_no_base(engine: Engine) -> None:
    """A disk that was reverted or cloned has a new VDI under the old number: its bitmap says nothing about the old."""
    engine.backup(pattern(1, LEAF))
    run = engine.run({0: (MemorySource.of(pattern(2, LEAF)), [(0, CHUNK)])})
    run._request = replace(run._request, disks=[replace(run._request.disks[0], vdi_uuid="another")])
    with pytest.raises(NoBasePoint, match="another"):
        trio.run(run.run)
    assert len(engine.points()) == 1
