"""What commits are made of: runs that take disks over, freezes that end, and records that promise no delta."""

from __future__ import annotations

from contextlib import AsyncExitStack
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import trio

from tests.support.disks import MemoryDisk
from tests.support.engine import CHUNK, LEAF, Engine, MemorySource, pattern
from tests.support.runtime import FixedClock
from xbfs.instant.bases import Bases
from xbfs.instant.commit import _without_bases
from xbfs.instant.freezing import Freezing, changed_of
from xbfs.instant.served import Served
from xbfs.instant.session import DiskFormat, Export, Session, SessionDisk
from xbfs.vfs.live.frozen import TOP
from xbfs.vfs.live.tree import LiveTree
from xbfs.view.overlay import create_overlay
from xbfs_engine.core.errors import (
    NoBasePoint,
    SessionBusy,
    SessionNotFound,
    StorageError,
    StorageFull,
    UsageError,
)
from xbfs_engine.core.ids import PointId
from xbfs_engine.ingest.vm.base import XenBase, base_of

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from xbfs.view.overlay import Overlay

SIZE = 40 * CHUNK + 512


@pytest.fixture
def engine(tmp_path: Path) -> Engine:
    return Engine.fresh(tmp_path)


def test_a_disk_that_is_taken_over_is_as_in_the_base_and_costs_nothing(engine: Engine) -> None:
    base = engine.backup(pattern(1, LEAF), pattern(2, LEAF), pattern(3, LEAF))
    source = MemorySource.of(pattern(4, CHUNK) + pattern(2, LEAF)[CHUNK:])
    run = engine.run({1: (source, [(0, CHUNK)])})
    run._request = replace(run._request, base=base.id, carried={2: "as it was", 0: "as it was"})
    point = trio.run(run.run)
    assert [disk.number for disk in point.disks] == [0, 1, 2]
    for number in (0, 2):
        old, new = base.disks[number], point.disks[number]
        assert (new.root, new.data_map.bits(), new.vdi_uuid) == (old.root, old.data_map.bits(), old.vdi_uuid)
        assert (new.reason, new.statistics.source_bytes) == ("as it was", 0)
    assert source.read_bytes == CHUNK
    assert engine.read(engine.points()[-1].disks[1]) == source.pieces[0]


def test_what_can_not_be_taken_over_makes_no_point(engine: Engine) -> None:
    engine.backup(pattern(1, LEAF))
    for carried, error in (({7: ""}, NoBasePoint), ({0: ""}, UsageError)):
        run = engine.run({0: (MemorySource.of(pattern(1, LEAF)), None)})
        run._request = replace(run._request, carried=carried)
        with pytest.raises(error):
            trio.run(run.run)
    assert len(engine.points()) == 1


def test_a_point_is_of_the_moment_that_is_given_unless_a_later_one_is_there(engine: Engine) -> None:
    first = engine.backup(b"a")
    times = []
    for moment in (first.time_ns + 5 * 10**9, first.time_ns):
        run = engine.run({0: (MemorySource.of(b"b"), None)})
        run._request = replace(run._request, time_ns=moment)
        times.append(trio.run(run.run).time_ns)
    assert times == [first.time_ns + 5 * 10**9, (first.time_ns // 10**9 + 6) * 10**9]


def test_the_next_backup_from_the_pool_has_no_snapshot_to_compare_with() -> None:
    base = XenBase("pool", {0: "kept"}, {0: "taken", 1: "other"}, {2: "a CD"})
    vm = _without_bases({"name": "web", "xen": base.to_record()})
    assert vm["name"] == "web"
    assert base_of(vm) == replace(base, snapshots={})
    assert _without_bases({"name": "web"}) == {"name": "web"}
    assert _without_bases({"xen": {"version": 2}, "name": "web"}) == {"name": "web"}


class Bench:
    """A session of one disk, and who freezes it."""

    def __init__(self, directory: Path, bases: Bases) -> None:
        self.overlay: Overlay = create_overlay(directory / "o", MemoryDisk.full(SIZE), identity=b"test")
        disk = SessionDisk(3, DiskFormat.RAW, "3.raw")
        session = Session("one", PointId("ab"), "web", 1, Export.FILE, (disk,))
        self.served = {"one": Served(session, directory, directory / "live/one", {"3": self.overlay})}
        self.tree = LiveTree(FixedClock())
        self.freezing = Freezing(self.tree, self.served, bases, trio.Lock(), FixedClock())

    async def ask(self, verb: str, connection: AsyncExitStack) -> object:
        return await self.freezing.handlers[verb]({"name": "one"}, connection)

    def shown(self) -> dict[str, bytes]:
        """The content of the files that are shown."""
        frozen = self.tree.frozen
        directories = frozen.names(TOP)
        if not directories:
            return {}
        images = {name: frozen.image(inode)[0] for name, inode in frozen.names(directories[b"one"]).items()}
        return {name.decode(): image.read_at(0, image.size_bytes) for name, image in images.items()}


@pytest.fixture
def bench(tmp_path: Path, engine: Engine) -> Iterator[Bench]:
    bench = Bench(tmp_path, Bases(engine.repository, engine.catalog, engine.index))
    yield bench
    bench.overlay.close()


def test_frozen_disks_are_shown_with_what_changed_until_the_connection_ends(bench: Bench) -> None:
    async def work() -> None:
        before = bench.overlay.read_at(0, SIZE)
        bench.overlay.write_at(5 * CHUNK + 100, [b"x" * CHUNK])
        bench.overlay.write_at(SIZE - 1, [b"y"])
        moment = bench.overlay.read_at(0, SIZE)
        assert moment != before
        for _ in range(2):
            async with AsyncExitStack() as connection:
                told = await bench.ask("freeze", connection)
                assert isinstance(told, dict)
                assert told["directory"].endswith("live/.frozen/one")
                bench.overlay.write_at(0, [b"z" * SIZE])
                shown = bench.shown()
                assert shown["3.raw"] == moment
                assert changed_of(shown["3.changed"]) in (
                    [(5 * CHUNK, 2 * CHUNK), (40 * CHUNK, 512)],
                    [(0, SIZE)],
                )
                moment = bench.overlay.read_at(0, SIZE)
                assert await bench.ask("frozen", connection) is None
            assert bench.shown() == {}
            with pytest.raises(SessionNotFound):
                await bench.ask("frozen", connection)

    trio.run(work)


def test_a_session_is_frozen_once_and_not_closed_but_by_force(bench: Bench) -> None:
    async def work() -> None:
        async with AsyncExitStack() as first:
            await bench.ask("freeze", first)
            async with AsyncExitStack() as second:
                with pytest.raises(SessionBusy):
                    await bench.ask("freeze", second)
            assert bench.shown()
            with pytest.raises(SessionBusy):
                await bench.freezing.let_go("one", force=False)
            await bench.freezing.let_go("one", force=True)
            assert bench.shown() == {}
            async with AsyncExitStack() as third:
                await bench.ask("freeze", third)
                await first.aclose()
                assert bench.shown()
        await bench.freezing.let_go("one", force=False)

    trio.run(work)


def test_who_asks_is_told_what_broke_the_freeze(bench: Bench) -> None:
    async def work() -> None:
        async with AsyncExitStack() as connection:
            await bench.ask("freeze", connection)
            saved = bench.overlay._state.saved
            assert saved is not None
            saved.broken_by(StorageFull("no room"))
            with pytest.raises(StorageFull, match="no room"):
                await bench.ask("frozen", connection)
            with pytest.raises(StorageError):
                bench.shown()

    trio.run(work)
