"""A storage that does not answer ends a run by its deadline; threads that hang are given up, others are waited for."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

import pytest
import trio

from tests.support.engine import Engine, make_repository, pattern
from tests.support.faulty_storage import Fault, FaultyStorage, Kind, Mode
from xbfs_engine.core.errors import StorageTimeout
from xbfs_engine.core.runtime import SystemClock
from xbfs_engine.storage import waiting
from xbfs_engine.storage.memory import MemoryStorage
from xbfs_engine.storage.waiting import in_thread, while_answering
from xbfs_engine.storage.watched import WatchedStorage

if TYPE_CHECKING:
    from pathlib import Path

HANG_S = 3.0


async def test_a_result_in_time_counts_though_cancelled() -> None:
    with trio.CancelScope() as scope:
        scope.cancel()
        assert await in_thread(lambda: 7) == 7


async def test_errors_come_out_as_they_are() -> None:
    with pytest.raises(ZeroDivisionError):
        await in_thread(lambda: 1 / 0)


async def test_a_hanging_thread_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "GRACE_S", 0.1)
    free = threading.Event()
    with trio.move_on_after(0.1) as scope:
        await in_thread(free.wait, HANG_S)
    assert scope.cancelled_caught
    assert not free.is_set()
    free.set()


async def test_work_is_cancelled_when_a_call_takes_too_long() -> None:
    inner = MemoryStorage()
    storage = WatchedStorage(FaultyStorage(inner, [Fault(Mode.LATENCY, Kind.PUT, nth=1, delay_s=0.5)]), SystemClock())

    async def work() -> None:
        await trio.to_thread.run_sync(storage.put, "data/aa/bb", [b"x"], abandon_on_cancel=True)
        await trio.sleep(HANG_S)

    with pytest.raises(StorageTimeout):
        await while_answering(storage, work, deadline_s=0.1)


async def test_many_short_calls_are_not_one_long_one() -> None:
    storage = WatchedStorage(MemoryStorage(), SystemClock())

    async def work() -> int:
        for number in range(20):
            await trio.to_thread.run_sync(storage.put, f"data/aa/{number:02x}", [b"x"])
            await trio.sleep(0.02)
        return len(list(storage.list_blobs("data/")))

    assert await while_answering(storage, work, deadline_s=0.2) == 20
    assert storage.stalled_s() == 0


@pytest.mark.parametrize("nth", [1, 2, 3, 4])
def test_a_backup_into_a_storage_that_hangs_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nth: int) -> None:
    monkeypatch.setattr(waiting, "GRACE_S", 0.1)
    monkeypatch.setattr(waiting.while_answering, "__defaults__", (0.3,))
    inner = MemoryStorage()
    make_repository(inner)
    faulty = FaultyStorage(inner, [Fault(Mode.LATENCY, Kind.PUT, nth=nth, delay_s=HANG_S)])
    engine = Engine(WatchedStorage(faulty, SystemClock()), tmp_path)
    began = time.monotonic()
    with pytest.raises(StorageTimeout, match="has not answered"):
        engine.backup(pattern(1, 1 << 20))
    assert time.monotonic() - began < HANG_S
