"""Damage of every kind to every blob: verify finds it, and names exactly the points and bytes that can not be read.

What can not be read is not taken from the product's walk: every chunk of every disk is read, one by one, by position.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import count
from typing import TYPE_CHECKING, NamedTuple

import pytest

from tests.support.engine import CHUNK, Engine, MemorySource, blobs, pattern
from xbfs_engine.catalog.blockmap import BlockMap, NodeStore
from xbfs_engine.catalog.catalog import Catalog
from xbfs_engine.codec.envelope import HEADER_SIZE, ObjectKind
from xbfs_engine.codec.keys import Role
from xbfs_engine.core.errors import XbfsError
from xbfs_engine.core.ids import BlobHash
from xbfs_engine.maintain.check import check
from xbfs_engine.maintain.report import Kind, Severity
from xbfs_engine.maintain.verify import verify
from xbfs_engine.storage.memory import MemoryStorage
from xbfs_engine.store.index import ChunkIndex
from xbfs_engine.store.index_blob import get_index
from xbfs_engine.store.pack import FOOTER, blob_hash, open_pack_bytes
from xbfs_engine.store.reader import ChunkReader

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from xbfs_engine.maintain.report import Finding, PointHit, Report
    from xbfs_engine.store.repository import Repository

Lost = dict[tuple[str, int], set[int]]
"""Positions of chunks that can not be read, by point and disk."""
Blobs = dict[str, bytes]


class Scene(NamedTuple):
    """A healthy repository: vm-1 with two points of two disks, vm-2 with one point that shares nothing with them."""

    repository: Repository
    blobs: Blobs
    first: str
    second: str
    other: str
    caches: Iterator[str]
    cache_root: Path

    def with_blobs(self, changes: dict[str, bytes | None]) -> Repository:
        """The repository over other bytes; None removes a blob. It was opened while it was healthy."""
        storage = MemoryStorage()
        for name, data in (self.blobs | changes).items():
            if data is not None:
                storage.put(name, [data])
        return replace(self.repository, storage=storage)

    def lost(self, repository: Repository) -> Lost:
        """What can not be read, by reading everything."""
        storage, keys = repository.storage, repository.keys
        index = ChunkIndex(storage, keys, self.cache_root / next(self.caches))
        index.refresh()
        catalog = Catalog(repository)
        catalog.refresh()
        found: Lost = {}
        for point in catalog.points():
            for disk in point.disks:
                blockmap = BlockMap(NodeStore(ChunkReader(storage, keys, index)), disk.root, disk.chunks)
                for position in range(disk.chunks):
                    try:
                        ref = blockmap.chunk(position)
                        if ref is not None:
                            ChunkReader(storage, keys, index).fetch([ref], ObjectKind.DATA_PACK)
                    except XbfsError:
                        found.setdefault((point.id, disk.number), set()).add(position)
        return found


def content(seed: int) -> bytes:
    """A chunk that compresses to some 250 bytes: packs stay small, so that many of their bytes can be tried."""
    return pattern(seed, 160) * 409 + bytes(96)


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    root = tmp_path_factory.mktemp("damage")
    engine = Engine.fresh(root / "engine")
    system = [content(number) for number in range(12)]
    data = {70 * CHUNK: content(100) + content(101), 0: content(102)}
    first = engine.backup(b"".join(system), MemorySource(80 * CHUNK + 5, data), threads=1)
    engine.clock.advance(10)
    system[3] = content(300)
    # The second disk grows by nothing and keeps its chunks: its map is shared by both points.
    second = engine.backup(
        b"".join(system), MemorySource(80 * CHUNK + 5, data), changed=[(3 * CHUNK, CHUNK)], threads=1
    )
    engine.clock.advance(10)
    other = engine.backup(content(500) + content(501), vm_uuid="vm-2", threads=1)
    caches = (f"oracle-{number}" for number in count())
    return Scene(engine.repository, blobs(engine.storage), first.id, second.id, other.id, caches, root)


def damages(report: Report) -> list[Finding]:
    return [finding for finding in report.findings if finding.severity is Severity.DAMAGE]


def positions(hits: tuple[PointHit, ...]) -> Lost:
    """Chunks named by byte ranges; each range must consist of whole chunks of the disk."""
    found: Lost = {}
    for hit in hits:
        for disk in hit.disks:
            assert disk.lost_bytes == sum(length for _, length in disk.ranges), "few enough to be listed"
            for offset, length in disk.ranges:
                assert offset % CHUNK == 0
                found.setdefault((hit.point, disk.number), set()).update(
                    range(offset // CHUNK, -(-(offset + length) // CHUNK))
                )
    return found


def assert_names_what_is_lost(scene: Scene, report: Report, repository: Repository) -> None:
    truth = scene.lost(repository)
    # A lost node takes all it covers, also what of that is zero: reading by position finds the same.
    assert positions(tuple(hit for hit in report.points_hit if hit.vm_name is not None)) == truth
    by_finding: Lost = {}
    for finding in report.findings:
        for place, chunks in positions(tuple(hit for hit in finding.points if hit.vm_name is not None)).items():
            by_finding.setdefault(place, set()).update(chunks)
    assert by_finding == truth


def flipped(blob: bytes, at: int, bit: int = 0) -> bytes:
    return blob[:at] + bytes([blob[at] ^ 1 << bit]) + blob[at + 1 :]


def folder(name: str) -> str:
    return name.partition("/")[0]


def sweep(scene: Scene, stride: int) -> Iterator[tuple[str, int, bytes]]:
    """Single flipped bits: every ``stride`` bytes of every blob, and the edges of its regions."""
    for name, blob in scene.blobs.items():
        edges = {0, HEADER_SIZE - 32, HEADER_SIZE, len(blob) - FOOTER.size, len(blob) - FOOTER.size - 1, len(blob) - 1}
        for at in sorted({*range(0, len(blob), stride), *edges}):
            if 0 <= at < len(blob):
                yield name, at, flipped(blob, at, at % 8)


def verify_finds_flips(scene: Scene, stride: int) -> None:
    tried: dict[str, int] = {}
    for name, at, changed in sweep(scene, stride):
        repository = scene.with_blobs({name: changed})
        report = verify(repository)
        assert name in {finding.blob for finding in damages(report)}, f"byte {at} of {name}"
        assert_names_what_is_lost(scene, report, repository)
        if folder(name) == "points":
            assert [hit.point for hit in report.points_hit] == [name.partition("/")[2]]
        tried[folder(name)] = tried.get(folder(name), 0) + 1
    assert tried.keys() == {"config", "keys", "points", "index", "data", "meta"}
    assert sum(tried.values()) > 200


def test_a_healthy_repository_has_no_damage_and_no_notes(scene: Scene) -> None:
    for examine in (check, verify):
        report = examine(scene.repository)
        assert (report.findings, report.points_hit, report.healthy) == ((), (), True)
    examined = verify(scene.repository).examined
    assert examined.points == 3
    assert examined.packs == sum(folder(name) in {"data", "meta"} for name in scene.blobs)
    assert examined.read_bytes == sum(len(b) for name, b in scene.blobs.items() if folder(name) in {"data", "meta"})


def test_verify_finds_a_flipped_bit_anywhere_and_who_is_hit(scene: Scene) -> None:
    verify_finds_flips(scene, 97)


@pytest.mark.slow
def test_verify_finds_flipped_bits_at_thousands_of_places(scene: Scene) -> None:
    verify_finds_flips(scene, 5)


def test_check_finds_a_flipped_bit_outside_of_chunks(scene: Scene) -> None:
    for name, at, changed in sweep(scene, 61):
        if folder(name) in {"data", "meta"} and HEADER_SIZE <= at < _directory_at(scene.blobs[name]):
            continue
        report = check(scene.with_blobs({name: changed}))
        assert name in {finding.blob for finding in damages(report)}, f"byte {at} of {name}"


def test_check_finds_a_flipped_bit_in_a_block_map_node(scene: Scene) -> None:
    for name, blob in scene.blobs.items():
        if folder(name) == "meta":
            repository = scene.with_blobs({name: flipped(blob, HEADER_SIZE + 20)})
            report = check(repository)
            assert name in {finding.blob for finding in damages(report)}
            assert_names_what_is_lost(scene, report, repository)


def _directory_at(blob: bytes) -> int:
    return len(blob) - FOOTER.size - FOOTER.unpack(blob[-FOOTER.size :])[0]


@pytest.mark.parametrize("examine", [check, verify])
def test_truncated_and_extended_blobs_are_found(scene: Scene, examine) -> None:
    for name, blob in scene.blobs.items():
        for changed in (b"", blob[: len(blob) // 2], blob[:-1], blob + b"\0"):
            repository = scene.with_blobs({name: changed})
            report = examine(repository)
            assert name in {finding.blob for finding in damages(report)}, f"{name} with {len(changed)} bytes"
            assert_names_what_is_lost(scene, report, repository)


@pytest.mark.parametrize("examine", [check, verify])
def test_missing_blobs_are_found(scene: Scene, examine) -> None:
    for name in scene.blobs:
        repository = scene.with_blobs({name: None})
        report = examine(repository)
        found = {finding.blob: finding for finding in report.findings}
        match folder(name):
            case "data" | "meta":
                assert found[name].severity is Severity.DAMAGE
                assert found[name].points
            case "index":
                assert found["index/"].severity is Severity.DAMAGE
                assert not report.points_hit, "points are read without the index"
            case "config":
                assert found["config/"].severity is Severity.DAMAGE
            case "points" if name.endswith(scene.first):
                assert found[name].severity is Severity.NOTE, "the second point names it as its parent"
            case _:
                # A newest point or a key slot that somebody removed leaves no trace in the repository itself. The
                # packs of such a point are listed and whole, so they are no orphans either.
                assert report.healthy
        assert_names_what_is_lost(scene, report, repository)


@pytest.mark.parametrize("examine", [check, verify])
def test_blobs_under_each_others_names_are_found(scene: Scene, examine) -> None:
    names = list(scene.blobs)
    for number, left in enumerate(names):
        for right in names[number + 1 :]:
            if folder(left) != folder(right):
                continue
            repository = scene.with_blobs({left: scene.blobs[right], right: scene.blobs[left]})
            report = examine(repository)
            assert {left, right} <= {finding.blob for finding in damages(report)}
            assert_names_what_is_lost(scene, report, repository)


def test_blobs_of_one_folder_under_names_of_another_are_found(scene: Scene) -> None:
    by_folder = {folder(name): name for name in scene.blobs}
    for left in by_folder.values():
        for right in by_folder.values():
            if left != right:
                report = verify(scene.with_blobs({left: scene.blobs[right]}))
                assert left in {finding.blob for finding in damages(report)}


def test_all_key_slots_gone_is_damage(scene: Scene) -> None:
    report = check(scene.with_blobs(dict.fromkeys(name for name in scene.blobs if folder(name) == "keys")))
    assert [finding.kind for finding in damages(report)] == [Kind.KEY_SLOT]


@pytest.mark.parametrize("examine", [check, verify])
def test_foreign_blobs_are_found(scene: Scene, examine, tmp_path) -> None:
    stranger = Engine.fresh(tmp_path / "cache")
    alien_pack = bytearray(next(data for name, data in scene.blobs.items() if folder(name) == "data"))
    alien_pack[40] ^= 1  # sealed to somebody else's key
    alien = bytes(alien_pack)
    name = blob_hash(alien).hex()
    cases = {
        f"data/{name[:2]}/{name}": (alien, Severity.DAMAGE),
        f"data/00/{name}": (alien, Severity.DAMAGE),
        "data/readme": (b"x", Severity.DAMAGE),
        "points/" + "0" * 64 + ".bak": (b"x", Severity.DAMAGE),
        "points/" + "0" * 64: (b"x", Severity.DAMAGE),
        "index/" + "0" * 64: (b"x", Severity.DAMAGE),
        "config/1": (b"x", Severity.DAMAGE),
        "keys/somebody": (b"x", Severity.DAMAGE),
        "lost-and-found": (b"x", Severity.NOTE),
    }
    assert stranger.repository.keys.repository_id == scene.repository.keys.repository_id
    for blob, (data, severity) in cases.items():
        report = examine(scene.with_blobs({blob: data}))
        assert {finding.blob: finding.severity for finding in report.findings} == {blob: severity}
        assert not [hit for hit in report.points_hit if hit.vm_name is not None]


def test_what_an_interrupted_run_leaves_is_a_note(scene: Scene) -> None:
    """Kill a run before its index blob, before its metadata, before its manifest."""
    ours = {name for name in scene.blobs if scene.other not in name}
    newest = [name for name in scene.blobs if name in ours]
    last_packs = [name for name in newest if folder(name) in {"data", "meta", "index"}][-4:]
    assert [folder(name) for name in last_packs] == ["data", "index", "meta", "index"]
    manifest = f"points/{scene.other}"
    for kept in range(1, 5):
        gone = dict.fromkeys([manifest, *last_packs[kept:]])
        report = verify(scene.with_blobs(gone))
        assert report.healthy
        orphans = {"data": last_packs[0], "meta": last_packs[2]}
        expected = {1: {orphans["data"]}, 2: set(), 3: {orphans["meta"]}, 4: set()}[kept]
        assert {finding.blob for finding in report.findings} == expected


def test_a_chunk_that_the_index_finds_elsewhere_is_not_lost(tmp_path) -> None:
    """Two processes stored the same chunks; one pack went together with the index blob that lists it."""
    engine = Engine.fresh(tmp_path / "a")
    engine.backup(content(1) + content(2), threads=1)
    before = blobs(engine.storage)
    (tmp_path / "b").mkdir()
    late = Engine(engine.storage, tmp_path / "b", clock=engine.clock)
    late.index.refresh = lambda: None
    engine.clock.advance(10)
    late.backup(content(2) + content(1) + content(3), vm_uuid="vm-2", threads=1)
    first, second = sorted(blobs(engine.storage, "data/"), key=lambda name: name not in before)
    keys = engine.repository.keys
    for name in blobs(engine.storage, "index/"):
        listed = get_index(engine.storage, keys, BlobHash(bytes.fromhex(name.partition("/")[2])))
        if any(first.endswith(pack.pack.hex()) for pack in listed):
            engine.storage.delete(name)
    engine.storage.delete(first)
    for examine in (check, verify):
        report = examine(engine.repository)
        assert (report.healthy, report.points_hit) == (True, ())
    engine.storage.delete(second)
    report = verify(engine.repository)
    assert sorted(disk.lost_bytes for hit in report.points_hit for disk in hit.disks) == [2 * CHUNK, 3 * CHUNK]
    assert {finding.blob for finding in damages(report)} == {first, second}


def test_a_node_finds_what_its_keys_can_show(scene: Scene) -> None:
    """Without the data keys: names of data packs, and references by the index."""
    keys = scene.repository.keys
    epochs = tuple(replace(epoch, data=replace(epoch.data, private=None)) for epoch in keys.epochs)
    node_keys = replace(keys, role=Role.NODE, epochs=epochs)

    def as_node(changes: dict[str, bytes | None]) -> Repository:
        return replace(scene.with_blobs(changes), keys=node_keys)

    for examine in (check, verify):
        report = examine(as_node({}))
        assert report.healthy
        assert [finding.kind for finding in report.findings] == [Kind.ROLE]
    pack = next(name for name in scene.blobs if folder(name) == "data")
    for changes in ({pack: flipped(scene.blobs[pack], 300)}, {pack: None}):
        report = verify(as_node(changes))
        assert {hit.point for hit in report.points_hit} == {scene.first, scene.second}
        assert pack in {finding.blob for finding in damages(report)}
    lost = check(as_node({pack: None}))
    assert {hit.point for hit in lost.points_hit} == {scene.first, scene.second}


def test_damage_of_one_chunk_names_its_byte_range_and_nothing_else(scene: Scene) -> None:
    """The changed chunk of the second point: only that point, only that disk, only those bytes."""
    keys = scene.repository.keys
    for name, blob in scene.blobs.items():
        if folder(name) != "data":
            continue
        directory = open_pack_bytes(keys, ObjectKind.DATA_PACK, blob_hash(blob), blob).directory
        if directory.id_at(0) != keys.chunk_id(content(300)):
            continue
        report = verify(scene.with_blobs({name: flipped(blob, directory.offsets[0] + 5)}))
        (hit,) = report.points_hit
        assert (hit.point, hit.vm_name) == (scene.second, "vm")
        (disk,) = hit.disks
        assert (disk.number, list(disk.ranges), disk.lost_bytes) == (0, [(3 * CHUNK, CHUNK)], CHUNK)
        (finding,) = damages(report)
        assert finding.points == report.points_hit
        record = report.to_record()
        assert record["healthy"] is False
        return
    pytest.fail("no pack holds the changed chunk")
