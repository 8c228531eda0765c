"""A disk of a restore point read at random: always the bytes that were backed up, or an error, never anything else."""

from __future__ import annotations

import random  # noqa: TID251 - seeded
from typing import TYPE_CHECKING

import pytest

from tests.support.engine import CHUNK, LEAF, Engine, MemorySource, pattern
from tests.support.faulty_storage import FaultyStorage, Kind
from xbfs.view.disk import PointDisk
from xbfs_engine.catalog.blockmap import BlockMap, NodeStore
from xbfs_engine.core.errors import BlobLost, ChunkCorrupt, IntegrityError, MapCorrupt
from xbfs_engine.storage.memory import MemoryStorage
from xbfs_engine.store.cache import ChunkCache
from xbfs_engine.store.reader import ChunkReader

if TYPE_CHECKING:
    from pathlib import Path

    from xbfs_engine.catalog.restore_point import DiskRecord
    from xbfs_engine.storage.base import Storage

SIZE = 70 * LEAF + 9 * CHUNK + 1234
PIECES = {
    0: pattern(1, 3 * CHUNK),
    5 * CHUNK: pattern(2, CHUNK),
    LEAF - CHUNK: pattern(3, 2 * CHUNK),
    40 * LEAF: pattern(4, LEAF),
    SIZE - 3 * CHUNK: pattern(5, 3 * CHUNK),
}


def whole() -> bytes:
    content = bytearray(SIZE)
    for offset, data in PIECES.items():
        content[offset : offset + len(data)] = data
    return bytes(content)


CONTENT = whole()


def disk_of(
    engine: Engine, record: DiskRecord, *, storage: Storage | None = None, chunks: int | None = None
) -> tuple[PointDisk, ChunkCache]:
    reader = ChunkReader(storage or engine.storage, engine.repository.keys)
    cache = ChunkCache(reader, 64 << 20)
    block_map = BlockMap(NodeStore(reader), record.root, chunks or record.chunks)
    return PointDisk(block_map, cache, size_bytes=record.size_bytes, chunk_size=record.chunk_size), cache


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    made = Engine.fresh(tmp_path_factory.mktemp("cache"), FaultyStorage(MemoryStorage()))
    made.backup(MemorySource(SIZE, PIECES))
    return made


@pytest.fixture(scope="module")
def record(engine: Engine) -> DiskRecord:
    return engine.points()[0].disks[0]


def test_any_range_is_a_slice_of_the_disk(engine: Engine, record: DiskRecord) -> None:
    disk, _ = disk_of(engine, record)
    seeded = random.Random(1)
    borders = [*PIECES, *(offset + len(data) for offset, data in PIECES.items()), LEAF, SIZE]
    for _ in range(300):
        offset = max(seeded.choice([seeded.randrange(SIZE), seeded.choice(borders) - 2000]), 0)
        length = seeded.choice([0, 1, 4096, CHUNK, 300_000, 5 * LEAF])
        expected = CONTENT[offset : offset + length]
        assert disk.read_at(offset, length) == expected
        cached = disk.read_cached(offset, length)
        assert cached is not None
        assert bytes(cached) == expected


def test_reading_cached_never_asks_the_storage(engine: Engine, record: DiskRecord) -> None:
    disk, cache = disk_of(engine, record)
    storage = engine.storage
    assert isinstance(storage, FaultyStorage)
    before = storage.counts[Kind.READ]
    for offset in range(0, SIZE, LEAF):
        assert disk.read_cached(offset, 4096) is None
    assert disk.read_cached(SIZE, 4096) == b""
    assert storage.counts[Kind.READ] == before
    disk.warm(4096, 10)
    before = storage.counts[Kind.READ]
    assert disk.read_cached(4096, 4096) == CONTENT[4096:8192]
    assert disk.read_cached(0, CHUNK) == CONTENT[:CHUNK]
    assert disk.read_cached(0, CHUNK + 1) is None, "the next chunk is not there"
    assert disk.read_cached(3 * CHUNK, CHUNK) == bytes(CHUNK), "the leaf says that it is zero"
    assert storage.counts[Kind.READ] == before
    assert cache.misses == 1


def test_holes_cost_the_leaf_and_nothing_else(engine: Engine, record: DiskRecord) -> None:
    disk, cache = disk_of(engine, record)
    assert disk.read_at(10 * LEAF, 4 * LEAF) == bytes(4 * LEAF)
    assert cache.misses == cache.hits == 0


def test_neighbours_come_with_one_read_of_the_storage(engine: Engine, record: DiskRecord) -> None:
    disk, _ = disk_of(engine, record)
    storage = engine.storage
    assert isinstance(storage, FaultyStorage)
    disk.read_at(40 * LEAF, 1)
    before = storage.counts[Kind.READ]
    assert disk.read_at(40 * LEAF + CHUNK, 4 * CHUNK) == CONTENT[40 * LEAF + CHUNK : 40 * LEAF + 5 * CHUNK]
    assert storage.counts[Kind.READ] == before + 1


def test_extents_are_exact_to_a_chunk(engine: Engine, record: DiskRecord) -> None:
    disk, cache = disk_of(engine, record)
    tail = (SIZE - 3 * CHUNK) // CHUNK * CHUNK
    expected = [
        (0, 3 * CHUNK, True),
        (3 * CHUNK, 5 * CHUNK, False),
        (5 * CHUNK, 6 * CHUNK, True),
        (6 * CHUNK, LEAF - CHUNK, False),
        (LEAF - CHUNK, LEAF + CHUNK, True),
        (LEAF + CHUNK, 40 * LEAF, False),
        (40 * LEAF, 41 * LEAF, True),
        (41 * LEAF, tail, False),
        (tail, SIZE, True),
    ]
    assert [(e.offset, e.offset + e.length, e.is_data) for e in disk.extents(0, SIZE)] == expected
    assert cache.misses == 0


def test_a_disk_of_zeros_needs_no_storage(engine: Engine, tmp_path: Path) -> None:
    zero = engine.backup(MemorySource(3 * LEAF + 7, {}), vm_uuid="vm-zero").disks[0]
    disk, _ = disk_of(engine, zero)
    assert disk.read_cached(LEAF, LEAF) == bytes(LEAF)
    assert disk.read_at(0, 1 << 40) == bytes(3 * LEAF + 7)


@pytest.mark.parametrize("damage", ["flip", "truncate", "lose"])
@pytest.mark.parametrize("folder", ["data", "meta"])
def test_damage_is_an_error_that_says_where(tmp_path: Path, folder: str, damage: str) -> None:
    storage = MemoryStorage()
    engine = Engine.fresh(tmp_path / "cache", storage)
    record = engine.backup(MemorySource(SIZE, PIECES)).disks[0]
    for blob in list(storage.list_blobs(f"{folder}/")):
        data = bytearray(storage.get(blob.name))
        storage.delete(blob.name)
        data[300] ^= 1
        if damage != "lose":
            storage.put(blob.name, [data if damage == "flip" else data[: len(data) // 2]])
    disk, _ = disk_of(engine, record)
    failures: list[tuple[int, IntegrityError]] = []
    for offset in range(0, SIZE, 3 * CHUNK):
        try:
            assert disk.read_at(offset, 2 * CHUNK) == CONTENT[offset : offset + 2 * CHUNK]
        except IntegrityError as exc:
            failures.append((offset, exc))
        assert disk.read_cached(offset, CHUNK) in (None, CONTENT[offset : offset + CHUNK])
    assert failures
    for offset, problem in failures:
        assert isinstance(problem, BlobLost) or damage != "lose"
        first = int(problem.message.split()[1])
        assert problem.message.startswith(f"byte {first} of the disk: ")
        assert offset <= first < offset + 2 * CHUNK


def test_a_chunk_that_does_not_fill_its_place_is_an_error(engine: Engine, tmp_path: Path) -> None:
    """A map of somebody who holds the keys could name a chunk of another length."""
    short = engine.backup(pattern(7, 3 * CHUNK - 100), vm_uuid="vm-short").disks[0]
    reader = ChunkReader(engine.storage, engine.repository.keys)
    cache = ChunkCache(reader)
    grown = PointDisk(
        BlockMap(NodeStore(reader), short.root, 4), cache, size_bytes=4 * CHUNK, chunk_size=short.chunk_size
    )
    with pytest.raises(MapCorrupt, match=f"byte {2 * CHUNK} of the disk"):
        grown.read_at(0, 4 * CHUNK)
    assert grown.read_cached(2 * CHUNK, 10) is None
    assert grown.read_at(0, 2 * CHUNK) == pattern(7, 3 * CHUNK - 100)[: 2 * CHUNK]


def test_the_first_bad_chunk_of_a_batch_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine.fresh(tmp_path / "cache", MemoryStorage())
    record = engine.backup(pattern(8, 10 * CHUNK)).disks[0]
    disk, cache = disk_of(engine, record)
    bad = disk._map.chunk(6)
    get = cache.get

    def fail(refs: list[object]) -> list[object]:
        if bad in refs:
            raise ChunkCorrupt("it is bad")
        return get(refs)  # type: ignore[arg-type,return-value]  # what it was given

    monkeypatch.setattr(cache, "get", fail)
    with pytest.raises(ChunkCorrupt, match=f"^byte {6 * CHUNK} of the disk: it is bad$"):
        disk.read_at(0, 10 * CHUNK)
