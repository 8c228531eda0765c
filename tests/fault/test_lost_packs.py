"""Packs that have gone: nothing new is built on them, and a full read stores again what they held."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.support.engine import CHUNK, LEAF, Engine, pattern
from xbfs_engine.core.errors import BlobLost, IntegrityError, MapCorrupt

if TYPE_CHECKING:
    from pathlib import Path

SIZE = 3 * LEAF + CHUNK // 2
DISK = pattern(1, SIZE)


def lose(engine: Engine, folder: str) -> int:
    names = [blob.name for blob in engine.storage.list_blobs(folder)]
    for name in names:
        engine.storage.delete(name)
    return len(names)


@pytest.mark.parametrize("same_cache", [True, False])
def test_another_vm_does_not_deduplicate_against_lost_packs(tmp_path: Path, same_cache: bool) -> None:
    engine = Engine.fresh(tmp_path / "cache")
    engine.backup(DISK)
    lost = lose(engine, "data/")
    later = Engine(engine.storage, tmp_path / ("cache" if same_cache else "other"))
    point = later.backup(DISK, vm_uuid="vm-2")
    assert len(later.index.lost) == lost
    assert point.disks[0].statistics.new_bytes == SIZE
    assert later.read(point.disks[0]) == DISK


def test_a_full_read_heals_the_vm_and_its_older_points(tmp_path: Path) -> None:
    engine = Engine.fresh(tmp_path / "cache")
    first = engine.backup(DISK)
    lose(engine, "data/")
    healed = Engine(engine.storage, tmp_path / "cache")
    second = healed.backup(DISK)
    assert second.disks[0].statistics.unchanged_bytes == 0
    assert healed.read(second.disks[0]) == DISK
    assert healed.read(first.disks[0]) == DISK, "the index knows where the chunks are now"


def test_a_full_read_needs_no_readable_base_map(tmp_path: Path) -> None:
    engine = Engine.fresh(tmp_path / "cache")
    engine.backup(DISK)
    lose(engine, "meta/")
    healed = Engine(engine.storage, tmp_path / "cache")
    point = healed.backup(DISK)
    assert point.disks[0].statistics.new_bytes == 0, "the data is still there"
    assert healed.read(point.disks[0]) == DISK


def test_a_delta_on_a_lost_base_map_fails_and_makes_no_point(tmp_path: Path) -> None:
    engine = Engine.fresh(tmp_path / "cache")
    engine.backup(DISK)
    lose(engine, "meta/")
    later = Engine(engine.storage, tmp_path / "cache")
    with pytest.raises((BlobLost, MapCorrupt)):
        later.backup(DISK, changed=[(0, CHUNK)])
    assert len(later.points()) == 1


def test_a_delta_does_not_settle_for_lost_chunks_it_reads(tmp_path: Path) -> None:
    engine = Engine.fresh(tmp_path / "cache")
    engine.backup(DISK)
    lose(engine, "data/")
    later = Engine(engine.storage, tmp_path / "cache")
    point = later.backup(DISK, changed=[(0, LEAF)])
    assert point.disks[0].statistics.new_bytes == LEAF
    with pytest.raises(IntegrityError):
        later.read(point.disks[0])
