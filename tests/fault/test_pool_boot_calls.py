"""Booting on a pool, migrating and ending it, with the n-th call failing for every n: nothing is left, nothing lost.

A call fails before it took effect or after, as an error or as a connection that breaks. Whatever happened, `discard`
leaves the pool exactly as it was, and a second `migrate` ends what the first began.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import trio

from tests.support.boot_calls import CALLS_MAX, EFFECTS, Site, point_of_web
from tools.xensim.failures import Failure
from xbfs.instant.pool.notes import working_name
from xbfs.instant.pool.plan import BootWishes
from xbfs.instant.pool.record import Journal
from xbfs_engine.core.errors import SessionBusy, VmNotReady

if TYPE_CHECKING:
    from pathlib import Path

    from xbfs_engine.catalog.restore_point import RestorePoint


@pytest.fixture(scope="module")
def point(tmp_path_factory: pytest.TempPathFactory) -> RestorePoint:
    return point_of_web(tmp_path_factory.mktemp("point"))


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


def test_the_name_in_the_making_is_no_run_of_a_sweep(point: RestorePoint, tmp_path: Path) -> None:
    record = Site(point, tmp_path).plan.record
    assert record.working_name == working_name(record.sr_uuid, "web")


def test_a_start_that_was_given_up_and_goes_on_is_taken_back(point: RestorePoint, tmp_path: Path) -> None:
    """Halted while we look, running when it is deleted."""
    site = Site(point, tmp_path, BootWishes(isolated=True))
    site.boot(to_start=False)
    original, waiting = site.pool.VM_destroy, [True]

    def destroy(vm: str) -> None:
        if waiting:
            waiting.clear()
            site.pool.VM_start(vm, False, False)
            raise Failure("OTHER_OPERATION_IN_PROGRESS", "VM", vm, "start")
        original(vm)

    site.pool.VM_destroy = destroy  # type: ignore[method-assign]
    site.discard()
    site.check_clean()


def test_a_vm_that_is_busy_is_powered_off_when_it_is_not(point: RestorePoint, tmp_path: Path) -> None:
    site = Site(point, tmp_path)
    site.boot()
    site.pool.faults["VM.hard_shutdown"] = ["OTHER_OPERATION_IN_PROGRESS"]
    site.discard()
    site.check_clean()
