"""Verified reads: order, neighbours, stale hints, and that damage never passes for data."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from tests.support.engine import CHUNK, LEAF, Engine, pattern
from tests.support.faulty_storage import FaultyStorage, Kind
from xbfs_engine.codec.envelope import HEADER_SIZE, ObjectKind
from xbfs_engine.codec.keys import KeyPair, Role
from xbfs_engine.core.errors import BlobLost, ChunkCorrupt, FormatTooNew, KeyNotHeld, PackCorrupt
from xbfs_engine.core.ids import BlobHash, ChunkRef, Placement
from xbfs_engine.storage.memory import MemoryStorage
from xbfs_engine.store.pack import pack_name
from xbfs_engine.store.reader import ChunkReader

if TYPE_CHECKING:
    from pathlib import Path

    from xbfs_engine.codec.keys import KeySet

DATA = ObjectKind.DATA_PACK
CHUNKS = 40
CONTENT = pattern(1, CHUNKS * CHUNK)


@pytest.fixture
def engine(tmp_path: Path) -> Engine:
    engine = Engine.fresh(tmp_path / "cache", FaultyStorage(MemoryStorage()))
    engine.backup(CONTENT, threads=1)
    return engine


@pytest.fixture
def refs(engine: Engine) -> list[ChunkRef]:
    leaf = engine.block_map(engine.points()[0].disks[0]).leaf(0)
    assert leaf is not None
    return [ref for _, ref in leaf.children()]


@pytest.fixture
def reader(engine: Engine) -> ChunkReader:
    return ChunkReader(engine.storage, engine.repository.keys)


def chunk(number: int) -> bytes:
    return CONTENT[number * CHUNK : (number + 1) * CHUNK]


def replace_blob(engine: Engine, name: str, data: bytes) -> None:
    engine.storage.delete(name)
    engine.storage.put(name, [data])


@pytest.mark.parametrize("order", [range(CHUNKS), range(CHUNKS - 1, -1, -1), [3, 3, 17, 3, 0, 39, 17], [5], []])
def test_plaintexts_come_in_the_order_asked_for(reader: ChunkReader, refs: list[ChunkRef], order: list[int]) -> None:
    assert [bytes(data) for data in reader.fetch([refs[n] for n in order], DATA)] == [chunk(n) for n in order]


def test_neighbours_are_read_at_once(engine: Engine, reader: ChunkReader, refs: list[ChunkRef]) -> None:
    packs = {ref.pack for ref in refs}
    reader.fetch(refs, DATA)
    before = engine.storage.counts[Kind.READ]  # type: ignore[attr-defined]  # a FaultyStorage
    reader.fetch(refs, DATA)
    assert engine.storage.counts[Kind.READ] - before == len(packs) == 3  # type: ignore[attr-defined]  # as above


def test_a_stale_hint_is_made_good_by_the_index(engine: Engine, refs: list[ChunkRef]) -> None:
    reader = ChunkReader(engine.storage, engine.repository.keys, engine.index)
    lost = ChunkRef(refs[0].id, BlobHash(b"x" * 32), 0)
    moved = ChunkRef(refs[1].id, refs[39].pack, 1)
    assert [bytes(data) for data in reader.fetch([lost, moved], DATA)] == [chunk(0), chunk(1)]


@pytest.mark.parametrize("ordinal", [1, 15, 0xFFFF])
def test_a_wrong_hint_alone_is_corrupt_not_wrong(reader: ChunkReader, refs: list[ChunkRef], ordinal: int) -> None:
    with pytest.raises(ChunkCorrupt):
        reader.fetch([refs[0]._replace(ordinal=ordinal)], DATA)


def test_an_index_that_is_wrong_too_is_an_error(engine: Engine, refs: list[ChunkRef]) -> None:
    class Wrong:
        def locate(self, chunk_id: bytes) -> Placement:
            return Placement(refs[20].pack, 0)

    reader = ChunkReader(engine.storage, engine.repository.keys, Wrong())
    with pytest.raises(BlobLost):
        reader.fetch([refs[0]._replace(pack=BlobHash(b"x" * 32))], DATA)


def test_a_missing_pack_is_lost_before_and_after_it_was_opened(engine: Engine, refs: list[ChunkRef]) -> None:
    keys = engine.repository.keys
    opened = ChunkReader(engine.storage, keys)
    opened.fetch(refs[:1], DATA)
    engine.storage.delete(pack_name(DATA, refs[0].pack))
    for reader in (opened, ChunkReader(engine.storage, keys)):
        with pytest.raises(BlobLost):
            reader.fetch(refs[:1], DATA)
        with pytest.raises(BlobLost):
            reader.fetch(refs[:3], DATA)


def test_a_damaged_chunk_is_told_and_its_neighbours_are_read(engine: Engine, refs: list[ChunkRef]) -> None:
    name = pack_name(DATA, refs[0].pack)
    blob = bytearray(engine.storage.get(name))
    blob[HEADER_SIZE + 5] ^= 1
    replace_blob(engine, name, bytes(blob))
    reader = ChunkReader(engine.storage, engine.repository.keys)
    with pytest.raises(ChunkCorrupt, match="chunk 0"):
        reader.fetch(refs[:2], DATA)
    assert bytes(reader.fetch([refs[1]], DATA)[0]) == chunk(1)


@pytest.mark.parametrize("at", [0, 8, 9, 10, 12, 40, 100, -1, -9, -16, -40])
def test_a_damaged_header_footer_or_directory_is_told(engine: Engine, refs: list[ChunkRef], at: int) -> None:
    name = pack_name(DATA, refs[0].pack)
    blob = bytearray(engine.storage.get(name))
    blob[at] ^= 0x80
    replace_blob(engine, name, bytes(blob))
    with pytest.raises((PackCorrupt, FormatTooNew)):
        ChunkReader(engine.storage, engine.repository.keys).fetch(refs[:1], DATA)


@pytest.mark.parametrize("size", [0, 1, 127, 143, 144, 200, 70_000])
def test_a_truncated_pack_is_told(engine: Engine, refs: list[ChunkRef], size: int) -> None:
    name = pack_name(DATA, refs[0].pack)
    replace_blob(engine, name, engine.storage.get(name)[:size])
    with pytest.raises(PackCorrupt):
        ChunkReader(engine.storage, engine.repository.keys).fetch(refs[:1], DATA)


def test_packs_swapped_under_each_other_s_names_are_told(engine: Engine, refs: list[ChunkRef]) -> None:
    names = [pack_name(DATA, refs[n].pack) for n in (0, 20)]
    contents = [engine.storage.get(name) for name in names]
    for name, data in zip(names, reversed(contents), strict=True):
        replace_blob(engine, name, data)
    with pytest.raises(ChunkCorrupt):
        ChunkReader(engine.storage, engine.repository.keys).fetch(refs[:1], DATA)


def node_role(keys: KeySet) -> KeySet:
    epochs = tuple(replace(epoch, data=KeyPair(epoch.data.public, None)) for epoch in keys.epochs)
    return replace(keys, role=Role.NODE, epochs=epochs)


def test_a_node_reads_maps_but_no_chunk(engine: Engine, refs: list[ChunkRef]) -> None:
    reader = ChunkReader(engine.storage, node_role(engine.repository.keys))
    with pytest.raises(KeyNotHeld):
        reader.fetch(refs[:1], DATA)
    root = engine.points()[0].disks[0].root
    assert root is not None
    assert reader.fetch([root.ref], ObjectKind.METADATA_PACK)


def test_a_chunk_never_passes_for_a_node(engine: Engine, refs: list[ChunkRef], reader: ChunkReader) -> None:
    with pytest.raises((BlobLost, PackCorrupt)):
        reader.fetch(refs[:1], ObjectKind.METADATA_PACK)


def test_a_node_role_can_write_what_only_the_owner_reads(engine: Engine, tmp_path: Path) -> None:
    node = Engine.of(replace(engine.repository, keys=node_role(engine.repository.keys)), tmp_path / "node")
    point = node.backup(pattern(9, LEAF), vm_uuid="vm-2")
    assert engine.read(point.disks[0]) == pattern(9, LEAF)
    clone = node.backup(CONTENT, vm_uuid="vm-3")
    assert clone.disks[0].statistics.new_bytes == 0, "and deduplicates against what it can not read"
