"""Packs as written: what a writer puts, a reader finds, byte for byte and nothing else."""

from __future__ import annotations

import pytest
import zstandard

from tests.support.engine import blobs
from tests.support.runtime import SeededRandom
from tools.make_vectors import filler, fixed_keys
from xbfs_engine.codec.compress import Encoding
from xbfs_engine.codec.envelope import HEADER_SIZE, ObjectKind
from xbfs_engine.core.errors import BlobLost, PackCorrupt
from xbfs_engine.core.ids import BlobHash
from xbfs_engine.core.limits import CHUNK_SIZE_MAX, MIB, PACK_ENTRIES_TARGET, PACK_SIZE_MAX
from xbfs_engine.storage.memory import MemoryStorage
from xbfs_engine.store.pack import blob_hash, open_pack, open_pack_bytes, pack_name
from xbfs_engine.store.packer import PackWriter
from xbfs_engine.store.reader import open_chunk

KEYS = fixed_keys()
DATA = ObjectKind.DATA_PACK


@pytest.fixture
def storage() -> MemoryStorage:
    return MemoryStorage()


def writer_to(storage: MemoryStorage, target: int = MIB) -> PackWriter:
    return PackWriter(storage, KEYS, SeededRandom(1), DATA, target_bytes=target)


def add(writer: PackWriter, data: bytes) -> int:
    return writer.add(KEYS.chunk_id(data), data, len(data), Encoding.RAW)


@pytest.mark.parametrize("size", [1, 16, 65536, CHUNK_SIZE_MAX])
def test_what_was_added_is_read_back(storage: MemoryStorage, size: int) -> None:
    writer = writer_to(storage)
    plaintexts = [filler(f"{size} {number}", size) for number in range(3 if size == CHUNK_SIZE_MAX else 10)]
    for number, data in enumerate(plaintexts):
        if writer.full:
            break
        assert add(writer, data) == number == writer.count - 1
    ticket = writer.ticket
    assert ticket.pack is None
    sealed = writer.seal()
    assert sealed is not None
    assert ticket.pack == sealed.pack
    assert writer.count == 0
    ((name, blob),) = blobs(storage).items()
    assert name == pack_name(DATA, sealed.pack) == f"data/{blob_hash(blob).hex()[:2]}/{blob_hash(blob).hex()}"
    assert sealed.size_bytes == len(blob)
    pack = open_pack(storage, KEYS, DATA, sealed.pack)
    assert pack.directory == open_pack_bytes(KEYS, DATA, sealed.pack, blob).directory
    assert [pack.directory.id_at(n) for n in range(len(sealed))] == [
        KEYS.chunk_id(d) for d in plaintexts[: len(sealed)]
    ]
    for ordinal in range(len(sealed)):
        start = pack.directory.offsets[ordinal]
        stored = blob[start : start + pack.directory.stored[ordinal]]
        assert open_chunk(pack, ordinal, stored, KEYS.chunk_id, zstandard.ZstdDecompressor()) == plaintexts[ordinal]


def test_an_empty_pack_is_never_put(storage: MemoryStorage) -> None:
    writer = writer_to(storage)
    assert writer.seal() is None
    add(writer, b"x")
    assert writer.seal() is not None
    assert writer.seal() is None
    assert len(blobs(storage)) == 1


def test_a_pack_is_full_by_size_or_by_ordinals(storage: MemoryStorage) -> None:
    by_size = writer_to(storage, target=1000)
    add(by_size, bytes(983))
    assert not by_size.full
    add(by_size, b"x")
    assert by_size.full
    by_count = writer_to(storage, target=8 * MIB)
    for _ in range(PACK_ENTRIES_TARGET):
        assert not by_count.full
        by_count.add(bytes(32), b"x", 1, Encoding.RAW)
    assert by_count.full
    sealed = by_count.seal()
    assert sealed is not None
    assert len(open_pack(storage, KEYS, DATA, sealed.pack).directory) == PACK_ENTRIES_TARGET


def test_each_pack_has_a_key_of_its_own(storage: MemoryStorage) -> None:
    """The same chunks twice: nothing of the two packs' ciphertext is the same."""
    writer = writer_to(storage)
    for _ in range(2):
        add(writer, bytes(1000))
        writer.seal()
    first, second = blobs(storage).values()
    assert first[:16] == second[:16], "magic to epoch"
    for part in (slice(16, 48), slice(48, 96), slice(96, 128), slice(128, 1144), slice(1144, -16)):
        assert len(first[part]) >= 32
        assert first[part] != second[part]


def test_the_same_chunks_in_two_places_of_a_pack_differ(storage: MemoryStorage) -> None:
    writer = writer_to(storage)
    add(writer, bytes(64))
    add(writer, bytes(64))
    sealed = writer.seal()
    assert sealed is not None
    (blob,) = blobs(storage).values()
    assert blob[HEADER_SIZE : HEADER_SIZE + 80] != blob[HEADER_SIZE + 80 : HEADER_SIZE + 160]


def test_a_missing_pack_is_lost(storage: MemoryStorage) -> None:
    with pytest.raises(BlobLost):
        open_pack(storage, KEYS, DATA, BlobHash(bytes(32)))


@pytest.mark.parametrize("size", [0, 143, PACK_SIZE_MAX + 1])
def test_an_impossible_size_is_refused_before_anything_is_read(storage: MemoryStorage, size: int) -> None:
    with pytest.raises(PackCorrupt, match="impossible size"):
        open_pack(storage, KEYS, DATA, BlobHash(bytes(32)), size)


def test_a_pack_of_the_other_kind_is_refused(storage: MemoryStorage) -> None:
    writer = writer_to(storage)
    add(writer, b"x")
    sealed = writer.seal()
    assert sealed is not None
    (blob,) = blobs(storage).values()
    with pytest.raises(PackCorrupt, match="kind"):
        open_pack_bytes(KEYS, ObjectKind.METADATA_PACK, sealed.pack, blob)
