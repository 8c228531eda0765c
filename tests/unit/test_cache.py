"""Decoded chunks: fetched once, kept within a bound, never wrong, and nobody waits for ever."""

from __future__ import annotations

import random  # noqa: TID251 - seeded
import threading
import time
from typing import TYPE_CHECKING

import pytest

from xbfs_engine.core.errors import ChunkCorrupt
from xbfs_engine.core.ids import BlobHash, ChunkRef
from xbfs_engine.store.cache import ChunkCache

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from xbfs_engine.codec.compress import Buffer
    from xbfs_engine.codec.envelope import ObjectKind

SIZE = 1000


def ref(number: int) -> ChunkRef:
    return ChunkRef(number.to_bytes(32, "big"), BlobHash(bytes(32)), number)


def data(number: int) -> bytes:
    return number.to_bytes(2, "big") * (SIZE // 2)


class FakeReader:
    """Chunks of 1000 bytes; ``before`` is called in every fetch; notes every batch."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.before: Callable[[list[int]], None] = lambda numbers: None

    def fetch(self, refs: Sequence[ChunkRef], kind: ObjectKind) -> list[Buffer]:
        numbers = [wanted.ordinal for wanted in refs]
        self.batches.append(numbers)
        self.before(numbers)
        return [data(number) for number in numbers]


def wait_for(event: threading.Event) -> None:
    assert event.wait(10)


def cache_of(reader: FakeReader, capacity: int = 100 * SIZE, patience_s: float = 10) -> ChunkCache:
    return ChunkCache(reader, capacity, patience_s=patience_s)  # type: ignore[arg-type]  # a fake


def test_what_is_missing_is_fetched_in_one_batch() -> None:
    reader = FakeReader()
    cache = cache_of(reader)
    cache.get([ref(2)])
    assert cache.get([ref(1), ref(2), ref(3), ref(1)]) == [data(1), data(2), data(3), data(1)]
    assert reader.batches == [[2], [1, 3]]
    assert cache.cached(ref(3).id) == data(3)
    assert cache.cached(ref(4).id) is None
    assert (cache.hits, cache.misses) == (2, 3)
    assert cache.get([]) == []


def test_the_chunks_used_last_are_kept_within_the_bound() -> None:
    reader = FakeReader()
    cache = cache_of(reader, 3 * SIZE)
    cache.get([ref(1), ref(2), ref(3)])
    cache.cached(ref(1).id)
    cache.get([ref(4)])
    assert [number for number in range(1, 5) if cache.cached(ref(number).id)] == [1, 3, 4]
    assert cache.used_bytes == 3 * SIZE
    assert cache.get([ref(number) for number in range(10)]) == [data(number) for number in range(10)]
    assert cache.used_bytes == 3 * SIZE


@pytest.mark.parametrize("capacity", [0, 1, SIZE])
def test_a_cache_too_small_for_anything_still_answers(capacity: int) -> None:
    cache = cache_of(FakeReader(), capacity)
    for _ in range(2):
        assert cache.get([ref(1), ref(2), ref(1)]) == [data(1), data(2), data(1)]
        assert cache.used_bytes <= capacity


def test_many_threads_wanting_one_chunk_fetch_it_once() -> None:
    reader = FakeReader()
    release = threading.Event()
    reader.before = lambda numbers: wait_for(release)
    cache = cache_of(reader)
    answers: list[list[Buffer]] = []
    threads = [threading.Thread(target=lambda: answers.append(cache.get([ref(1), ref(2)]))) for _ in range(8)]
    for thread in threads:
        thread.start()
    while not reader.batches:
        time.sleep(0.001)
    time.sleep(0.05)
    release.set()
    for thread in threads:
        thread.join(10)
    assert answers == [[data(1), data(2)]] * 8
    assert reader.batches == [[1, 2]]


def test_overlapping_batches_fetch_each_chunk_once() -> None:
    reader = FakeReader()
    release = threading.Event()
    reader.before = lambda numbers: wait_for(release) if 1 in numbers else None
    cache = cache_of(reader)
    first = threading.Thread(target=cache.get, args=([ref(1), ref(2)],))
    first.start()
    while not reader.batches:
        time.sleep(0.001)
    second: list[list[Buffer]] = []
    thread = threading.Thread(target=lambda: second.append(cache.get([ref(2), ref(3)])))
    thread.start()
    while len(reader.batches) < 2:
        time.sleep(0.001)
    release.set()
    first.join(10)
    thread.join(10)
    assert second == [[data(2), data(3)]]
    assert reader.batches == [[1, 2], [3]]


def test_an_error_reaches_who_fetched_and_others_try_themselves() -> None:
    reader = FakeReader()
    started, release = threading.Event(), threading.Event()

    def fail_once(numbers: list[int]) -> None:
        if len(reader.batches) == 1:
            started.set()
            assert release.wait(10)
            raise ChunkCorrupt("bad")

    reader.before = fail_once
    cache = cache_of(reader)
    errors: list[ChunkCorrupt] = []

    def fetch() -> None:
        try:
            cache.get([ref(1)])
        except ChunkCorrupt as exc:
            errors.append(exc)

    first = threading.Thread(target=fetch)
    first.start()
    assert started.wait(10)
    answers: list[list[Buffer]] = []
    second = threading.Thread(target=lambda: answers.append(cache.get([ref(1)])))
    second.start()
    time.sleep(0.05)
    release.set()
    first.join(10)
    second.join(10)
    assert len(errors) == 1
    assert answers == [[data(1)]]
    assert cache.get([ref(1)]) == [data(1)]
    assert len(reader.batches) == 2


def test_nobody_waits_long_for_a_fetch_that_hangs() -> None:
    reader = FakeReader()
    release = threading.Event()
    reader.before = lambda numbers: wait_for(release) if len(reader.batches) == 1 else None
    cache = cache_of(reader, patience_s=0.2)
    hung = threading.Thread(target=cache.get, args=([ref(1)],))
    hung.start()
    while not reader.batches:
        time.sleep(0.001)
    started = time.monotonic()
    assert cache.get([ref(1)]) == [data(1)]
    assert time.monotonic() - started >= 0.15
    release.set()
    hung.join(10)
    assert cache.used_bytes == SIZE


def test_after_patience_is_over_nobody_waits_at_all() -> None:
    reader = FakeReader()
    release = threading.Event()

    def hang(numbers: list[int]) -> None:
        if len(reader.batches) == 1:
            release.wait(10)
        else:
            raise ChunkCorrupt("asked itself")

    reader.before = hang
    cache = cache_of(reader, patience_s=0.1)
    hung = threading.Thread(target=cache.get, args=([ref(1)],))
    hung.start()
    while not reader.batches:
        time.sleep(0.001)
    time.sleep(0.15)
    started = time.monotonic()
    for _ in range(10):
        with pytest.raises(ChunkCorrupt):
            cache.get([ref(1)])
    assert time.monotonic() - started < 0.1 * 5
    release.set()
    hung.join(10)


def test_threads_at_random_get_the_right_bytes() -> None:
    reader = FakeReader()
    cache = cache_of(reader, 20 * SIZE)
    wrong: list[int] = []

    def use(seed: int) -> None:
        seeded = random.Random(seed)
        for _ in range(300):
            numbers = [seeded.randrange(40) for _ in range(seeded.randrange(1, 8))]
            if cache.get([ref(number) for number in numbers]) != [data(number) for number in numbers]:
                wrong.append(seed)
            found = cache.cached(ref(numbers[0]).id)
            if found is not None and found != data(numbers[0]):
                wrong.append(seed)

    threads = [threading.Thread(target=use, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert wrong == []
    assert cache.used_bytes <= 20 * SIZE
