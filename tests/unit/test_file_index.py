"""File indexes as built from kept images: what they hold, what is stored and read again, and what damage does."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from tests.support.engine import CHUNK, Engine
from tests.support.fake_volume import FakeGuest
from tests.support.file_index import Indexing, source_of
from tests.support.guest_golden import image, kernel_said
from tests.support.repositories import overwrite
from xbfs.cli import history
from xbfs_engine.catalog.fileindex.compare import ChangeKind, differences, lookup
from xbfs_engine.catalog.fileindex.places import locate, view_of
from xbfs_engine.catalog.fileindex.segment import Entry, order
from xbfs_engine.codec.keys import Role
from xbfs_engine.core.errors import (
    Cancelled,
    GuestNotFound,
    IndexCorrupt,
    IntegrityError,
    KeyNotHeld,
    StorageUnavailable,
)
from xbfs_engine.guestfs.base import Kind, NodeId
from xbfs_engine.guestfs.guest import GuestMount, GuestTree
from xbfs_engine.ingest.fileindex.build import index_point
from xbfs_engine.ingest.fileindex.reads import ranges_of
from xbfs_engine.maintain.check import check
from xbfs_engine.maintain.verify import verify

if TYPE_CHECKING:
    from pathlib import Path

    from xbfs_engine.catalog.fileindex.indexes import FileIndexes
    from xbfs_engine.catalog.fileindex.records import VolumeIndex
    from xbfs_engine.catalog.restore_point import RestorePoint


@pytest.fixture
def lab(tmp_path: Path) -> Indexing:
    return Indexing(Engine.fresh(tmp_path))


def entries(indexes: FileIndexes, volume: VolumeIndex | None) -> list[Entry]:
    assert volume is not None
    segments = [indexes.segment(ref) for ref in volume.segments]
    return [segment.entry(number) for segment in segments for number in range(len(segment))]


def held(lab: Indexing, point: RestorePoint, volume: str = "0") -> list[Entry]:
    index = lab.indexes.get(point.id)
    assert index is not None
    return entries(lab.indexes, index.volume(volume))


@pytest.mark.parametrize("name", ["ext4", "ext4-dirty", "btrfs"])
def test_an_index_holds_what_the_kernel_said(lab: Indexing, name: str) -> None:
    point = lab.engine.backup(source_of(image(name)))
    built = lab.build(point)
    found = held(lab, point)
    facts = {path.encode(errors="surrogateescape"): fact for path, fact in kernel_said(name).items() if path != "."}
    assert {entry.path for entry in found} == facts.keys()
    for entry in found:
        fact = facts[entry.path]
        size = entry.size_bytes if entry.kind is Kind.DIRECTORY else fact.size
        assert (entry.kind.value, entry.inode, entry.size_bytes) == (fact.kind, fact.inode, size)
        assert entry.mtime_ns in fact.times
    assert [order(entry.path) for entry in found] == sorted(order(entry.path) for entry in found)
    assert (built.walked, built.taken, built.index.entries) == (("0",), (), len(facts))


def test_an_unchanged_point_is_indexed_without_opening_its_guest(lab: Indexing) -> None:
    first = lab.engine.backup(source_of(image("ext4")))
    lab.build(first)
    opened = lab.opened
    second = lab.engine.backup(source_of(image("ext4")))
    built = lab.build(second)
    assert (lab.opened, built.taken, built.walked, built.segments_stored) == (opened, ("0",), (), 0)
    assert held(lab, second) == held(lab, first)


def test_a_change_where_nothing_was_read_takes_the_volume_over(lab: Indexing) -> None:
    first = lab.engine.backup(source_of(image("ext4")))
    index = lab.build(first).index
    changed = image("ext4")
    read = {
        at for first_chunk, count in index.volumes[0].reads[0].ranges for at in range(first_chunk, first_chunk + count)
    }
    free = next(at for at in range(changed.size_bytes // CHUNK) if at not in read)
    changed.write_at(free * CHUNK, b"content of some file")
    second = lab.engine.backup(source_of(changed))
    assert second.disks[0].root != first.disks[0].root
    assert lab.build(second).taken == ("0",)


def test_a_change_where_something_was_read_lists_the_volume_again(lab: Indexing) -> None:
    first = lab.engine.backup(source_of(image("ext4")))
    lab.build(first)
    changed = image("ext4")
    changed.write_at(1024 + 0x78, b"another label")  # s_volume_name: read, but no file differs
    second = lab.engine.backup(source_of(changed))
    built = lab.build(second)
    assert (built.walked, built.segments_stored) == (("0",), 0), "all segments are shared"
    assert built.index.volumes[0].label == "another label"


def test_another_release_lists_again(lab: Indexing) -> None:
    first = lab.engine.backup(source_of(image("ext4")))
    lab.build(first, program="xbfs 1")
    second = lab.engine.backup(source_of(image("ext4")))
    assert lab.build(second, program="xbfs 2").walked == ("0",)


def test_another_disk_lists_again(lab: Indexing) -> None:
    """Nothing of a new disk was read; but a volume could now lie on both."""
    lab.build(lab.engine.backup(source_of(image("ext4"))))
    second = lab.engine.backup(source_of(image("ext4")), source_of(image("fat")))
    built = lab.build(second)
    assert built.walked == ("0", "1")
    assert {volume.kind for volume in built.index.volumes} == {"ext4", "vfat"}


def test_a_changed_file_changes_one_segment(lab: Indexing) -> None:
    guest = FakeGuest.of({f"d{n // 100:03}/f{n:05}": n for n in range(20_000)})
    lab.wrap = lambda _: guest
    first = lab.engine.backup(b"a" * CHUNK)
    whole = lab.build(first)
    guest.files["d100/f10000"] += 1
    second = lab.engine.backup(b"b" * CHUNK)
    built = lab.build(second, program="it lists again")
    assert whole.segments_stored > 15
    assert (built.segments_stored, built.segments_shared) == (1, whole.segments_stored - 1)
    old, new = (lab.indexes.get(point.id) for point in (first, second))
    assert old is not None
    assert new is not None
    changes = list(differences(lab.indexes, old.volume("v"), new.volume("v")))
    assert [(change.kind, change.path, change.fields) for change in changes] == [
        (ChangeKind.CHANGED, b"d100/f10000", ("size",))
    ]
    volume = new.volume("v")
    assert volume is not None
    found = lookup(lab.indexes, volume, b"d100/f10000")
    assert found is not None
    assert found.size_bytes == 10_001
    assert lookup(lab.indexes, volume, b"d100/f1000") is None
    assert lookup(lab.indexes, volume, b"") is None


def test_hostile_trees_end_and_tell(lab: Indexing) -> None:
    """A directory within itself, one name twice, a listing that does not go on, a depth without end."""
    guest = FakeGuest.of({"a/b": 1, "big/" + "x" * 200: 2})
    guest.loops["a/self"] = "a"
    guest.twice.add("a/b")
    guest.stuck.add("big")
    guest.endless = "deep"
    lab.wrap = lambda _: guest
    built = lab.build(lab.engine.backup(b"x" * CHUNK))
    messages = {problem.path: problem.message for problem in built.index.volumes[0].problems}
    assert "also in another place" in messages[b"a/self"]
    assert "listed twice" in messages[b"a/b"]
    assert "does not go on" in messages[b"big"]
    assert [path for path, message in messages.items() if "too deep" in message]
    assert built.index.volumes[0].settled


def test_mounts_are_found_within_their_volumes_and_taken_over(lab: Indexing) -> None:
    guest = FakeGuest.of({"@/etc/fstab": 1, "@home/me/file": 2})
    mounts = (
        GuestMount(b"/", "v", NodeId(b"@"), None, "subvol=@"),
        GuestMount(b"/home", "v", NodeId(b"@home"), None, "subvol=@home"),
        GuestMount(b"/gone", "v", NodeId(b"nowhere"), None, "subvol=@gone"),
    )
    guest.shown = GuestTree("unix", mounts, ())
    lab.wrap = lambda _: guest
    first = lab.build(lab.engine.backup(b"a" * CHUNK)).index
    assert [mount.inside for mount in first.tree.mounts] == [b"@", b"@home", None]
    assert locate(first, b"/home/me/file") == ("v", b"@home/me/file")
    assert view_of(first, "v").show(b"@home/me/file").path == b"/home/me/file"
    with pytest.raises(GuestNotFound):
        locate(first, b"/gone/x")
    guest.shown = GuestTree("unix", mounts[:2], ())
    lab.build(lab.engine.backup(b"a" * CHUNK), program="lists again")
    built = lab.build(lab.engine.backup(b"a" * CHUNK), program="lists again")
    assert built.taken == ("v",)
    assert [mount.inside for mount in built.index.tree.mounts] == [b"@", b"@home"]


def test_windows_paths_are_found_whatever_their_capitals(lab: Indexing) -> None:
    guest = FakeGuest.of({"Users/Ann/Plan.xlsx": 3})
    guest.shown = GuestTree("windows", (GuestMount(b"/C:", "v", NodeId(b"."), None, "C:"),), ())
    lab.wrap = lambda _: guest
    root = lab.build(lab.engine.backup(b"a" * CHUNK)).index
    states = history._states(lab.indexes, [root], rb"C:\users\ann\plan.xlsx", None)
    assert [state.state for state in states] == ["absent"]
    assert history._spelled(lab.indexes, [root], rb"C:\users\ann\plan.xlsx", None) == ("v", b"Users/Ann/Plan.xlsx")
    (exact,) = history._states(lab.indexes, [root], rb"C:\Users\Ann\Plan.xlsx", None)
    assert exact.entry is not None
    assert exact.entry.size_bytes == 3


def test_directories_that_can_not_be_read_are_told(lab: Indexing) -> None:
    guest = FakeGuest.of({"good/file": 1, "bad/file": 2})
    guest.broken["bad"] = IntegrityError("a chunk is damaged")
    lab.wrap = lambda _: guest
    first = lab.engine.backup(b"x" * CHUNK)
    volume = lab.build(first).index.volumes[0]
    assert [(problem.path, problem.message) for problem in volume.problems] == [(b"bad", "a chunk is damaged")]
    assert not volume.settled
    guest.broken.clear()
    built = lab.build(lab.engine.backup(b"x" * CHUNK))
    assert built.walked == ("v",), "nothing changed, but it may be readable now"
    assert not built.index.volumes[0].problems


def test_a_large_directory_comes_sorted(lab: Indexing, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("xbfs_engine.ingest.fileindex.walk.RUN_ROWS", 1000)
    guest = FakeGuest.of({f"d/{n * 7919 % 10007}": n for n in range(10_007)})
    lab.wrap = lambda _: guest
    point = lab.engine.backup(b"x" * CHUNK)
    lab.build(point)
    paths = [entry.path for entry in held(lab, point, "v")]
    assert paths == [b"d", *sorted(b"d/%d" % n for n in range(10_007))]


def test_a_node_can_not_build_but_search(lab: Indexing) -> None:
    point = lab.engine.backup(source_of(image("fat")))
    lab.build(point)
    keys = lab.engine.repository.keys
    epochs = tuple(replace(epoch, data=replace(epoch.data, private=None)) for epoch in keys.epochs)
    node = replace(lab.engine.repository, keys=replace(keys, role=Role.NODE, epochs=epochs))
    lab.engine.repository = node
    assert held(lab, point)
    with pytest.raises(KeyNotHeld):
        index_point(node, lab.engine.catalog, lab.engine.index, point, [], lab.guest, program="test")


def test_what_stops_half_way_is_not_seen(lab: Indexing) -> None:
    """Whichever put fails: there is no index, nothing is damaged, and the next build does it."""
    point = lab.engine.backup(source_of(image("fat")))
    storage = lab.engine.storage
    put, puts = storage.put, 0
    for failing in range(10):
        puts = 0

        def failing_put(name: str, parts: object, failing: int = failing) -> None:
            nonlocal puts
            puts += 1
            if puts > failing:
                raise StorageUnavailable("gone")
            put(name, parts)  # type: ignore[arg-type]

        storage.put = failing_put  # type: ignore[method-assign]
        try:
            lab.build(point)
        except StorageUnavailable:
            storage.put = put  # type: ignore[method-assign]
            assert lab.indexes.get(point.id) is None
            assert not lab.indexes.points()
            assert check(lab.engine.repository).healthy
        else:
            break
    assert failing > 1, "segments, their index blob, and the root"
    storage.put = put  # type: ignore[method-assign]
    assert held(lab, point)


def test_a_build_can_be_stopped(lab: Indexing) -> None:
    point = lab.engine.backup(source_of(image("ext4")))
    disks, engine = lab.disks(point), lab.engine
    with pytest.raises(Cancelled):
        index_point(
            engine.repository, engine.catalog, engine.index, point, disks, lab.guest, program="t", stop=lambda: True
        )
    assert lab.indexes.get(point.id) is None


def test_building_twice_leaves_one_root_and_stores_nothing_anew(lab: Indexing) -> None:
    point = lab.engine.backup(source_of(image("ext4")))
    lab.build(point)
    before = held(lab, point)
    again = lab.build(point, force=True)
    assert (again.segments_stored, again.walked) == (0, ("0",))
    assert len(list(lab.engine.storage.list_blobs("files/"))) == 1
    assert held(lab, point) == before


def test_check_and_verify_know_indexes(lab: Indexing) -> None:
    lab.build(lab.engine.backup(source_of(image("ext4"))))
    for examine in (check, verify):
        report = examine(lab.engine.repository)
        assert (report.damages, report.notes) == (0, 0)


def test_a_damaged_root_is_told_and_built_anew(lab: Indexing) -> None:
    point = lab.engine.backup(source_of(image("fat")))
    lab.build(point)
    (root,) = [blob.name for blob in lab.engine.storage.list_blobs("files/")]
    blob = bytearray(lab.engine.storage.get(root))
    blob[200] ^= 1
    overwrite(lab.engine.storage, root, bytes(blob))  # type: ignore[arg-type]
    with pytest.raises(IndexCorrupt):
        lab.indexes.get(point.id)
    report = check(lab.engine.repository)
    assert [(finding.kind.value, finding.blob) for finding in report.findings] == [("file index", root)]
    assert not report.points_hit
    lab.build(point, force=True)
    assert held(lab, point)
    assert check(lab.engine.repository).healthy


def test_lost_segments_are_told_and_built_anew(lab: Indexing) -> None:
    engine = lab.engine
    point = engine.backup(source_of(image("fat")))
    lab.build(point)
    index = lab.indexes.get(point.id)
    assert index is not None
    pack = index.volumes[0].segments[0].ref.pack.hex()
    engine.storage.delete(f"meta/{pack[:2]}/{pack}")
    report = check(engine.repository)
    assert {finding.kind.value for finding in report.findings} == {"metadata pack", "file index"}
    assert not report.points_hit
    with pytest.raises(IntegrityError):
        held(lab, point)
    lab.build(point, force=True)
    assert held(lab, point)
    assert {finding.kind.value for finding in check(engine.repository).findings} == {"metadata pack"}


def test_an_index_of_a_point_that_is_gone_is_a_note(lab: Indexing) -> None:
    point = lab.engine.backup(source_of(image("fat")))
    lab.build(point)
    lab.engine.storage.delete(f"points/{point.id}")
    report = check(lab.engine.repository)
    assert (report.damages, [finding.kind.value for finding in report.findings]) == (0, ["file index"])


def test_an_index_hung_under_another_point_is_refused(lab: Indexing) -> None:
    first = lab.engine.backup(source_of(image("fat")))
    second = lab.engine.backup(source_of(image("ext4")))
    lab.build(first)
    (root,) = [blob.name for blob in lab.engine.storage.list_blobs("files/")]
    lab.engine.storage.put(root.replace(first.id, second.id), [lab.engine.storage.get(root)])
    with pytest.raises(IndexCorrupt, match="another restore point"):
        lab.indexes.get(second.id)


def test_ranges_take_in_gaps_when_there_are_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ranges_of([]) == ()
    assert ranges_of([5, 1, 2, 9]) == ((1, 2), (5, 1), (9, 1))
    monkeypatch.setattr("xbfs_engine.ingest.fileindex.reads.RANGES_MAX", 4)
    wide = ranges_of(range(0, 1000, 3))
    assert len(wide) <= 4
    covered = {at for first, count in wide for at in range(first, first + count)}
    assert covered >= set(range(0, 1000, 3))
