"""What one run writes: claims, index blobs, and the order on the storage."""

from __future__ import annotations

from threading import Barrier, Thread
from typing import TYPE_CHECKING

import pytest

from tests.support.engine import CHUNK, LEAF, Engine, MemorySource, blobs, pattern
from xbfs_engine.core.ids import BlobHash
from xbfs_engine.store import session as session_module
from xbfs_engine.store.index_blob import get_index
from xbfs_engine.store.session import Place, WriteSession

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def engine(tmp_path: Path) -> Engine:
    return Engine.fresh(tmp_path / "cache")


def test_of_many_claims_one_wins(engine: Engine) -> None:
    session = WriteSession(engine.repository, engine.index)
    barrier = Barrier(8)
    won: list[tuple[Place, Place]] = []

    def claim(number: int) -> None:
        mine = Place(BlobHash(bytes([number]) * 32), number)
        barrier.wait()
        won.append((session.claim(b"id", mine), mine))

    threads = [Thread(target=claim, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({place for place, _ in won}) == 1
    assert sum(place is mine for place, mine in won) == 1


def test_index_blobs_are_written_while_a_run_goes_on(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the session's dictionary stays small, and a run that dies late is not lost work."""
    monkeypatch.setattr(session_module, "INDEX_ENTRIES_PER_BLOB", 32)
    content = pattern(1, 3 * LEAF)
    run = engine.run({0: (MemorySource.of(content), None)}, threads=1)
    import trio

    point = trio.run(run.run)
    assert len(blobs(engine.storage, "index/")) >= 3 * LEAF // CHUNK // 32
    assert not run._session._recent, "all of it is listed"
    assert engine.read(point.disks[0]) == content


def test_every_pack_is_listed_once_with_its_size(engine: Engine) -> None:
    engine.backup(pattern(1, 2 * LEAF), pattern(2, CHUNK))
    engine.backup(pattern(3, LEAF), new_chain=True)
    listed = {}
    for name in blobs(engine.storage, "index/"):
        for pack in get_index(engine.storage, engine.repository.keys, BlobHash(bytes.fromhex(name[6:]))):
            assert pack.pack not in listed
            listed[pack.pack] = pack.size_bytes
    stored = {**blobs(engine.storage, "data/"), **blobs(engine.storage, "meta/")}
    assert {pack.hex(): size for pack, size in listed.items()} == {n[-64:]: len(data) for n, data in stored.items()}


def test_what_a_run_says_it_stored_is_what_is_there(engine: Engine) -> None:
    point = engine.backup(pattern(1, LEAF), pattern(2, 3 * CHUNK))
    assert point.run.stored_bytes == sum(map(len, blobs(engine.storage, "data/").values()))
    assert point.run.metadata_bytes == sum(map(len, blobs(engine.storage, "meta/").values()))
    assert point.run.packs == len(blobs(engine.storage, "data/")) + len(blobs(engine.storage, "meta/"))
