"""A fake pool whose n-th call fails, and a session's way onto it, away from it and out of it."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import trio
from trio.testing import MockClock

from tests.support.fake_boot_pool import FakeBootPool
from tests.support.restore_lab import RestoreLab
from tests.support.xensim import default_world, running_sim
from xbfs.instant.pool.build import build, start
from xbfs.instant.pool.migrate import Listener, Migrated, migrate
from xbfs.instant.pool.plan import BootPlan, BootWishes, plan_boot
from xbfs.instant.pool.record import SESSION_KEY, Journal
from xbfs.instant.pool.tear_down import tear_down
from xbfs_engine.core.errors import XbfsError
from xbfs_engine.core.runtime import system_runtime
from xbfs_engine.restore.vm.target import look_at
from xbfs_engine.source.xapi.vm_record import RECORD_KEY

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

    from xbfs_engine.catalog.restore_point import RestorePoint
    from xbfs_engine.source.xapi.session import Pool

PLACE = ("10.0.0.9", "/xbfs/s")
CALLS_MAX = 120
NETWORKS = ("lan", "lab")
EFFECTS = ("before", "after", "lost")


def point_of_web(directory: Path) -> RestorePoint:
    """Of a VM with two disks and a network, without the archive: that needs a host to import it."""
    with running_sim(default_world(), directory / "sim") as sim:
        found = trio.run(RestoreLab(directory).back_up, sim, "web")
    return replace(found, vm={RECORD_KEY: found.vm[RECORD_KEY]})


def run(work: Callable[[], Awaitable[Any]]) -> Any:
    return trio.run(work, clock=MockClock(autojump_threshold=0.0))


def quiet(_text: str) -> None:
    return


LISTENER = Listener(quiet, lambda number, share: None)


class Site:
    """A pool, and a session for it."""

    def __init__(
        self,
        point: RestorePoint,
        directory: Path,
        wishes: BootWishes | None = None,
        networks: tuple[str, ...] = ("lan", "lab"),
        pool: FakeBootPool | None = None,
    ) -> None:
        self.pool, self.directory = pool or FakeBootPool({}, networks), directory
        self.before = self.pool.everything()
        target = run(partial(look_at, self.pool))
        self.plan: BootPlan = plan_boot(point, target, wishes or BootWishes(), "lab", system_runtime().random)
        self.pool.files |= {self.plan.record.vdis[disk.number]: disk.disk.size_bytes for disk in self.plan.vm.disks}
        Journal.begin(directory, self.plan.record)

    @property
    def journal(self) -> Journal:
        """As the next process reads it."""
        found = Journal.of(self.directory)
        assert found is not None
        return found

    @property
    def vm(self) -> str:
        return str(self.pool.db.by_uuid("VM", self.journal.record.vm_uuid))

    def boot(self, *, to_start: bool = True) -> None:
        async def work() -> None:
            made = await build(cast("Pool", self.pool), self.journal, self.plan, "node", PLACE, quiet)
            if to_start:
                await start(self.pool, made.ref)

        run(work)

    def migrate(self) -> Migrated:
        done = run(partial(migrate, self.pool, self.journal, "ext", LISTENER))
        assert isinstance(done, Migrated)
        return done

    def discard(self, *, force: bool = True) -> None:
        run(partial(tear_down, self.pool, self.journal, quiet, force=force))

    def failing(self, nth: int, effect: str, work: Callable[[], object]) -> bool:
        """Whether a call of ``work`` failed; then the fault is over."""
        self.pool.fails_at, self.pool.effect, self.pool.struck = self.pool.calls + nth, effect, ""
        try:
            work()
        except XbfsError:
            assert self.pool.struck
        self.pool.fails_at = 0
        return bool(self.pool.struck)

    def check_clean(self, *told: object) -> None:
        assert self.pool.everything() == self.before, (self.pool.struck, *told)

    def check_moved(self, *told: object) -> None:
        """The VM has its disks on the other SR, whole and unmarked; nothing else is on the pool that was not."""
        db, vm = self.pool.db, self.vm
        disks = self.pool.disks_of(vm)
        uuids = self.plan.record.vdis
        assert {number: self.pool.content[vdi] for number, vdi in disks.items()} == {
            number: f"of {uuid}" for number, uuid in uuids.items()
        }, told
        added = self.pool.everything().keys() - self.before.keys()
        own = {vm, *disks.values(), *db.refs(vm, "VBDs"), *db.refs(vm, "VIFs")}
        assert added == own, (self.pool.struck, *told)
        assert all(db.text(vdi, "SR") == self.pool.target for vdi in disks.values())
        assert all(SESSION_KEY not in db.mapping(vdi, "other_config") for vdi in disks.values())
