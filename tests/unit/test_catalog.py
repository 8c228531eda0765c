"""Restore points of a repository: commit, list, find, and what damage among them does to the others."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from tests.support.engine import Engine, blobs
from tests.support.faulty_storage import Fault, FaultyStorage, Kind, Mode
from xbfs_engine.catalog.catalog import PREFIX, Catalog, points_of
from xbfs_engine.core.errors import ManifestCorrupt, PointAmbiguous, PointNotFound, StorageError
from xbfs_engine.core.ids import PointId

if TYPE_CHECKING:
    from pathlib import Path

    from xbfs_engine.catalog.restore_point import RestorePoint


@pytest.fixture
def engine(tmp_path: Path) -> Engine:
    return Engine.fresh(tmp_path / "cache")


@pytest.fixture
def points(engine: Engine) -> list[RestorePoint]:
    """Three points of "vm" a second apart, and one of another VM of that name."""
    made = []
    for number in range(3):
        made.append(engine.backup(b"%d" % number))
        engine.clock.advance(10)
    made.append(engine.backup(b"other", vm_uuid="vm-2"))
    return made


def test_points_are_listed_by_time_by_anybody(engine: Engine, points: list[RestorePoint], tmp_path: Path) -> None:
    assert Engine(engine.storage, tmp_path / "other").points() == points == engine.points()


def test_a_removed_point_is_no_longer_listed(engine: Engine, points: list[RestorePoint]) -> None:
    engine.storage.delete(PREFIX + points[1].id)
    assert engine.points() == [points[0], *points[2:]]
    assert engine.backup(b"next").parent == points[2].id


def test_only_new_manifests_are_read(points: list[RestorePoint], engine: Engine) -> None:
    counted = FaultyStorage(engine.storage)
    catalog = Catalog(replace(engine.repository, storage=counted))
    catalog.refresh()
    reads = counted.counts[Kind.READ] + counted.counts[Kind.GET]
    catalog.refresh()
    assert counted.counts[Kind.READ] + counted.counts[Kind.GET] == reads == len(points)


def test_a_damaged_manifest_is_told_and_hides_no_other(engine: Engine, points: list[RestorePoint]) -> None:
    name = PREFIX + points[1].id
    blob = bytearray(engine.storage.get(name))
    engine.storage.delete(name)
    blob[len(blob) // 2] ^= 4
    engine.storage.put(name, [blob])
    catalog = Catalog(engine.repository)
    catalog.refresh()
    assert catalog.points() == [points[0], *points[2:]]
    (damaged,) = catalog.damaged()
    assert damaged.id == points[1].id
    assert isinstance(damaged.problem, ManifestCorrupt)
    with pytest.raises(ManifestCorrupt):
        catalog.find(points[1].id[:12])
    engine.storage.delete(name)
    catalog.refresh()
    assert catalog.damaged() == []


def test_swapped_manifests_are_both_damaged(engine: Engine, points: list[RestorePoint]) -> None:
    names = [PREFIX + point.id for point in points[:2]]
    contents = [engine.storage.get(name) for name in names]
    for name, data in zip(names, reversed(contents), strict=True):
        engine.storage.delete(name)
        engine.storage.put(name, [data])
    catalog = Catalog(engine.repository)
    catalog.refresh()
    assert {damaged.id for damaged in catalog.damaged()} == {point.id for point in points[:2]}


def test_a_manifest_signed_by_somebody_else_is_refused(engine: Engine, points: list[RestorePoint]) -> None:
    """Sealed to the right key, which is public; signed by a storage's administrator."""
    from tools.make_vectors import fixed_keys

    other = fixed_keys()
    forged = replace(engine.repository.keys, signing_public=other.signing_public, signing_private=other.signing_private)
    Catalog(replace(engine.repository, keys=forged)).commit(replace(points[0], vm_name="forged"))
    catalog = Catalog(engine.repository)
    catalog.refresh()
    assert catalog.points() == points
    assert "signature" in catalog.damaged()[0].problem.message


def test_foreign_names_among_the_points_are_passed_over(engine: Engine, points: list[RestorePoint]) -> None:
    for name in ("points/readme", "points/" + "0" * 63, "points/aa/" + "0" * 64):
        engine.storage.put(name, [b"?"])
    assert engine.points() == points
    assert engine.catalog.damaged() == []


def test_a_point_is_found_by_id_time_and_name(engine: Engine, points: list[RestorePoint]) -> None:
    find = engine.catalog.find
    engine.catalog.refresh()
    assert find(points[0].id) == find(points[0].id[:16]) == points[0]
    assert find("vm-1@latest") == points[2]
    assert find("vm-2@latest") == points[3]
    assert find("vm-1@2026-09-21T14:13:20Z") == points[0], "the second itself counts"
    assert find("vm-1@2026-09-21T14:13:29") == points[0]
    assert find("vm-1@2026-09-21T16:13:31+02:00") == points[1]
    assert find("vm-1@2099-01-01") == points[2]


@pytest.mark.parametrize(
    "text", ["", "abc", "zzzz", "vm-1@", "vm-1@yesterday", "nobody@latest", "vm-1@2020-01-01", "@latest", "0" * 65]
)
def test_what_names_no_point_is_told(engine: Engine, points: list[RestorePoint], text: str) -> None:
    engine.catalog.refresh()
    with pytest.raises(PointNotFound):
        engine.catalog.find(text)


def test_what_names_several_is_told(engine: Engine, points: list[RestorePoint]) -> None:
    with pytest.raises(PointAmbiguous, match="vm-1, vm-2"):
        points_of(points, "vm")
    catalog = Catalog(engine.repository)
    twins = [replace(points[0], id=PointId("abcd" + digit * 60)) for digit in "12"]
    catalog._points = {point.id: point for point in twins}
    with pytest.raises(PointAmbiguous):
        catalog.find("abcd")
    assert catalog.find("abcd1") == twins[0]


def test_a_failed_commit_shows_nothing(engine: Engine, points: list[RestorePoint]) -> None:
    storage = FaultyStorage(engine.storage, [Fault(Mode.BEFORE, Kind.PUT)])
    catalog = Catalog(replace(engine.repository, storage=storage))
    catalog.refresh()
    with pytest.raises(StorageError):
        catalog.commit(replace(points[0], vm_name="new"))
    assert catalog.points() == points


@pytest.mark.parametrize("change", [{"vm_name": "n" * 5000}, {"vm_uuid": "u" * 65}, {"time_ns": -1}])
def test_what_could_not_be_read_back_is_not_put(
    engine: Engine, points: list[RestorePoint], change: dict[str, object]
) -> None:
    before = blobs(engine.storage)
    with pytest.raises(ManifestCorrupt):
        engine.catalog.commit(replace(points[0], **change))  # type: ignore[arg-type]  # fields of several types
    assert blobs(engine.storage) == before
