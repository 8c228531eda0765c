"""What a backup announces to a source is what it reads: a source that fetches ahead fetches nothing in vain."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.support.engine import CHUNK, LEAF, Engine, MemorySource, pattern

if TYPE_CHECKING:
    from pathlib import Path

SIZE = 3 * LEAF + 5 * CHUNK + 1024


@pytest.fixture
def engine(tmp_path: Path) -> Engine:
    return Engine.fresh(tmp_path / "cache")


def check(source: MemorySource) -> None:
    announced = list(source.announced)
    assert announced == sorted(source.reads)
    ends = [offset + length for offset, length in announced]
    assert all(end <= following for end, (following, _) in zip(ends, announced[1:], strict=False))


def test_a_full_backup_announces_its_reads(engine: Engine) -> None:
    source = MemorySource.of(pattern(1, SIZE))
    engine.backup(source)
    check(source)
    assert source.read_bytes == SIZE
    source = MemorySource(SIZE, {CHUNK + 7: b"a", LEAF - 1: b"bc", SIZE - 1: b"d"})
    engine.backup(source)
    check(source)
    assert source.read_bytes == 3 * CHUNK + 1024


def test_a_delta_announces_its_reads_and_the_grown_edge(engine: Engine) -> None:
    engine.backup(MemorySource(SIZE, {0: b"a"}))
    grown = MemorySource(SIZE + 2 * LEAF, {0: b"b", SIZE + LEAF: b"c"})
    engine.backup(grown, changed=[(0, 1), (SIZE + LEAF, 1)])
    check(grown)
    assert grown.read_bytes == 3 * CHUNK
