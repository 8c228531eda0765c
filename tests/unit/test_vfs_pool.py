"""Threads that read: priority, growth when they are stuck, deadlines, parking, and an end."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import pytest
import trio

from tests.support.faulty_storage import Fault, FaultyStorage, Kind, Mode
from tests.support.runtime import FixedClock
from xbfs.vfs.gate import BlobStalled, Gate
from xbfs.vfs.pool import GROW_AFTER_S, QUIET_TICKS, ReadPool
from xbfs_engine.core.errors import ChunkCorrupt, StorageTimeout
from xbfs_engine.core.runtime import SystemClock
from xbfs_engine.storage.memory import MemoryStorage

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

LONG_S = 30.0


Make = Callable[..., ReadPool]


@pytest.fixture
async def make(nursery: trio.Nursery) -> AsyncIterator[Make]:
    pools: list[ReadPool] = []

    def made(*, threads: int, threads_max: int, backlog: int = 16) -> ReadPool:
        pools.append(ReadPool(threads=threads, threads_max=threads_max, backlog=backlog))
        nursery.start_soon(pools[-1].tend)
        return pools[-1]

    yield made
    for pool in pools:
        pool.close()


@pytest.fixture
async def pool(make: Make) -> ReadPool:
    return make(threads=2, threads_max=5, backlog=3)


async def until(condition: Callable[[], bool]) -> None:
    while not condition():  # noqa: ASYNC110 - nothing tells
        await trio.sleep(0.01)


async def test_results_and_errors_come_back(pool: ReadPool) -> None:
    assert await pool.run(lambda: 7, LONG_S) == 7

    def fail() -> None:
        raise ChunkCorrupt("bad")

    with pytest.raises(ChunkCorrupt, match="bad"):
        await pool.run(fail, LONG_S)
    assert pool.size == 2


async def test_calls_run_at_the_same_time(pool: ReadPool) -> None:
    barrier = threading.Barrier(2, timeout=10)
    async with trio.open_nursery() as nursery:
        for _ in range(2):
            nursery.start_soon(pool.run, barrier.wait, LONG_S)


async def test_stuck_threads_are_replaced_up_to_a_limit_and_superfluous_ones_end(pool: ReadPool) -> None:
    release = threading.Event()

    async def stuck() -> None:
        assert await pool.run(partial(release.wait, 20), LONG_S)

    async with trio.open_nursery() as nursery:
        for _ in range(4):
            nursery.start_soon(stuck)
        with trio.fail_after(10):
            await until(lambda: pool.size == 4)
        for number in range(20):
            with trio.fail_after(5):
                assert await pool.run(lambda number=number: number, LONG_S) == number  # type: ignore[misc]
        assert pool.size == 5
        nursery.start_soon(stuck)
        await trio.sleep(0.1)
        with pytest.raises(StorageTimeout):
            await pool.run(lambda: 1, 2 * GROW_AFTER_S)
        assert pool.size == 5
        release.set()
    with trio.fail_after(5):
        await until(lambda: pool.size == 2)
    assert await pool.run(lambda: 8, LONG_S) == 8


async def test_the_deadline_holds_and_the_late_result_is_dropped(pool: ReadPool) -> None:
    release = threading.Event()
    started = trio.current_time()
    with pytest.raises(StorageTimeout, match=r"within 1 s"):
        await pool.run(partial(release.wait, 20), 1)
    assert 1 - GROW_AFTER_S < trio.current_time() - started < 3
    release.set()
    assert await pool.run(lambda: 2, LONG_S) == 2


async def test_a_request_given_up_before_it_began_is_never_made(make: Make) -> None:
    release = threading.Event()
    made = threading.Event()
    small = make(threads=1, threads_max=1)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(small.run, partial(release.wait, 20), LONG_S)
        await trio.sleep(0.05)
        with pytest.raises(StorageTimeout):
            await small.run(made.set, 0.1)
        release.set()
    assert await small.run(lambda: 1, LONG_S) == 1
    assert not made.is_set()


async def test_requests_come_before_read_ahead_and_too_much_of_it_is_dropped(make: Make) -> None:
    small = make(threads=1, threads_max=1, backlog=3)
    order: list[str] = []
    release = threading.Event()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(small.run, partial(release.wait, 20), LONG_S)
        await trio.sleep(0.05)
        assert [small.offer(partial(order.append, f"ahead {number}")) for number in range(5)] == [True] * 3 + [
            False
        ] * 2
        nursery.start_soon(small.run, partial(order.append, "request"), LONG_S)
        await trio.sleep(0.05)
        release.set()
    await small.run(lambda: None, LONG_S)
    with trio.fail_after(5):
        await until(lambda: len(order) == 4)
    assert order == ["request", "ahead 0", "ahead 1", "ahead 2"]


async def test_read_ahead_that_fails_hurts_nobody(pool: ReadPool) -> None:
    def fail() -> None:
        raise ChunkCorrupt("bad")

    for _ in range(10):
        pool.offer(fail)
        assert await pool.run(lambda: 3, LONG_S) == 3
    assert pool.size == 2


async def test_close_ends_the_threads(pool: ReadPool) -> None:
    assert pool.size == 2
    await trio.to_thread.run_sync(pool.close)
    assert pool.size == 0
    assert not pool.offer(lambda: None)


def storage_with(*names: str, hang_nth: int) -> FaultyStorage:
    memory = MemoryStorage()
    for name in names:
        memory.put(name, [b"0123456789"])
    return FaultyStorage(memory, [Fault(Mode.HANG, Kind.READ, hang_nth)])


async def test_readers_of_a_hung_blob_hold_no_threads_and_go_on_when_it_answers(make: Make) -> None:
    storage = storage_with("data/aa", "data/bb", hang_nth=1)
    gate = Gate(storage, SystemClock(), deadline_s=LONG_S, patience_s=0.2)
    small = make(threads=2, threads_max=3)
    answers: list[bytes] = []

    async def read(name: str) -> None:
        answers.append(await small.run(lambda: gate.read(name, 0, 4), LONG_S))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(read, "data/aa")
        await trio.to_thread.run_sync(storage.hanging.wait, 10)
        await trio.sleep(0.25)
        for _ in range(10):
            nursery.start_soon(read, "data/aa")
        for _ in range(5):
            with trio.fail_after(5):
                await read("data/bb")
        assert answers == [b"0123"] * 5
        assert small.size == 2
        assert list(gate.stalled()) == ["data/aa"]
        storage.release()
    assert answers == [b"0123"] * 16
    assert gate.stalled() == {}


def test_a_gate_lets_through_parks_and_fails_by_age() -> None:
    storage = storage_with("data/aa", "data/bb", hang_nth=1)
    clock = FixedClock()
    gate = Gate(storage, clock, deadline_s=30, patience_s=2)
    hung = threading.Thread(target=gate.read, args=("data/aa", 0, 4))
    hung.start()
    assert storage.hanging.wait(10)
    resumed: list[int] = []
    try:
        clock.advance(1.9)
        assert gate.read("data/aa", 2, 3) == b"234"
        clock.advance(0.2)
        with pytest.raises(BlobStalled) as stalled:
            gate.size("data/aa")
        stalled.value.park(lambda: resumed.append(1))
        assert resumed == []
        assert gate.read("data/bb", 0, 1) == b"0"
        clock.advance(28)
        with pytest.raises(StorageTimeout, match="30 s") as failed:
            gate.get("data/aa")
        assert not isinstance(failed.value, BlobStalled)
        assert gate.stalled() == {"data/aa": pytest.approx(30.1)}
    finally:
        storage.release()
        hung.join(10)
    assert resumed == [1]
    stalled.value.park(lambda: resumed.append(2))
    assert resumed == [1, 2]
    assert gate.get("data/aa") == b"0123456789"


async def test_a_storage_that_fails_leaves_the_gate_open() -> None:
    gate = Gate(FaultyStorage(MemoryStorage(), [Fault(Mode.BEFORE, nth=None)]), FixedClock(), deadline_s=30)
    for _ in range(3):
        with pytest.raises(Exception, match="injected"):
            gate.read("data/aa", 0, 1)
    assert gate.stalled() == {}


async def test_a_cancelled_request_is_dropped(pool: ReadPool) -> None:
    release = threading.Event()
    with trio.move_on_after(0.1) as scope:
        await pool.run(partial(release.wait, 20), LONG_S)
    assert scope.cancelled_caught
    release.set()
    assert await pool.run(lambda: 4, LONG_S) == 4


async def test_deadlines_hold_after_a_long_quiet_time(make: Make) -> None:
    small = make(threads=1, threads_max=2)
    await trio.sleep((QUIET_TICKS + 2) * GROW_AFTER_S)
    release = threading.Event()
    with pytest.raises(StorageTimeout), trio.fail_after(10):
        await small.run(partial(release.wait, 20), 1)
    release.set()
