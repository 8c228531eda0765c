"""The n-th call to the storage fails, for every n until the run succeeds: a typed error, old points intact, no litter
that hurts, and the next run succeeds."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import trio

from tests.support.engine import CHUNK, LEAF, Engine, MemorySource, blobs, make_repository, pattern
from tests.support.faulty_storage import Fault, FaultyStorage, Kind, Mode, SimulatedCrash
from tests.support.runtime import FixedClock
from xbfs_engine.core.errors import StorageError, XbfsError
from xbfs_engine.storage.memory import MemoryStorage

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from xbfs_engine.catalog.restore_point import RestorePoint

OLD = {0: pattern(1, 3 * CHUNK + 9), LEAF: pattern(2, 2 * CHUNK), 70 * LEAF: pattern(3)}
NEW = OLD | {LEAF: pattern(4, CHUNK), 5 * LEAF: pattern(5, 20 * CHUNK), 80 * LEAF: b"new"}
CHANGED = [(LEAF, 2 * CHUNK), (5 * LEAF, 20 * CHUNK), (80 * LEAF, 3)]
SIZE = 90 * LEAF
CALLS_MAX = 400

CASES = [
    (Kind.PUT, Mode.BEFORE),
    (Kind.PUT, Mode.AFTER),
    (Kind.PUT, Mode.TORN),
    (Kind.PUT, Mode.TRUNCATED),
    (Kind.PUT, Mode.CRASH_BEFORE),
    (Kind.PUT, Mode.CRASH_AFTER),
    (Kind.READ, Mode.BEFORE),
    (Kind.GET, Mode.BEFORE),
    (Kind.SIZE, Mode.BEFORE),
    (Kind.LIST, Mode.BEFORE),
    (Kind.READ, Mode.CRASH_BEFORE),
]


def source(pieces: dict[int, bytes]) -> MemorySource:
    return MemorySource(SIZE, pieces)


def expected(pieces: dict[int, bytes]) -> dict[int, bytes]:
    disk = source(pieces)
    found = {}
    for offset, data in pieces.items():
        for at in range(offset // CHUNK * CHUNK, offset + len(data), CHUNK):
            buffer = bytearray(min(CHUNK, SIZE - at))
            disk.read_into(at, memoryview(buffer))
            found[at // CHUNK] = bytes(buffer)
    return found


@pytest.fixture(scope="module")
def before(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, bytes], RestorePoint]:
    """A repository with one point."""
    engine = Engine.fresh(tmp_path_factory.mktemp("before"))
    point = engine.backup(source(OLD))
    return blobs(engine.storage), point


def storage_with(content: dict[str, bytes]) -> MemoryStorage:
    storage = MemoryStorage()
    for name, data in content.items():
        storage.put(name, [data])
    return storage


def _attempts(kind: Kind, mode: Mode, content: dict[str, bytes]) -> Iterator[tuple[int, FaultyStorage]]:
    for nth in range(1, CALLS_MAX):
        yield nth, FaultyStorage(storage_with(content), [Fault(mode, kind, nth)])
    pytest.fail(f"the run needs more than {CALLS_MAX} calls of {kind}")


@pytest.mark.parametrize("full", [False, True], ids=["incremental", "full"])
@pytest.mark.parametrize(("kind", "mode"), CASES, ids=lambda value: value.name.lower())
def test_the_nth_call_of_a_backup_fails(
    tmp_path: Path, before: tuple[dict[str, bytes], RestorePoint], kind: Kind, mode: Mode, *, full: bool
) -> None:
    content, old = before
    failed = 0
    for nth, faulty in _attempts(kind, mode, content):
        cache = tmp_path / str(nth)
        clock = FixedClock()
        error: BaseException | None = None
        try:
            Engine(faulty, cache, clock=clock).backup(source(NEW), changed=None if full else CHANGED)
        except (XbfsError, SimulatedCrash) as exc:
            error = exc
        check_afterwards(faulty.inner, cache, clock, old, error, mode)
        if not faulty.injected:
            assert error is None
            break
        failed += error is not None
    assert nth > 1 or kind is Kind.GET, "the run makes calls of this kind"
    if kind is Kind.PUT:
        assert failed == nth - 1, "every failed put fails the run"


def check_afterwards(
    storage: object,
    cache: Path,
    clock: FixedClock,
    old: RestorePoint,
    error: BaseException | None,
    mode: Mode,
) -> None:
    """The old point reads back; a new one is there whole or not at all; and the next run succeeds on the same cache."""
    assert isinstance(storage, MemoryStorage)
    if isinstance(error, XbfsError):
        assert isinstance(error, StorageError)
    engine = Engine(storage, cache, clock=clock)
    points = engine.points()
    assert points[0] == old
    assert len(points) == 1 or error is None or mode in {Mode.AFTER, Mode.CRASH_AFTER}
    for point, pieces in zip(points, (OLD, NEW), strict=False):
        assert engine.chunks(point.disks[0]) == expected(pieces)
    again = engine.backup(source(NEW))
    assert engine.chunks(again.disks[0]) == expected(NEW)
    for point in engine.points():
        assert point.id == old.id or engine.chunks(point.disks[0]) == expected(NEW)


def test_a_failed_run_s_packs_are_used_by_the_next(tmp_path: Path) -> None:
    """What was listed in an index blob before the crash is not stored again."""
    inner = MemoryStorage()
    make_repository(inner)
    content = pattern(1, LEAF)
    crashing = FaultyStorage(inner, [Fault(Mode.CRASH_BEFORE, Kind.PUT, 7)])
    with pytest.raises(SimulatedCrash):
        Engine(crashing, tmp_path).backup(content)
    assert list(inner.list_blobs("index/")), "four packs, their index blob, and then the node's pack crashed"
    engine = Engine(inner, tmp_path)
    point = engine.backup(content)
    assert point.disks[0].statistics.duplicate_bytes == LEAF
    assert engine.read(point.disks[0]) == content


def test_manifests_come_last(tmp_path: Path) -> None:
    """Data packs, index, metadata packs, index, manifest: a storage that loses later puts first loses no point."""
    order: list[str] = []

    class Watched(MemoryStorage):
        def put(self, name: str, parts: object) -> None:
            order.append(name.split("/")[0])
            super().put(name, parts)  # type: ignore[arg-type]  # passed on

    storage = Watched()
    make_repository(storage)
    order.clear()
    Engine(storage, tmp_path).backup(pattern(1, LEAF), pattern(2, LEAF))
    assert order[-2:] == ["index", "points"]
    assert order.count("points") == 1
    first_meta = order.index("meta")
    assert "index" in order[:first_meta], "what a node refers to is listed before the node is durable"
    assert set(order) == {"data", "index", "meta", "points"}


def test_two_runs_of_one_engine_after_each_other_share_nothing_stale(tmp_path: Path) -> None:
    """The same engine goes on after an error of its storage."""
    inner = MemoryStorage()
    make_repository(inner)
    faulty = FaultyStorage(inner, [Fault(Mode.BEFORE, Kind.PUT, n) for n in (1, 3, 4, 9)])
    engine = Engine(faulty, tmp_path)
    content = pattern(1, LEAF)
    for _ in range(3):
        with pytest.raises(StorageError):
            trio.run(engine.run({0: (MemorySource.of(content), None)}).run)
    while True:
        try:
            point = engine.backup(content)
            break
        except StorageError:
            continue
    assert engine.read(point.disks[0]) == content
