"""The mounted repository without a kernel: new points, storage that fails or hangs while listing, open images."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import trio

from tests.support.boot_results import boot_test
from tests.support.engine import CHUNK, Engine, pattern
from tests.support.faulty_storage import Fault, FaultyStorage, Kind, Mode
from tests.support.guests_here import GuestsHere
from xbfs.vfs import inodes
from xbfs.vfs.filesystem import MISS_REFRESH_S, Changes, FileSystem, ViewOptions
from xbfs_engine.catalog.boottests import put_boot_test
from xbfs_engine.catalog.catalog import Catalog
from xbfs_engine.core.errors import ChunkCorrupt, StorageUnavailable
from xbfs_engine.core.ids import PointId
from xbfs_engine.storage.memory import MemoryStorage

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

DATA = pattern(1, 3 * CHUNK)


class Repository:
    """A repository with one point and, as another process has it, the storage seen through ``faults``."""

    def __init__(self, folder: Path) -> None:
        self.storage = MemoryStorage()
        self.engine = Engine.fresh(folder, self.storage)
        self.point = self.engine.backup(DATA)

    def another_point(self) -> str:
        return self.engine.backup(pattern(2, 3 * CHUNK)).id


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    return Repository(tmp_path)


def run(repository: Repository, test: Callable[[FileSystem], Awaitable[None]], *faults: Fault) -> FaultyStorage:
    """Run ``test`` with a file system that looks at the repository; the engine's own runs are outside the loop."""
    storage = FaultyStorage(repository.storage, faults)
    opened = Engine(storage, repository.engine.index._directory, clock=repository.engine.clock)

    async def main() -> None:
        filesystem = FileSystem(opened.repository, Catalog(opened.repository), ViewOptions(deadline_s=5), GuestsHere())
        async with trio.open_nursery() as nursery:
            nursery.start_soon(filesystem.tend)
            try:
                await test(filesystem)
            finally:
                storage.release()
                filesystem.close()
                nursery.cancel_scope.cancel()

    trio.run(main)
    return storage


def status(filesystem: FileSystem) -> dict[str, object]:
    text = filesystem.tree.text(inodes.STATUS)
    assert text is not None
    found = json.loads(text)
    assert isinstance(found, dict)
    return found


def report(filesystem: FileSystem, inode: int) -> dict[str, Any]:
    found = json.loads(filesystem.tree.text(inode) or b"")
    assert isinstance(found, dict)
    return found


def test_a_missing_name_is_looked_for_but_not_often(repository: Repository) -> None:
    async def look(filesystem: FileSystem) -> None:
        found = await filesystem.lookup(inodes.BY_ID, repository.point.id)
        assert found is not None, "nothing was listed yet, so this looks"
        new = await trio.to_thread.run_sync(repository.another_point)
        assert await filesystem.lookup(inodes.BY_ID, new) is None, "looked a moment ago"
        repository.engine.clock.advance(MISS_REFRESH_S)
        assert await filesystem.lookup(inodes.BY_ID, new) is not None

    run(repository, look)


def test_names_in_directories_that_do_not_grow_cost_nothing(repository: Repository) -> None:
    async def look(filesystem: FileSystem) -> None:
        await filesystem.refresh()
        point = filesystem.tree.points.by_id[repository.point.id]
        for directory in (inodes.ROOT, inodes.AT, inodes.META, inodes.make(point.owner, inodes.POINT_DISKS)):
            repository.engine.clock.advance(10)
            assert await filesystem.lookup(directory, "autorun.inf") is None
            assert filesystem.tree.attributes(directory) is not None

    async def refresh(filesystem: FileSystem) -> None:
        await filesystem.refresh()

    assert run(repository, look).counts[Kind.LIST] == run(repository, refresh).counts[Kind.LIST]


def test_changes_name_what_is_gone_and_what_has_grown(repository: Repository) -> None:
    async def look(filesystem: FileSystem) -> None:
        told: list[Changes] = []
        filesystem.tell = told.append
        await filesystem.refresh()
        await filesystem.refresh()
        assert [(list(change.gone), list(change.turned)) for change in told] == [([], [])]
        new = await trio.to_thread.run_sync(repository.another_point)
        owner = filesystem.tree.points.by_id[repository.point.id].vm.owner
        vm, latest = inodes.make(owner, inodes.VM_DIRECTORY), inodes.make(owner, inodes.VM_LATEST)
        await filesystem.lookup(inodes.BY_ID, new)
        assert told[1].gone == []
        assert vm in told[1].grown
        assert told[1].turned == [latest]
        repository.storage.delete(f"points/{repository.point.id}")
        await filesystem.look_again()
        assert set(told[2].gone) == {(vm, "2026-09-21T141320Z"), (inodes.BY_ID, repository.point.id)}
        assert told[2].turned == []
        repository.storage.delete(f"points/{new}")
        await filesystem.refresh()
        assert (inodes.VMS, "vm") in told[3].gone
        assert filesystem.tree.entries(inodes.VMS) == []

    run(repository, look)


def test_a_boot_test_of_a_point_is_told_of_and_shown(repository: Repository) -> None:
    async def look(filesystem: FileSystem) -> None:
        await filesystem.refresh()
        told: list[Changes] = []
        filesystem.tell = told.append
        shown = filesystem.tree.points.by_id[repository.point.id]
        inode = inodes.make(shown.owner, inodes.POINT_REPORT)
        before = filesystem.tree.attributes(inode)
        assert report(filesystem, inode)["tests"] == []
        for made_ns in (5 << 60, 6 << 60):
            test = boot_test(PointId(repository.point.id), made_ns)
            await trio.to_thread.run_sync(put_boot_test, repository.engine.repository, test)
        await filesystem.refresh()
        await filesystem.refresh()
        assert told == [Changes(turned=[inode])]
        assert [test["verdict"] for test in report(filesystem, inode)["tests"]] == ["booted"] * 2
        after = filesystem.tree.attributes(inode)
        assert before is not None
        assert after is not None
        assert after.size_bytes == len(filesystem.tree.text(inode) or b"") > before.size_bytes
        assert after.mtime_ns == 6 << 60
        assert after.live
        for blob in list(repository.storage.list_blobs("tests/")):
            repository.storage.delete(blob.name)
        await filesystem.refresh()
        assert len(told) == 2
        assert filesystem.tree.attributes(inode) == before

    run(repository, look)


def test_a_listing_that_fails_keeps_what_is_known_and_says_so(repository: Repository) -> None:
    async def look(filesystem: FileSystem) -> None:
        storage = filesystem._catalog._repository.storage
        assert isinstance(storage, FaultyStorage)
        await filesystem.refresh()
        storage._script = (Fault(Mode.BEFORE, Kind.LIST, nth=None),)
        with pytest.raises(StorageUnavailable):
            await filesystem.refresh()
        await filesystem.look_again()
        assert "injected" in str(status(filesystem)["refresh_problem"])
        assert not status(filesystem)["healthy"]
        assert await filesystem.lookup(inodes.BY_ID, "0" * 64) is None
        assert filesystem.tree.lookup(inodes.BY_ID, repository.point.id) is not None
        storage._script = ()
        await filesystem.look_again()
        assert status(filesystem)["refresh_problem"] is None
        assert status(filesystem)["healthy"]

    run(repository, look)


def test_a_bug_while_looking_again_ends_nothing(repository: Repository, monkeypatch: pytest.MonkeyPatch) -> None:
    async def look(filesystem: FileSystem) -> None:
        monkeypatch.setattr(filesystem, "_load", lambda before: 1 // 0)
        await filesystem.look_again()
        assert "ZeroDivisionError" in str(status(filesystem)["refresh_problem"])

    run(repository, look)


def test_a_listing_that_hangs_holds_nobody_up(repository: Repository) -> None:
    async def look(filesystem: FileSystem) -> None:
        storage = filesystem._catalog._repository.storage
        assert isinstance(storage, FaultyStorage)
        await filesystem.refresh()
        storage._script = (Fault(Mode.HANG, Kind.LIST, nth=None),)
        repository.engine.clock.advance(10)
        with trio.fail_after(10):
            for _ in range(3):
                assert await filesystem.lookup(inodes.VMS, "nobody") is None
            assert await filesystem.lookup(inodes.VMS, "vm") is not None
        image = filesystem.tree.lookup(inodes.VMS, "vm")
        assert image is not None

    run(repository, look)


def test_images_are_read_and_damage_is_noted_once(repository: Repository) -> None:
    async def look(filesystem: FileSystem) -> None:
        await filesystem.refresh()
        shown = filesystem.tree.points.by_id[repository.point.id]
        inode = inodes.make(shown.owner, inodes.image_code(0, 0))
        file = filesystem.tree.image(inode)
        assert file is not None
        handle = filesystem.open_image(file, inode)
        assert handle.read_cached(0, 100) is None
        assert await handle.read(0, 100) == DATA[:100]
        assert handle.read_cached(0, 100) == DATA[:100]
        for blob in list(repository.storage.list_blobs("data/")):
            data = bytearray(repository.storage.get(blob.name))
            repository.storage.delete(blob.name)
            data[200 + 2 * CHUNK] ^= 1
            repository.storage.put(blob.name, [data])
        for _ in range(5):
            with pytest.raises(ChunkCorrupt):
                await handle.read(2 * CHUNK, CHUNK)
        found = status(filesystem)
        assert not found["healthy"]
        (problem,) = found["recent_problems"]  # type: ignore[misc]  # JSON
        assert problem["offset"] == 2 * CHUNK
        assert problem["image"] == "vms/vm/2026-09-21T141320Z/disks/0.raw"
        assert f"byte {2 * CHUNK} of the disk" in problem["problem"]
        assert b"xbfs_reads_failed_total 5\n" in (filesystem.tree.text(inodes.METRICS) or b"")

    run(repository, look)
