"""Booting on a pool, migrating and ending it, with the n-th call failing for every n: nothing is left, nothing lost.

A call fails before it took effect or after, as an error or as a connection that breaks. Whatever happened, `discard`
leaves the pool exactly as it was, and a second `migrate` ends what the first began.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import pytest
import trio
from trio.testing import MockClock

from tests.support.fake_boot_pool import FakeBootPool
from tests.support.restore_lab import RestoreLab
from tests.support.xensim import default_world, running_sim
from xbfs.instant.pool.build import build, start
from xbfs.instant.pool.migrate import Listener, Migrated, migrate
from xbfs.instant.pool.notes import working_name
from xbfs.instant.pool.plan import BootPlan, BootWishes, plan_boot
from xbfs.instant.pool.record import SESSION_KEY, Journal
from xbfs.instant.pool.tear_down import tear_down
from xbfs_engine.core.errors import ObjectNotFound, SessionBusy, UsageError, VmNotReady, XbfsError
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


@pytest.fixture(scope="module")
def point(tmp_path_factory: pytest.TempPathFactory) -> RestorePoint:
    """Of a VM with two disks and a network, without the archive: that needs a host to import it."""
    directory = tmp_path_factory.mktemp("point")
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


@pytest.mark.parametrize("effect", EFFECTS)
@pytest.mark.parametrize("isolated", [False, True])
def test_any_call_of_a_boot_fails(point: RestorePoint, tmp_path: Path, effect: str, isolated: bool) -> None:
    for nth in range(1, CALLS_MAX):
        site = Site(point, tmp_path, BootWishes(isolated=isolated))
        struck = site.failing(nth, effect, site.boot)
        site.discard()
        site.check_clean(nth)
        site.discard()
        site.check_clean(nth)
        if not struck:
            return
    pytest.fail("there is no end of calls")


@pytest.mark.parametrize("effect", EFFECTS)
def test_any_call_of_a_discard_fails(point: RestorePoint, tmp_path: Path, effect: str) -> None:
    for nth in range(1, CALLS_MAX):
        site = Site(point, tmp_path)
        site.boot()
        struck = site.failing(nth, effect, site.discard)
        site.discard()
        site.check_clean(nth)
        if not struck:
            return
    pytest.fail("there is no end of calls")


@pytest.mark.parametrize("effect", EFFECTS)
@pytest.mark.parametrize("running", [True, False])
def test_any_call_of_a_migration_fails(point: RestorePoint, tmp_path: Path, effect: str, running: bool) -> None:
    for nth in range(1, CALLS_MAX):
        site = Site(point, tmp_path)
        site.boot(to_start=running)
        struck = site.failing(nth, effect, site.migrate)
        site.migrate()
        site.check_moved(nth)
        site.discard()  # as after a crash before the session was thrown away: the VM is its user's
        site.check_moved(nth)
        if not struck:
            return
    pytest.fail("there is no end of calls")


@pytest.mark.parametrize("effect", EFFECTS)
@pytest.mark.parametrize("running", [True, False])
def test_a_migration_that_failed_is_given_up(point: RestorePoint, tmp_path: Path, effect: str, running: bool) -> None:
    for nth in range(1, CALLS_MAX):
        site = Site(point, tmp_path)
        site.boot(to_start=running)
        struck = site.failing(nth, effect, site.migrate)
        moved = {ref for ref in site.pool.db.all("VDI") if site.pool.db.text(ref, "SR") == site.pool.target}
        site.discard()
        left = site.pool.everything().keys() - site.before.keys()
        # All of it was moved and the VM stays, or the VM is gone, and of disks only those that had been moved remain.
        if any(ref in left for ref in site.pool.db.all("VM")):
            site.check_moved(nth)
        else:
            assert left <= moved, (nth, site.pool.struck)
            assert all(site.pool.content[vdi].startswith("of ") for vdi in left)
        if not struck:
            return
    pytest.fail("there is no end of calls")


def test_a_copy_of_a_halted_vm_that_ran_since_is_not_taken_for_it(point: RestorePoint, tmp_path: Path) -> None:
    site = Site(point, tmp_path)
    site.boot(to_start=False)
    assert site.failing(1 + _calls_until(site, "VBD.destroy"), "before", site.migrate)
    disk = site.pool.disks_of(site.vm)[0]
    site.pool.content[disk] += ", written since"
    site.migrate()
    assert site.pool.content[site.pool.disks_of(site.vm)[0]].endswith("written since")


def _calls_until(site: Site, method: str) -> int:
    """How many calls a migration makes before its first one of ``method``; told by one of a twin."""
    twin = Site(site.plan.vm.point, site.directory)
    twin.boot(to_start=False)
    made: list[str] = []
    original = twin.pool.call

    async def call(name: str, *arguments: Any, timeout_s: float = 60.0) -> Any:
        made.append(name)
        return await original(name, *arguments, timeout_s=timeout_s)

    twin.pool.call = call  # type: ignore[method-assign]
    twin.migrate()
    Journal.begin(site.directory, replace(site.plan.record, vm_uuid=site.pool.uuid(_own_vm(site))))
    return made.index(method)


def _own_vm(site: Site) -> str:
    (vm,) = (vm for vm in site.pool.db.all("VM") if vm not in site.before)
    return vm


def test_what_others_keep_on_the_sr_is_not_lost_by_a_migration(point: RestorePoint, tmp_path: Path) -> None:
    site = Site(point, tmp_path)
    site.boot()
    sr = site.pool.db.by_uuid("SR", site.plan.record.sr_uuid)
    site.pool.vdi(SR=sr, name_label="somebody's", is_a_snapshot=True)
    with pytest.raises(VmNotReady, match="somebody's"):
        site.migrate()
    assert "VDI.pool_migrate" not in site.pool.diary


def test_a_vm_that_runs_is_not_thrown_away_unasked(point: RestorePoint, tmp_path: Path) -> None:
    site = Site(point, tmp_path)
    site.boot()
    before = site.pool.everything()
    with pytest.raises(SessionBusy):
        site.discard(force=False)
    assert site.pool.everything() == before


def test_migrations_of_others_are_waited_for(point: RestorePoint, tmp_path: Path) -> None:
    site = Site(point, tmp_path)
    site.boot()
    for vdi in site.pool.disks_of(site.vm).values():
        site.pool.db.set(vdi, cbt_enabled=True)
    site.pool.faults["VDI.pool_migrate"] = ["TOO_MANY_STORAGE_MIGRATES"] * 30
    site.migrate()
    site.check_moved()


def test_no_more_than_three_disks_move_at_once(
    point: RestorePoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = Site(point, tmp_path)
    site.boot()
    some = next(iter(site.pool.disks_of(site.vm).values()))
    for number in range(5):  # as if the point had so many
        vdi = site.pool.vdi(SR=site.pool.db.text(some, "SR"), virtual_size=1 << 20)
        site.pool.content[vdi] = f"more {number}"
        site.pool.vbd(site.vm, vdi, 10 + number, currently_attached=True)
    moving = most = 0
    migrates = site.pool.run_task

    async def counted(method: str, *arguments: Any, **options: Any) -> Any:
        nonlocal moving, most
        moving += method == "VDI.pool_migrate"
        most = max(most, moving)
        try:
            await trio.sleep(0.01)
            return await migrates(method, *arguments, **options)
        finally:
            moving -= method == "VDI.pool_migrate"

    monkeypatch.setattr(site.pool, "run_task", counted)
    site.migrate()
    assert most == 3
    assert {site.pool.db.text(vdi, "SR") for vdi in site.pool.disks_of(site.vm).values()} == {site.pool.target}


def test_without_a_network_of_the_pool_the_vm_can_be_isolated(point: RestorePoint, tmp_path: Path) -> None:
    with pytest.raises(ObjectNotFound):
        Site(point, tmp_path, networks=())
    site = Site(point, tmp_path, BootWishes(isolated=True), networks=())
    site.boot()
    db = site.pool.db
    (network,) = networks_of(site)
    assert db.refs(network, "PIFs") == []
    assert network not in site.before
    assert db.mapping(site.vm, "blocked_operations") == {}
    with pytest.raises(UsageError):
        Site(point, tmp_path, BootWishes(disks=frozenset({7})))


def networks_of(site: Site) -> set[str]:
    return {site.pool.db.text(vif, "network") for vif in site.pool.db.refs(site.vm, "VIFs")}


def test_two_isolated_vms_do_not_see_each_other(point: RestorePoint, tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("1", "2")]
    for path in paths:
        path.mkdir()
    first = Site(point, paths[0], BootWishes(isolated=True))
    first.boot()
    first.pool.files.clear()  # they are on its SR now
    other = Site(point, paths[1], BootWishes(isolated=True), pool=first.pool)
    other.boot()
    assert not networks_of(first) & networks_of(other)
    other.discard()
    other.check_clean()


@pytest.mark.parametrize("effect", EFFECTS)
def test_an_isolated_vm_keeps_its_network_where_it_goes(point: RestorePoint, tmp_path: Path, effect: str) -> None:
    for nth in range(1, CALLS_MAX):
        site = Site(point, tmp_path, BootWishes(isolated=True))
        site.boot()
        struck = site.failing(nth, effect, site.migrate)
        site.migrate()
        site.discard()
        (network,) = networks_of(site)
        assert network not in site.before, (nth, site.pool.struck)
        assert SESSION_KEY not in site.pool.db.mapping(network, "other_config")
        if not struck:
            return
    pytest.fail("there is no end of calls")


def test_the_name_in_the_making_is_no_run_of_a_sweep(point: RestorePoint, tmp_path: Path) -> None:
    record = Site(point, tmp_path).plan.record
    assert record.working_name == working_name(record.sr_uuid, "web")
