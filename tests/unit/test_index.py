"""The chunk index and its cache: what was listed is found, what is damaged is rebuilt, nothing wrong is ever told."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from tests.support.engine import Engine, pattern
from tests.support.runtime import SeededRandom
from tools.make_vectors import fixed_keys
from xbfs_engine.codec.envelope import ObjectKind
from xbfs_engine.core.errors import IndexCorrupt, StorageError
from xbfs_engine.core.ids import BlobHash, Placement
from xbfs_engine.storage.memory import MemoryStorage
from xbfs_engine.store import index as index_module
from xbfs_engine.store.index import MERGE_WIDTH, ChunkIndex
from xbfs_engine.store.index_blob import PREFIX, get_index, put_index
from xbfs_engine.store.index_run import Run, encode_run, merged, run_of
from xbfs_engine.store.pack import pack_name
from xbfs_engine.store.packer import SealedPack

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from xbfs_engine.storage.base import BlobInfo

KEYS = fixed_keys()


def packs(seed: int, *counts: int) -> list[SealedPack]:
    random = SeededRandom(seed)
    return [
        SealedPack(ObjectKind.DATA_PACK, BlobHash(random.token(32)), 1000, random.token(32 * count)) for count in counts
    ]


def put(storage: MemoryStorage, seed: int, listed: list[SealedPack]) -> BlobHash:
    """List packs in an index blob; that there are such packs is all the index asks of them."""
    for pack in listed:
        storage.put(pack_name(pack.kind, pack.pack), [b""])
    return put_index(storage, KEYS, SeededRandom(seed), listed)


def places(listed: list[SealedPack]) -> dict[bytes, Placement]:
    return {
        pack.ids[at : at + 32]: Placement(pack.pack, at // 32) for pack in listed for at in range(0, len(pack.ids), 32)
    }


@pytest.fixture
def storage() -> MemoryStorage:
    return MemoryStorage()


@pytest.fixture
def index(storage: MemoryStorage, tmp_path: Path) -> ChunkIndex:
    return ChunkIndex(storage, KEYS, tmp_path / "a" / "cache")


def test_what_anybody_listed_is_found_after_a_refresh(storage: MemoryStorage, index: ChunkIndex) -> None:
    listed = [packs(seed, 3, 500, 1) for seed in range(10)]
    for group in listed:
        put(storage, hash(group[0].pack), group)
    index.refresh()
    truth = {chunk_id: place for group in listed for chunk_id, place in places(group).items()}
    assert index.lookup(list(truth)) == list(truth.values())
    assert index.lookup([bytes(32), b"\xff" * 32, next(iter(truth))[:31] + b"?"])[:2] == [None, None]
    assert index.entries() == len(truth) == 5040
    assert index.lookup([]) == []


def test_many_blobs_are_merged_into_few_runs(storage: MemoryStorage, index: ChunkIndex, tmp_path: Path) -> None:
    truth: dict[bytes, Placement] = {}
    index.refresh()
    for seed in range(60):
        group = packs(seed, 5 + seed % 3)
        index.add(put(storage, seed, group), group)
        truth |= places(group)
    files = list((tmp_path / "a" / "cache").glob("*.run"))
    assert len(files) <= MERGE_WIDTH * 5
    assert index.lookup(list(truth)) == list(truth.values())
    again = ChunkIndex(storage, KEYS, tmp_path / "a" / "cache")
    again.refresh()
    assert again.lookup(list(truth)) == list(truth.values())
    assert set((tmp_path / "a" / "cache").glob("*.run")) == set(files), "nothing was rebuilt"


def test_large_runs_are_merged_no_further(
    storage: MemoryStorage, index: ChunkIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The heap that a merge takes is bounded, whatever the repository holds."""
    monkeypatch.setattr(index_module, "MERGE_ENTRIES_MAX", 100)
    truth: dict[bytes, Placement] = {}
    index.refresh()
    for seed in range(100):
        group = packs(seed, 10)
        index.add(put(storage, seed, group), group)
        truth |= places(group)
        assert all(len(run) < 4 * 100 for run in index._runs)
    assert index.lookup(list(truth)) == list(truth.values())
    assert len(index._runs) <= 1000 // 100 + 3 * 4


def test_a_locate_refreshes_once(storage: MemoryStorage, index: ChunkIndex) -> None:
    group = packs(1, 4)
    put(storage, 1, group)
    assert index.lookup([group[0].ids[:32]]) == [None]
    assert index.locate(group[0].ids[:32]) == Placement(group[0].pack, 0)
    assert index.locate(bytes(32)) is None


def test_what_is_no_longer_listed_is_forgotten(storage: MemoryStorage, index: ChunkIndex) -> None:
    groups = [packs(seed, 4) for seed in range(6)]
    names = [put(storage, seed, group) for seed, group in enumerate(groups)]
    index.refresh()
    storage.delete(PREFIX + names[2].hex())
    index.refresh()
    found = [index.lookup([group[0].ids[:32]])[0] is not None for group in groups]
    assert found == [True, True, False, True, True, True]


def test_a_damaged_index_blob_is_left_out_alone(storage: MemoryStorage, index: ChunkIndex) -> None:
    groups = [packs(seed, 4) for seed in range(2)]
    names = [put(storage, seed, group) for seed, group in enumerate(groups)]
    blob = bytearray(storage.get(PREFIX + names[0].hex()))
    storage.delete(PREFIX + names[0].hex())
    blob[-1] ^= 1
    storage.put(PREFIX + names[0].hex(), [blob])
    with pytest.raises(IndexCorrupt):
        get_index(storage, KEYS, names[0])
    index.refresh()
    assert index.lookup([group[0].ids[:32] for group in groups]) == [None, Placement(groups[1][0].pack, 0)]


def test_a_copy_in_a_pack_that_has_gone_does_not_hide_another(storage: MemoryStorage, index: ChunkIndex) -> None:
    """Both copies lie in one run: the second is found, wherever it sorts."""
    for seed in range(20):
        (first,) = packs(seed, 3)
        second = SealedPack(first.kind, BlobHash(SeededRandom(100 + seed).token(32)), 1000, first.ids)
        put(storage, seed, [first, second])
        storage.delete(pack_name(first.kind, (first, second)[seed % 2].pack))
        index.refresh()
        left = (second, first)[seed % 2].pack
        assert index.lookup([first.ids[:32], first.ids[64:]]) == [Placement(left, 0), Placement(left, 2)]


def test_a_pack_listed_while_refreshing_is_not_taken_for_lost(tmp_path: Path) -> None:
    """Another writer puts its pack and index blob between our two listings."""

    class Busy(MemoryStorage):
        def list_blobs(self, prefix: str) -> Iterator[BlobInfo]:
            listed = super().list_blobs(prefix)
            put(self, len(self._blobs), packs(len(self._blobs), 2))
            return listed

    index = ChunkIndex(Busy(), KEYS, tmp_path)
    for _ in range(3):
        index.refresh()
        assert index.lost == ()


@pytest.mark.parametrize("name", ["index/readme", "index/" + "A" * 3, "index/" + "0" * 63, "index/" + "g" * 64])
def test_foreign_blobs_among_the_index_are_passed_over(index: ChunkIndex, storage: MemoryStorage, name: str) -> None:
    storage.put(name.lower(), [b"?"])
    index.refresh()
    assert index.entries() == 0


@pytest.mark.parametrize("damage", [b"", b"garbage", None])
def test_a_cache_that_is_damaged_or_gone_is_rebuilt(
    storage: MemoryStorage, index: ChunkIndex, tmp_path: Path, damage: bytes | None
) -> None:
    group = packs(1, 100)
    put(storage, 1, group)
    index.refresh()
    for path in (tmp_path / "a" / "cache").glob("*.run"):
        path.unlink()
        if damage is not None:
            path.write_bytes(damage)
    again = ChunkIndex(storage, KEYS, tmp_path / "a" / "cache")
    again.refresh()
    assert again.lookup(list(places(group))) == list(places(group).values())


def test_another_repository_s_cache_is_never_used(storage: MemoryStorage, tmp_path: Path) -> None:
    group = packs(1, 10)
    put(storage, 1, group)
    ChunkIndex(storage, KEYS, tmp_path).refresh()
    other = ChunkIndex(MemoryStorage(), KEYS, tmp_path)
    other.refresh()
    assert other.lookup(list(places(group))) == [None] * 10


def test_a_cache_directory_that_can_not_be_used_is_typed(storage: MemoryStorage, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageError):
        ChunkIndex(storage, KEYS, tmp_path / "file").refresh()


def test_no_flipped_bit_of_a_run_names_a_wrong_place(tmp_path: Path) -> None:
    """Exhaustive: else a backup could refer to a chunk that is not there."""
    group = packs(1, 3, 2)
    truth = places(group)
    path = tmp_path / "x.run"
    good = b"".join(bytes(part) for part in encode_run(run_of([BlobHash(b"s" * 32)], group)))
    words = np.frombuffer(b"".join(truth), dtype="<u8").reshape(-1, 4)
    lost = 0
    for bit in range(8 * len(good)):
        data = bytearray(good)
        data[bit // 8] ^= 1 << bit % 8
        path.unlink(missing_ok=True)
        path.write_bytes(data)
        found: list[Placement | None] = [None] * len(truth)
        try:
            run = Run(path)
        except IndexCorrupt:
            lost += 1
            continue
        run.lookup(words[:, 0], words[:, 1], found)
        assert all(place in (None, right) for place, right in zip(found, truth.values(), strict=True))
        remade = merged([run.data(), run.data()])
        path.unlink()
        path.write_bytes(b"".join(bytes(part) for part in encode_run(remade)))
        again: list[Placement | None] = [None] * len(truth)
        Run(path).lookup(words[:, 0], words[:, 1], again)
        assert all(place in (None, right) for place, right in zip(again, truth.values(), strict=True)), "nor merged"
    assert lost > 8 * 64


def test_a_backup_with_a_damaged_cache_loses_nothing(tmp_path: Path) -> None:
    """What the cache no longer knows is stored again; what it says is true."""
    engine = Engine.fresh(tmp_path / "cache")
    content = pattern(1, 1 << 20)
    engine.backup(content)
    for number, path in enumerate(sorted((tmp_path / "cache").glob("*.run"))):
        data = bytearray(path.read_bytes())
        for at in range(64 + number, len(data), 97):
            data[at] ^= 0x40
        path.unlink()
        path.write_bytes(data)
    again = Engine(engine.storage, tmp_path / "cache")
    point = again.backup(content, vm_uuid="vm-2")
    assert Engine(engine.storage, tmp_path / "cold").read(point.disks[0]) == content
