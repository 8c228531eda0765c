"""The parts of check and verify that a small repository does not stretch: tables, bounds, progress, stopping."""

from __future__ import annotations

import threading
import tracemalloc
from dataclasses import replace
from itertools import count
from typing import TYPE_CHECKING

import pytest

from tests.support.engine import CHUNK, LEAF, Engine, MemorySource, blobs, pattern
from tests.support.faulty_storage import Fault, FaultyStorage, Kind, Mode
from tests.support.runtime import SeededRandom
from xbfs_engine.codec.envelope import ObjectKind
from xbfs_engine.core.errors import Cancelled, StorageUnavailable
from xbfs_engine.core.ids import BlobHash
from xbfs_engine.maintain.check import check
from xbfs_engine.maintain.findings import Findings, ordinals_text
from xbfs_engine.maintain.packs import UNREADABLE_IN_A_ROW_MAX, differing
from xbfs_engine.maintain.parallel import run_parallel
from xbfs_engine.maintain.places import ALL, PackEntry, PackTable, Places
from xbfs_engine.maintain.report import FINDINGS_MAX, HITS_MAX, RANGES_MAX
from xbfs_engine.maintain.report import Kind as FindingKind
from xbfs_engine.maintain.verify import verify

if TYPE_CHECKING:
    from pathlib import Path

    from xbfs_engine.maintain.parallel import MaintenanceProgress


def name(number: int) -> BlobHash:
    return BlobHash(SeededRandom(number).token(32))


def test_the_pack_table_finds_every_pack_and_no_other() -> None:
    twin = BlobHash(name(7)[:8] + bytes(24))  # the same sort key, another pack
    entries = [PackEntry(ObjectKind.DATA_PACK, name(number), number + 200) for number in range(5000)]
    entries += [PackEntry(ObjectKind.METADATA_PACK, name(7), 1), PackEntry(ObjectKind.DATA_PACK, twin, 2)]
    table = PackTable(entries)
    assert len(table) == len(entries)
    for entry in entries:
        assert table[table.find(entry.kind, entry.pack)] == entry
    assert table.find(ObjectKind.METADATA_PACK, name(8)) == -1
    assert table.find(ObjectKind.DATA_PACK, name(9999)) == -1
    assert PackTable([]).find(ObjectKind.DATA_PACK, name(0)) == -1


def test_a_million_packs_stay_small() -> None:
    hashes = SeededRandom(3).token(32 * 200_000)
    tracemalloc.start()
    try:
        table = PackTable(
            PackEntry(ObjectKind.DATA_PACK, BlobHash(hashes[at : at + 32]), 1) for at in range(0, len(hashes), 32)
        )
        size, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert size < 60 * len(table)
    assert peak < 200 * len(table)


def test_places_are_bits() -> None:
    places = Places()
    assert not places
    assert places.add(name(1), 5)
    assert not places.add(name(1), 5)
    assert places.add(name(1), 6)
    assert places.mask(name(1)) == 0b1100000
    places.add_mask(name(2), ALL)
    assert places.mask(name(2)) >> 65535 & 1
    places.add_mask(name(3), 0)
    assert places.mask(name(3)) == 0


def test_ordinals_read_as_runs() -> None:
    assert ordinals_text(0b111010001, 9) == "0, 4, 6-8"
    assert ordinals_text(int("10" * 20, 2), 40) == "1, 3, 5, 7, 9, 11, 13, 15 and more"


def test_differing_ids() -> None:
    left, right = b"".join(name(n) for n in range(5)), b"".join(name(n) for n in (0, 9, 2, 3))
    assert differing(left, right) == differing(right, left) == 0b10010


def test_findings_are_bounded_but_counted() -> None:
    findings = Findings()
    for number in range(FINDINGS_MAX + 5):
        findings.damage(FindingKind.BLOB, f"data/{number}", "is broken")
        findings.note(FindingKind.BLOB, f"other/{number}", "is odd")
    assert (findings.damages, findings.notes) == (FINDINGS_MAX + 5, FINDINGS_MAX + 5)
    assert len(findings.listing()) == 2 * FINDINGS_MAX


def test_the_first_failure_ends_parallel_work() -> None:
    feed = count()

    def work(number: int) -> None:
        if number == 50:
            raise StorageUnavailable("gone")

    with pytest.raises(StorageUnavailable):
        run_parallel(feed, work, 2)
    assert next(feed) < 1000


def test_parallel_work_does_everything_once() -> None:
    done: list[int] = []
    lock = threading.Lock()

    def work(number: int) -> None:
        with lock:
            done.append(number)

    run_parallel(iter(range(1000)), work, 3)
    assert sorted(done) == list(range(1000))


@pytest.fixture
def engine(tmp_path: Path) -> Engine:
    engine = Engine.fresh(tmp_path / "cache")
    engine.backup(pattern(1, 40 * CHUNK))
    return engine


@pytest.mark.parametrize("examine", [check, verify])
def test_stopping_is_heard(engine: Engine, examine) -> None:
    asked = count()
    with pytest.raises(Cancelled):
        examine(engine.repository, None, lambda: next(asked) >= 2)
    assert next(asked) <= 2 + 1 + 2, "nobody goes on for long"


def test_progress_names_stages(engine: Engine) -> None:
    seen: list[MaintenanceProgress] = []
    clock = type(engine.clock)(step_ns=1_000_000_000)
    repository = replace(engine.repository, runtime=replace(engine.repository.runtime, clock=clock))
    verify(repository, seen.append)
    assert [step for step in dict.fromkeys(progress.stage for progress in seen)] == ["packs", "maps"]
    packs = [progress for progress in seen if progress.stage == "packs"]
    assert packs[-1].done == packs[-1].total
    assert packs[-1].read_bytes == packs[-1].total_bytes


def test_one_pack_the_storage_can_not_give_is_damage(engine: Engine) -> None:
    faulty = FaultyStorage(engine.storage, [Fault(Mode.BEFORE, Kind.GET, nth=4)])
    report = verify(replace(engine.repository, storage=faulty), threads=1)
    assert faulty.injected
    assert report.damages == 1
    assert "can not be read" in report.findings[0].message


def test_a_storage_that_is_gone_ends_the_verify(engine: Engine) -> None:
    assert len(blobs(engine.storage, "data/")) < UNREADABLE_IN_A_ROW_MAX
    for number in range(2, 10):
        engine.clock.advance(10)
        engine.backup(pattern(number, CHUNK), vm_uuid=f"vm-{number}")

    class Gone(FaultyStorage):
        def get(self, name: str) -> bytes:
            if name.startswith(("data/", "meta/")):
                raise StorageUnavailable("the mount has gone")
            return super().get(name)

    with pytest.raises(StorageUnavailable):
        verify(replace(engine.repository, storage=Gone(engine.storage)), threads=1)


def test_a_backup_running_meanwhile_is_no_damage(engine: Engine) -> None:
    """A whole backup runs between any two listings of a check."""

    class Busy(FaultyStorage):
        def list_blobs(self, prefix: str):
            listed = super().list_blobs(prefix)
            if prefix in {"points/", "index/"}:
                engine.clock.advance(10)
                engine.backup(pattern(next(seeds), 3 * CHUNK), vm_uuid=f"vm-{next(seeds)}")
            return listed

    seeds = count(50)
    report = verify(replace(engine.repository, storage=Busy(engine.storage)))
    assert report.healthy
    assert next(seeds) > 50


def test_many_hits_are_counted_and_their_ranges_bounded(tmp_path: Path) -> None:
    """Every second chunk of many points lies in one pack that is lost."""
    engine = Engine.fresh(tmp_path / "cache")
    shared = MemorySource(LEAF, {2 * number * CHUNK: pattern(number, 600) for number in range(32)})
    points = 0
    while points < HITS_MAX + 3:
        engine.clock.advance(10)
        engine.backup(shared, vm_uuid=f"vm-{points}", threads=1)
        points += 1
    (pack,) = blobs(engine.storage, "data/")
    engine.storage.delete(pack)
    report = check(engine.repository)
    (finding,) = report.findings
    assert (finding.blob, len(finding.points), finding.points_omitted) == (pack, HITS_MAX, 3)
    disk = finding.points[0].disks[0]
    assert len(disk.ranges) == RANGES_MAX
    assert disk.lost_bytes == 32 * CHUNK
    assert disk.to_record()["ranges_complete"] is False
    assert len(report.points_hit) == points


def test_shared_subtrees_are_walked_once(engine: Engine) -> None:
    before = check(engine.repository).examined
    for _ in range(3):
        engine.clock.advance(10)
        engine.backup(pattern(1, 40 * CHUNK))
    after = check(engine.repository).examined
    assert after.points == 4
    assert (after.nodes, after.references) == (before.nodes, before.references)
