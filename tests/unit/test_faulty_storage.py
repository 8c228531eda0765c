"""The faulty storage does what its script says: a fault kit that misses proves nothing."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import TYPE_CHECKING

import pytest

from tests.support.faulty_storage import Fault, FaultyStorage, Kind, Mode, SimulatedCrash
from xbfs_engine.core.errors import BlobExists, BlobNotFound, StorageError, StorageFull, StorageUnavailable
from xbfs_engine.storage.memory import MemoryStorage

if TYPE_CHECKING:
    from collections.abc import Callable

CALLS: dict[Kind, Callable[[FaultyStorage], object]] = {
    Kind.PUT: lambda storage: storage.put("b", [b"x"]),
    Kind.GET: lambda storage: storage.get("a"),
    Kind.READ: lambda storage: storage.read("a", 0, 1),
    Kind.SIZE: lambda storage: storage.size("a"),
    Kind.LIST: lambda storage: storage.list_blobs(""),
    Kind.DELETE: lambda storage: storage.delete("a"),
}


def faulty(*script: Fault) -> FaultyStorage:
    inner = MemoryStorage()
    inner.put("a", [b"old"])
    return FaultyStorage(inner, script)


def names(storage: FaultyStorage | MemoryStorage) -> set[str]:
    return {blob.name for blob in storage.list_blobs("")}


def inner_names(storage: FaultyStorage) -> set[str]:
    return {blob.name for blob in storage.inner.list_blobs("")}


@pytest.mark.parametrize("kind", Kind)
@pytest.mark.parametrize("mode", [Mode.BEFORE, Mode.AFTER])
def test_errors_come_before_or_after_the_effect(kind: Kind, mode: Mode) -> None:
    storage = faulty(Fault(mode, kind, error=StorageFull))
    with pytest.raises(StorageFull, match="injected"):
        CALLS[kind](storage)
    effect = {Kind.PUT: {"a", "b"}, Kind.DELETE: set()}
    assert inner_names(storage) == (effect.get(kind, {"a"}) if mode is Mode.AFTER else {"a"})
    assert storage.counts == {kind: 1}
    assert [fault.mode for fault in storage.injected] == [mode]


def test_the_nth_call_of_a_kind_fails_and_no_other() -> None:
    storage = faulty(Fault(Mode.BEFORE, Kind.GET, nth=3))
    for number in range(1, 6):
        storage.size("a")
        if number == 3:
            with pytest.raises(StorageUnavailable):
                storage.get("a")
        else:
            assert storage.get("a") == b"old"
    assert storage.counts == {Kind.GET: 5, Kind.SIZE: 5}


def test_the_nth_call_of_any_kind_fails() -> None:
    """As a loop over all calls of a run uses it."""
    for number in range(1, len(CALLS) + 1):
        storage = faulty(Fault(Mode.BEFORE, nth=number))
        for position, call in enumerate(CALLS.values(), start=1):
            if position == number:
                with pytest.raises(StorageUnavailable):
                    call(storage)
            else:
                call(storage)
        assert storage.counts.total() == len(CALLS)


def test_every_call_may_fail() -> None:
    storage = faulty(Fault(Mode.BEFORE, Kind.READ, nth=None))
    for _ in range(3):
        with pytest.raises(StorageUnavailable):
            storage.read("a", 0, 1)
    assert storage.get("a") == b"old"


def test_a_torn_put_leaves_nothing() -> None:
    storage = faulty(Fault(Mode.TORN, Kind.PUT))
    with pytest.raises(StorageUnavailable):
        storage.put("b", [b"0123", b"4567"])
    assert inner_names(storage) == {"a"}
    storage.put("b", [b"0123", b"4567"])
    assert storage.get("b") == b"01234567"


def test_a_truncated_put_leaves_half_and_readers_can_see_it() -> None:
    storage = faulty(Fault(Mode.TRUNCATED, Kind.PUT, nth=1), Fault(Mode.TRUNCATED_SILENT, Kind.PUT, nth=2))
    with pytest.raises(StorageUnavailable):
        storage.put("b", [b"0123", b"4567"])
    storage.put("c", [b"0123", b"4567"])
    for name in ("b", "c"):
        assert storage.get(name) == b"0123"
        with pytest.raises(StorageError, match="has 4 bytes"):
            storage.read(name, 0, 8)
    with pytest.raises(BlobExists):
        storage.put("b", [b"0123", b"4567"])


def test_a_hanging_call_goes_on_when_released() -> None:
    storage = faulty(Fault(Mode.HANG, Kind.GET))
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(storage.get, "a")
        assert storage.hanging.wait(10)
        assert storage.size("a") == 3
        assert not call.done()
        storage.release()
        assert call.result(10) == b"old"


def test_latency_delays_and_succeeds() -> None:
    slept: list[float] = []
    storage = FaultyStorage(MemoryStorage(), [Fault(Mode.LATENCY, nth=None, delay_s=0.25)], sleep=slept.append)
    storage.put("a", [b"x"])
    assert storage.get("a") == b"x"
    assert slept == [0.25, 0.25]


def test_a_stale_list_misses_what_was_put_lately() -> None:
    storage = faulty(Fault(Mode.STALE_LIST, Kind.LIST, nth=2, depth=2))
    for name in ("b", "c", "d"):
        storage.put(name, [b"x"])
    assert names(storage) == {"a", "b", "c", "d"}
    assert storage.counts.total() == 4
    assert names(storage) == {"a", "b", "c"}, "the two calls before were the put of d and a list"
    assert storage.get("d") == b"x"
    assert names(storage) == {"a", "b", "c", "d"}


@pytest.mark.parametrize(("mode", "left"), [(Mode.CRASH_BEFORE, {"a"}), (Mode.CRASH_AFTER, {"a", "b"})])
def test_after_a_crash_every_call_crashes(mode: Mode, left: set[str]) -> None:
    storage = faulty(Fault(mode, Kind.PUT))
    storage.get("a")
    with pytest.raises(SimulatedCrash):
        storage.put("b", [b"x"])
    counts = dict(storage.counts)
    for call in CALLS.values():
        with pytest.raises(SimulatedCrash):
            call(storage)
    assert inner_names(storage) == left
    assert storage.counts == counts


def test_a_crash_is_not_caught_as_an_error() -> None:
    assert not issubclass(SimulatedCrash, Exception)


def run(storage: FaultyStorage) -> list[str]:
    """A fixed series of calls and how each ended."""
    outcomes: list[str] = []
    for number in range(300):
        try:
            match number % 3:
                case 0:
                    storage.put(f"data/{number}", [b"x"])
                    outcomes.append("put")
                case 1:
                    outcomes.append(repr(storage.get(f"data/{number - 1}")))
                case _:
                    outcomes.append(f"{len(names(storage))}")
        except StorageError as exc:
            outcomes.append(type(exc).__name__)
    return outcomes


def test_the_same_seed_fails_the_same_way() -> None:
    slept: list[float] = []
    runs = [FaultyStorage(MemoryStorage(), seed=seed, rate=0.3, sleep=slept.append) for seed in (1, 1, 2)]
    outcomes = [run(storage) for storage in runs]
    assert outcomes[0] == outcomes[1] != outcomes[2]
    assert 60 <= len(runs[0].injected) <= 120
    assert {fault.mode for fault in runs[0].injected} == {
        *(Mode.BEFORE, Mode.AFTER, Mode.TORN, Mode.STALE_LIST, Mode.LATENCY)
    }
    assert slept
    assert BlobNotFound.__name__ in outcomes[0], "a put that failed was really not done"
    sizes = [int(outcome) for outcome in outcomes[0] if outcome.isdigit()]
    assert any(later < earlier for earlier, later in pairwise(sizes)), "some list was stale"


def test_without_rate_and_script_nothing_fails() -> None:
    storage = FaultyStorage(MemoryStorage(), seed=3)
    run(storage)
    assert storage.injected == []


def test_each_of_many_threads_calls_is_counted_once() -> None:
    storage = faulty(Fault(Mode.BEFORE, Kind.GET, nth=500))

    def get(_: int) -> bool:
        try:
            return storage.get("a") == b"old"
        except StorageUnavailable:
            return False

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(get, range(1000))) == 999
    assert storage.counts == {Kind.GET: 1000}
