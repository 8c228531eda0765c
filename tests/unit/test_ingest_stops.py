"""Runs that wait, are cancelled or lose their source: no point, no hang, and the next run succeeds."""

from __future__ import annotations

from threading import Timer
from typing import TYPE_CHECKING

import pytest
import trio

from tests.support.engine import CHUNK, LEAF, Engine, MemorySource, blobs, make_repository, pattern
from tests.support.faulty_storage import Fault, FaultyStorage, Kind, Mode
from xbfs_engine.core.errors import SourceChanged, SourceUnreadable, XbfsError
from xbfs_engine.ingest import pipeline
from xbfs_engine.storage.memory import MemoryStorage

if TYPE_CHECKING:
    from pathlib import Path

HANG_S = 20


def scattered(leaves: int) -> MemorySource:
    """A disk with a chunk in each leaf."""
    return MemorySource(leaves * LEAF, {n * LEAF: pattern(n + 1) for n in range(leaves)})


@pytest.fixture
def engine(tmp_path: Path) -> Engine:
    return Engine.fresh(tmp_path / "cache")


@pytest.mark.parametrize("window", [1, 2, 3, 8])
@pytest.mark.parametrize("threads", [1, 2, 4])
def test_a_small_window_with_many_duplicates_never_blocks(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, window: int, threads: int
) -> None:
    """Every leaf waits for the one pack that holds the shared chunk; packs are closed early to make room."""
    monkeypatch.setattr(pipeline, "WINDOW", window)
    shared = pattern(0)
    pieces = {n * LEAF: shared for n in range(60)} | {n * LEAF + CHUNK: pattern(n) for n in range(1, 60, 7)}
    run = engine.run({0: (MemorySource(60 * LEAF, pieces), None)}, threads=threads)

    async def timed() -> None:
        with trio.fail_after(HANG_S):
            await run.run()

    trio.run(timed)
    (point,) = engine.points()
    assert {at * CHUNK: data for at, data in engine.chunks(point.disks[0]).items()} == pieces
    assert point.disks[0].statistics.new_bytes == 10 * CHUNK


def test_a_worker_far_ahead_waits_for_a_slow_one(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """One segment takes long to read: the other worker may go WINDOW segments ahead and no further."""
    monkeypatch.setattr(pipeline, "WINDOW", 4)
    source = scattered(40)
    ahead: list[int] = []

    def slow(offset: int) -> None:
        if offset == 0:
            trio.from_thread.run(trio.sleep, 0.3)
            ahead.append(len(source.reads))

    source.before_read = slow
    point = engine.backup(source, threads=2)
    assert ahead[0] <= 4
    assert len(engine.chunks(point.disks[0])) == 40


def test_slow_puts_do_not_mix_up_the_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "WINDOW", 5)
    inner = MemoryStorage()
    make_repository(inner)
    slow = FaultyStorage(inner, [Fault(Mode.LATENCY, Kind.PUT, nth=n, delay_s=0.02) for n in (1, 3, 4)])
    engine = Engine(slow, tmp_path)
    content = pattern(1, 6 * LEAF)
    assert engine.read(engine.backup(content, threads=3).disks[0]) == content


@pytest.mark.parametrize("after_reads", [0, 1, 5, 11])
def test_cancellation_leaves_no_point_and_no_thread(engine: Engine, after_reads: int) -> None:
    source = scattered(12)

    async def cancelled() -> bool:
        with trio.move_on_after(HANG_S), trio.CancelScope() as scope:

            def count(_: int) -> None:
                if len(source.reads) >= after_reads:
                    trio.from_thread.run_sync(scope.cancel)

            source.before_read = count
            await engine.run({0: (source, None)}).run()
        return scope.cancelled_caught

    assert trio.run(cancelled)
    assert engine.points() == []
    assert not blobs(engine.storage, "points/")
    source.before_read = lambda offset: None
    assert {n * CHUNK: data for n, data in engine.chunks(engine.backup(source).disks[0]).items()} == source.pieces


def test_cancellation_while_storage_hangs_ends_with_the_call(tmp_path: Path) -> None:
    inner = MemoryStorage()
    make_repository(inner)
    hanging = FaultyStorage(inner, [Fault(Mode.HANG, Kind.PUT, nth=2)])
    engine = Engine(hanging, tmp_path)

    async def cancelled() -> None:
        with trio.fail_after(HANG_S), trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(engine.run({0: (MemorySource.of(pattern(1, 3 * LEAF)), None)}).run)
                await trio.to_thread.run_sync(hanging.hanging.wait)
                Timer(0.1, hanging.release).start()
                scope.cancel()

    trio.run(cancelled)
    assert engine.points() == []
    assert engine.backup(b"next").vm_uuid == "vm-1"


def test_cancellation_during_the_commit_does_not_undo_it(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Either there is a point and the caller has it, or there is none."""
    commit = engine.catalog.commit

    async def cancelled() -> object:
        with trio.CancelScope() as scope:

            def slow_commit(point: object) -> object:
                trio.from_thread.run_sync(scope.cancel)
                return commit(point)  # type: ignore[arg-type]  # what the run passes

            monkeypatch.setattr(engine.catalog, "commit", slow_commit)
            return await engine.run({0: (MemorySource.of(b"x"), None)}).run()
        return None

    assert trio.run(cancelled) == engine.points()[0]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("at", [0, 3 * LEAF, 11 * LEAF])
def test_a_read_error_of_the_source_ends_the_run(engine: Engine, at: int, threads: int) -> None:
    first = engine.backup(b"old")
    source = scattered(12)

    def fail(offset: int) -> None:
        if offset == at:
            raise SourceUnreadable(f"injected at {offset}")

    source.before_read = fail
    with pytest.raises(SourceUnreadable, match="injected"):
        engine.backup(source, threads=threads)
    assert engine.points() == [first]
    source.before_read = lambda offset: None
    assert {n * CHUNK: data for n, data in engine.chunks(engine.backup(source).disks[0]).items()} == source.pieces


def test_a_source_that_lies_about_its_extents_ends_the_run(engine: Engine) -> None:
    source = MemorySource(LEAF, {0: pattern(1, LEAF)})

    def extents() -> object:
        yield 0, CHUNK
        raise SourceUnreadable("injected")

    source.data_extents = extents  # type: ignore[method-assign,assignment]  # a broken source
    with pytest.raises(SourceUnreadable):
        engine.backup(source)
    assert engine.points() == []


def test_a_size_that_changes_during_the_run_leaves_no_point(engine: Engine) -> None:
    source = MemorySource.of(pattern(1, 2 * LEAF))
    source.before_read = lambda offset: setattr(source, "changed_size", 5)
    with pytest.raises(SourceChanged):
        engine.backup(source)
    assert engine.points() == []


def test_a_point_that_could_not_be_read_back_is_never_put(engine: Engine) -> None:
    run = engine.run({0: (MemorySource.of(b"x"), None)})
    object.__setattr__(run._request, "vm_name", "n" * 5000)
    with pytest.raises(XbfsError):
        trio.run(run.run)
    assert not blobs(engine.storage, "points/")
