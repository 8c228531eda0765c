"""Real processes on a real directory: killed at any moment, or several at once, no committed point is lost or wrong."""

from __future__ import annotations

import multiprocessing
import os
import time
from random import Random  # noqa: TID251 - seeded
from typing import TYPE_CHECKING

import pytest

from tests.support.engine import Engine, back_up_repeatedly, content_of, make_repository
from xbfs_engine.storage.local import LocalStorage

if TYPE_CHECKING:
    from multiprocessing.connection import Connection
    from multiprocessing.context import ForkServerProcess
    from pathlib import Path

ROUNDS = 12
START_S = 30

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.support.engine"])


def start(root: Path, cache: Path, first: int, count: int) -> tuple[ForkServerProcess, Connection]:
    ours, theirs = _context.Pipe(duplex=False)
    process = _context.Process(
        target=back_up_repeatedly, args=(str(root), str(cache), first, count, theirs), daemon=True
    )
    process.start()
    theirs.close()
    assert ours.poll(START_S), "the writer starts"
    assert ours.recv() == "ready"
    return process, ours


def received(pipe: Connection) -> list[str]:
    """What the writer said before it ended."""
    found = []
    while True:
        try:
            found.append(pipe.recv())
        except EOFError:
            return found


def check(root: Path, cache: Path, committed: set[str]) -> Engine:
    """All points, also those whose writer died before it could say so, read back; and they are at least those told."""
    engine = Engine(LocalStorage(root), cache)
    points = engine.points()
    assert committed <= {point.id for point in points}, "what was reported is durable"
    assert not engine.catalog.damaged()
    for point in points:
        assert engine.read(point.disks[0]) == content_of(int(point.vm_uuid.removeprefix("vm-")))
    return engine


@pytest.fixture
def root(tmp_path: Path) -> Path:
    make_repository(LocalStorage(tmp_path / "repository"))
    return tmp_path / "repository"


def test_a_writer_killed_at_any_moment_loses_no_committed_point(root: Path, tmp_path: Path) -> None:
    random = Random(7)
    committed: set[str] = set()
    for number in range(ROUNDS):
        process, pipe = start(root, tmp_path / "cache", 100 * number, 100)
        time.sleep(random.uniform(0.0, 0.25))
        process.kill()
        process.join()
        committed.update(received(pipe))
        check(root, tmp_path / "cache", committed)
    engine = check(root, tmp_path / "cold", committed)
    assert committed, "some runs came to their end before the kill"
    point = engine.backup(content_of(1), vm_uuid="vm-1")
    assert point.disks[0].statistics.new_bytes < len(content_of(1)), "what killed runs listed is used"


@pytest.mark.parametrize("shared_cache", [False, True])
def test_writers_at_the_same_time_do_not_disturb_each_other(root: Path, tmp_path: Path, *, shared_cache: bool) -> None:
    caches = [tmp_path / ("cache" if shared_cache else f"cache-{number}") for number in range(3)]
    writers = [start(root, cache, 1000 * number, 5) for number, cache in enumerate(caches)]
    victim, victim_pipe = writers.pop()
    time.sleep(0.1)
    victim.kill()
    victim.join()
    committed = set(received(victim_pipe))
    for process, pipe in writers:
        told = received(pipe)
        process.join()
        assert told[-1] == "done"
        assert len(told) == 6
        committed.update(told[:-1])
    committed.discard("done")
    check(root, caches[0], committed)
    check(root, tmp_path / "cold", committed)


def test_killed_writers_leave_only_what_can_be_swept(root: Path, tmp_path: Path) -> None:
    process, pipe = start(root, tmp_path / "cache", 0, 1000)
    time.sleep(0.15)
    os.kill(process.pid or 0, 9)
    process.join()
    received(pipe)
    folders = {path.name for path in root.iterdir()}
    assert folders <= {"config", "keys", "data", "meta", "index", "points", "tmp"}
