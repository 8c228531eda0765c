"""What every Storage guarantees (storage/base.py), asked of every backend."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Barrier, Event
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.faulty_storage import FaultyStorage
from xbfs_engine.core.errors import BlobExists, BlobNotFound, StorageError
from xbfs_engine.storage.base import BlobInfo
from xbfs_engine.storage.local import LocalStorage
from xbfs_engine.storage.memory import MemoryStorage

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from xbfs_engine.storage.base import Storage

BAD_NAMES = [
    *("", "/", "/a", "a/", "a//b", ".", "..", "a/..", "../a", "a..b", "a/./b", ".a", "-a", "_a", "a/.b"),
    *("A", "a b", "a\n", "a\0", "ä", "a\\b", "a/b/c/d/e", "a" * 201, "/".join(["a" * 67] * 3), "tmp", "tmp/a"),
]
BAD_PREFIXES = ["a", "/", "../", "a//", "A/", "tmp/", "a/b/c/d/", ".", "a/.b/", "a" * 201 + "/"]
GOOD_NAMES = ["a", "0", "a.b-c_d", "data/ab/abcdef", "a/b/c/d", "a" * 200, "config/00000001", "tmpx/tmp"]


@pytest.fixture(params=["memory", "local", "faultless"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    match request.param:
        case "memory":
            return MemoryStorage()
        case "local":
            return LocalStorage(tmp_path / "not" / "yet")
        case _:
            return FaultyStorage(MemoryStorage())


def names(storage: Storage, prefix: str = "") -> list[str]:
    return sorted(blob.name for blob in storage.list_blobs(prefix))


@pytest.mark.parametrize("name", GOOD_NAMES)
def test_what_was_put_is_read_listed_and_deleted(storage: Storage, name: str) -> None:
    storage.put(name, [b"hello"])
    assert storage.get(name) == b"hello"
    assert storage.size(name) == 5
    assert list(storage.list_blobs("")) == [BlobInfo(name, 5)]
    storage.delete(name)
    assert names(storage) == []


def test_parts_are_joined_whatever_their_kind(storage: Storage) -> None:
    words = np.arange(5, dtype="<u4")
    grid = np.arange(6, dtype="u1").reshape(2, 3)
    parts: list[Buffer] = [
        b"",
        b"bytes",
        bytearray(b"array"),
        memoryview(b"xviewx")[1:5],
        words.data,
        grid.data,
        memoryview(b""),
    ]
    storage.put("a", parts)
    assert storage.get("a") == b"bytesarrayview" + words.tobytes() + grid.tobytes()


def test_parts_may_be_many_and_uneven(storage: Storage) -> None:
    parts = [bytes([number % 251]) * (number % 7) for number in range(5000)]
    storage.put("a", parts)
    assert storage.get("a") == b"".join(parts)


def test_a_blob_may_be_big(storage: Storage) -> None:
    data = np.random.default_rng(1).bytes(9 << 20)
    storage.put("a", [data[: 5 << 20], data[5 << 20 :]])
    assert storage.get("a") == data
    assert storage.read("a", (5 << 20) - 10, 1 << 20) == data[(5 << 20) - 10 : (6 << 20) - 10]


@pytest.mark.parametrize("parts", [[], [b""], [b"", bytearray()]])
def test_a_blob_may_be_empty(storage: Storage, parts: list[bytes]) -> None:
    storage.put("a", parts)
    assert storage.get("a") == b""
    assert storage.size("a") == 0
    assert storage.read("a", 0, 0) == b""
    assert list(storage.list_blobs("")) == [BlobInfo("a", 0)]
    with pytest.raises(StorageError):
        storage.read("a", 0, 1)
    with pytest.raises(BlobExists):
        storage.put("a", [b"x"])


def test_a_later_change_of_the_buffer_does_not_reach_the_blob(storage: Storage) -> None:
    buffer = bytearray(b"before")
    storage.put("a", [buffer])
    buffer[:] = b"after!"
    assert storage.get("a") == b"before"


def test_blobs_are_write_once(storage: Storage) -> None:
    storage.put("a/b", [b"first"])
    with pytest.raises(BlobExists):
        storage.put("a/b", [b"second, longer"])
    assert storage.get("a/b") == b"first"
    assert list(storage.list_blobs("")) == [BlobInfo("a/b", 5)]


def test_every_range_is_read_exactly(storage: Storage) -> None:
    data = bytes(range(40))
    storage.put("a", [data])
    for offset in range(41):
        for length in range(41 - offset):
            assert storage.read("a", offset, length) == data[offset : offset + length]


@pytest.mark.parametrize(
    ("offset", "length"),
    [(0, 11), (10, 1), (11, 0), (9, 2), (-1, 1), (-1, 0), (0, -1), (5, -2), (1 << 70, 1), (0, 1 << 70), (1 << 63, 0)],
)
def test_reading_beyond_the_end_is_an_error_with_the_facts(storage: Storage, offset: int, length: int) -> None:
    storage.put("a/blob", [bytes(10)])
    with pytest.raises(StorageError, match=rf"a/blob.* 10 bytes.* {length} .*{offset}") as caught:
        storage.read("a/blob", offset, length)
    assert not isinstance(caught.value, BlobNotFound)
    assert storage.read("a/blob", 0, 10) == bytes(10)


def test_an_absent_blob_is_not_found(storage: Storage) -> None:
    storage.put("a/b", [b"x"])
    for name in ("a/c", "b", "a", "a/b/c"):
        for call in (storage.get, storage.size, storage.delete, lambda name: storage.read(name, 0, 0)):
            with pytest.raises(BlobNotFound):
                call(name)
    assert storage.get("a/b") == b"x"


def test_a_deleted_blob_is_gone_for_every_method_and_may_come_back(storage: Storage) -> None:
    storage.put("a", [b"old"])
    assert storage.read("a", 0, 3) == b"old"
    storage.delete("a")
    for call in (storage.get, storage.size, storage.delete, lambda name: storage.read(name, 0, 3)):
        with pytest.raises(BlobNotFound):
            call("a")
    storage.put("a", [b"newer"])
    assert storage.read("a", 0, 5) == storage.get("a") == b"newer"


def test_a_prefix_lists_what_is_below_it_and_nothing_else(storage: Storage) -> None:
    blobs = ["data/ab/1", "data/ab/2", "data/ac/1", "data2/x", "data-x", "index/1", "data/z"]
    for name in blobs:
        storage.put(name, [name.encode()])
    assert sorted(storage.list_blobs("")) == sorted(BlobInfo(name, len(name)) for name in blobs)
    assert names(storage, "data/") == ["data/ab/1", "data/ab/2", "data/ac/1", "data/z"]
    assert names(storage, "data/ab/") == ["data/ab/1", "data/ab/2"]
    assert names(storage, "index/") == ["index/1"]
    assert names(storage, "nothing/") == names(storage, "data/ad/") == names(storage, "data-x/") == []


def test_an_empty_storage_lists_nothing(storage: Storage) -> None:
    assert names(storage) == names(storage, "data/") == []


def test_a_list_may_be_consumed_while_its_blobs_are_deleted(storage: Storage) -> None:
    for number in range(50):
        storage.put(f"a/{number}", [b"x"])
    for blob in storage.list_blobs("a/"):
        storage.delete(blob.name)
    assert names(storage) == []


@pytest.mark.parametrize("name", BAD_NAMES)
def test_a_bad_name_is_refused_by_every_method(storage: Storage, name: str) -> None:
    for call in (
        lambda: storage.put(name, [b"x"]),
        lambda: storage.get(name),
        lambda: storage.read(name, 0, 0),
        lambda: storage.size(name),
        lambda: storage.delete(name),
    ):
        with pytest.raises(StorageError, match="blob name"):
            call()
    assert names(storage) == []


@pytest.mark.parametrize("prefix", BAD_PREFIXES)
def test_a_bad_prefix_is_refused_at_the_call(storage: Storage, prefix: str) -> None:
    with pytest.raises(StorageError, match="prefix"):
        storage.list_blobs(prefix)


def test_of_many_puts_of_one_name_exactly_one_wins(storage: Storage) -> None:
    writers, rounds = 8, 10
    barrier = Barrier(writers, timeout=30)

    def put(writer: int, number: int) -> str:
        barrier.wait()
        try:
            storage.put(f"data/{number}", [bytes([writer]) * 1000, bytes([writer]) * 1000])
        except BlobExists:
            return "exists"
        return f"won by {writer}"

    with ThreadPoolExecutor(writers) as pool:
        for number in range(rounds):
            outcomes = Counter(pool.map(put, range(writers), [number] * writers))
            [winner] = set(outcomes) - {"exists"}
            assert outcomes == {"exists": writers - 1, winner: 1}
            assert storage.get(f"data/{number}") == bytes([int(winner.split()[-1])]) * 2000


def test_readers_see_nothing_or_everything_while_writers_write(storage: Storage) -> None:
    data, count, done = b"0123456789abcdef" * 20_000, 30, Event()

    def write() -> None:
        try:
            for number in range(count):
                storage.put(f"data/{number}", [data[:7], data[7:]])
        finally:
            done.set()

    def watch() -> None:
        while not done.is_set():
            blobs = list(storage.list_blobs("data/"))
            for blob in blobs:
                assert blob.size_bytes == storage.size(blob.name) == len(data)
                assert storage.read(blob.name, len(data) - 16, 16) == data[-16:]
            with suppress(BlobNotFound):
                assert storage.get(f"data/{len(blobs)}") == data

    with ThreadPoolExecutor(3) as pool:
        watchers = [pool.submit(watch) for _ in range(2)]
        pool.submit(write).result(timeout=30)
        for watcher in watchers:
            watcher.result(timeout=30)
    assert len(names(storage)) == count


def test_a_put_is_seen_at_once_by_other_threads(storage: Storage) -> None:
    with ThreadPoolExecutor(1) as other:
        for number in range(20):
            storage.put(f"a/{number}", [b"x"])
            assert other.submit(storage.get, f"a/{number}").result() == b"x"
            assert len(other.submit(names, storage, "a/").result()) == number + 1


def test_location_is_for_people(storage: Storage) -> None:
    assert storage.location().isprintable()
    assert storage.location()


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["put", "delete", "read"]),
        st.sampled_from(["a", "b/a", "b/c/a"]),
        st.binary(max_size=6),
        st.integers(-1, 7),
        st.integers(-1, 7),
    ),
    max_size=20,
)


@pytest.mark.parametrize("kind", ["memory", "local"])
@settings(max_examples=60, deadline=None)
@given(steps=STEPS)
def test_any_sequence_of_calls_behaves_like_a_dictionary(
    kind: str, steps: list[tuple[str, str, bytes, int, int]]
) -> None:
    model: dict[str, bytes] = {}
    with TemporaryDirectory() as root:
        storage: Storage = MemoryStorage() if kind == "memory" else LocalStorage(Path(root))
        for step, name, data, offset, length in steps:
            known = model.get(name)
            in_range = known is not None and min(offset, length) >= 0 and offset + length <= len(known)
            outcome: object
            try:
                match step:
                    case "put":
                        storage.put(name, [data[:2], data[2:]])
                        outcome = model.setdefault(name, data) is data
                    case "delete":
                        storage.delete(name)
                        outcome = model.pop(name) is known
                    case _:
                        got = storage.read(name, offset, length)
                        outcome = known is not None and in_range and got == known[offset : offset + length]
            except BlobExists:
                outcome = step == "put" and known is not None
            except BlobNotFound:
                outcome = step != "put" and known is None
            except StorageError:
                outcome = step == "read" and known is not None and not in_range
            assert outcome is True
            assert {blob.name: storage.get(blob.name) for blob in storage.list_blobs("")} == model
