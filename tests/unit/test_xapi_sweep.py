"""The sweep takes what dead runs of this node left, all of it and nothing else."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import trio

from tests.support.runtime import SeededRandom
from tests.support.swept_pool import NODE, World
from xbfs_engine.core.errors import PoolUnreachable
from xbfs_engine.core.runtime import Runtime
from xbfs_engine.source.xapi.ledger import Kind, Ledgers
from xbfs_engine.source.xapi.markers import snapshot_name
from xbfs_engine.source.xapi.sweep import Deed, SweepReport

if TYPE_CHECKING:
    from collections.abc import Iterator
    from collections.abc import Set as AbstractSet

    from trio.testing import MockClock

HOUR_S = 3600


@pytest.fixture
def memory() -> Iterator[Path]:
    """A directory where fsync costs nothing."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
        yield Path(directory)


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def deeds(report: SweepReport) -> list[str]:
    return [step.deed.name for step in report.done]


@pytest.mark.parametrize("until", ["vm", "noted", "marked", "disk", "end"])
async def test_snapshots_go_wherever_the_run_died(world: World, until: str) -> None:
    vm, vdi = world.guest()
    async with world.ledgers.begin(NODE) as ledger:
        snapshot, disk = await world.snapshot(ledger, vm, vdi, until=until)
        await world.block(ledger, vm)
    report = await world.sweep()
    assert deeds(report) == ["DESTROY_VM", "DESTROY_VDI", "UNBLOCK"]
    assert world.exists(snapshot, disk, vm, vdi) == [False, False, True, True]
    assert world.xapi.db.mapping(vm, "blocked_operations") == {}
    assert await world.ledgers.runs() == []
    assert (await world.sweep()).done == ()


async def test_dry_run_tells_the_same_and_does_nothing(world: World) -> None:
    vm, vdi = world.guest()
    async with world.ledgers.begin(NODE) as ledger:
        await world.snapshot(ledger, vm, vdi)
        await world.block(ledger, vm)
    before, items = world.xapi.everything(), await world.open_items()
    told = await world.sweep(dry_run=True)
    assert world.xapi.everything() == before
    assert await world.open_items() == items
    assert world.xapi.diary == []
    assert (await world.sweep()).done == told.done


async def test_live_runs_and_other_nodes_are_left_alone_and_told(world: World) -> None:
    vm, vdi = world.guest()
    async with world.ledgers.begin(NODE) as live:
        await world.snapshot(live, vm, vdi)
        await world.block(live, vm)
        task = world.xapi.db.create("task", name_label="xbfs/node: export", status="pending")
        async with world.ledgers.begin("other") as other:
            await world.snapshot(other, vm, vdi)
        before = world.xapi.everything()
        report = await world.sweep()
        assert world.xapi.everything() == before
        assert report.done == ()
        reasons = {note.reason for note in report.notes}
        assert reasons == {
            f"made by run {live.run}, which is at work",
            f"pool_migrate is blocked by run {live.run}, which is at work",
            f"made by run {other.run} of node other",
        }
    assert [step.ref for step in (await world.sweep()).done if step.deed is Deed.END_TASK] == [task]


async def test_tasks_of_ours_end_and_others_stay(world: World) -> None:
    create = world.xapi.db.create
    ours = [create("task", name_label="xbfs/node: x", status=status) for status in ("pending", "success")]
    others = [create("task", name_label=name, status="pending") for name in ("xbfs/node2: x", "Async.VM.start")]
    report = await world.sweep()
    assert deeds(report) == ["END_TASK", "END_TASK"]
    assert world.xapi.diary == ["task.cancel", "task.destroy", "task.destroy"]
    assert world.exists(*ours, *others) == [False, False, True, True]


async def test_tasks_stay_while_a_run_of_another_state_directory_may_be_at_work(world: World, tmp_path: Path) -> None:
    vm, _ = world.guest()
    elsewhere = Ledgers(tmp_path / "elsewhere", Runtime(world.clock, SeededRandom(2)))
    task = world.xapi.db.create("task", name_label="xbfs/node: x", status="pending")
    async with elsewhere.begin(NODE) as ledger:
        await world.block(ledger, vm)
        report = await world.sweep()
    assert report.done == ()
    assert "no open note" in report.notes[0].reason
    assert world.exists(task) == [True]


async def test_copies_that_somebody_made_stay(world: World) -> None:
    vm, vdi = world.guest()
    async with world.ledgers.begin(NODE) as ledger:
        snapshot, disk = await world.snapshot(ledger, vm, vdi)
    copies = [world.copy_of(snapshot), world.copy_of(disk)]
    await world.sweep()
    assert world.exists(snapshot, disk, *copies) == [False, False, True, True]


async def test_two_objects_with_one_marker_are_doubtful(world: World) -> None:
    async with world.ledgers.begin(NODE) as ledger:
        item = await ledger.intend(Kind.VDI)
        disk = world.xapi.vdi()
        world.mark(disk, ledger, item, own=False)
        copy = world.copy_of(disk)
    report = await world.sweep()
    assert world.exists(disk, copy) == [True, True]
    assert len(report.notes) == 2
    world.xapi.db.destroy(copy)
    await world.sweep()
    assert world.exists(disk) == [False]


async def test_marked_objects_without_a_note_are_told_and_stay(world: World) -> None:
    disk = world.xapi.vdi()
    async with world.ledgers.begin(NODE) as ledger:
        item = await ledger.intend(Kind.VDI, uuid=world.xapi.uuid(disk))
        world.mark(disk, ledger, item)
        await ledger.gone(item)
    (note,) = (await world.sweep()).notes
    assert note.reason == f"made by run {ledger.run}, of which this node has no open note"
    assert world.exists(disk) == [True]


async def test_current_bases_stay_and_earlier_ones_go(world: World) -> None:
    _, vdi = world.guest()
    bases = []
    for _ in range(3):
        async with world.ledgers.begin(NODE) as ledger:
            bases.append(await world.base(ledger, vdi, "repo/vm/0"))
    async with world.ledgers.begin(NODE) as ledger:
        other = await world.base(ledger, vdi, "other repo/vm/0")
    report = await world.sweep()
    assert world.exists(*bases, other) == [False, False, True, True]
    assert {kept.slot for kept in report.kept} == {"repo/vm/0", "other repo/vm/0"}
    assert len(await world.open_items()) == 2
    assert report.notes == ()


@pytest.mark.parametrize("named", [None, "old", "new", "neither"])
async def test_run_that_died_around_its_commit(world: World, named: str | None) -> None:
    """Without the repository both candidates stay; with it the one that the newest point names."""
    _, vdi = world.guest()
    async with world.ledgers.begin(NODE) as ledger:
        old = await world.base(ledger, vdi, "slot")
    async with world.ledgers.begin(NODE) as ledger:
        new = await world.base(ledger, vdi, "slot", confirmed=False, type="user")
    uuids = {"old": world.xapi.uuid(old), "new": world.xapi.uuid(new), "neither": ""}

    async def known(_: str, slots: AbstractSet[str]) -> dict[str, str]:
        assert slots == {"slot"}
        return {} if named is None else {"slot": uuids[named]}

    await world.sweep(bases=known)
    assert world.exists(old, new) == [named in {None, "old"}, named in {None, "new"}]
    if named in {None, "new"}:
        assert world.xapi.db.text(new, "type") == "cbt_metadata"
    if named == "new":
        (item,) = await world.open_items()
        assert item.keep is not None
        assert item.keep.confirmed


async def test_bases_that_were_to_keep_their_data_or_have_no_log(world: World) -> None:
    _, vdi = world.guest()
    async with world.ledgers.begin(NODE) as ledger:
        whole = world.snapshot_vdi(vdi)
        item = await ledger.intend(Kind.VDI, uuid=world.xapi.uuid(whole))
        await ledger.confirm(await ledger.keep(item, "a", with_data=True))
        useless = await world.base(ledger, vdi, "b", type="user", cbt_enabled=False)
    await world.sweep()
    assert world.xapi.db.text(whole, "type") == "user"
    assert world.exists(useless) == [False]


async def test_dom0_lets_go_of_disks_first(world: World) -> None:
    vm, vdi = world.guest()
    async with world.ledgers.begin(NODE) as ledger:
        _, disk = await world.snapshot(ledger, vm, vdi)
        base = await world.base(ledger, vdi, "slot", type="user")
    for ref in (disk, base):
        world.xapi.vbd(world.xapi.dom0, ref, "autodetect", currently_attached=True)
    foreign = world.xapi.vbd(world.xapi.dom0, vdi, 9, currently_attached=True)
    report = await world.sweep()
    assert report.failed == ()
    assert world.exists(disk, base, foreign) == [False, True, True]
    assert world.xapi.db.refs(world.xapi.dom0, "VBDs") == [foreign]
    assert world.xapi.db.text(base, "type") == "cbt_metadata"


async def test_disks_that_hosts_hold_are_waited_for(world: World, autojump_clock: object) -> None:
    vm, vdi = world.guest()
    async with world.ledgers.begin(NODE) as ledger:
        _, disk = await world.snapshot(ledger, vm, vdi)
    world.xapi.faults["VDI.destroy"] = ["VDI_IN_USE"] * 9
    assert (await world.sweep()).failed == ()
    assert world.exists(disk) == [False]


async def test_failures_are_told_and_do_not_stop_the_rest(world: World, autojump_clock: object) -> None:
    vm, vdi = world.guest()
    async with world.ledgers.begin(NODE) as ledger:
        first, first_disk = await world.snapshot(ledger, vm, vdi)
        second, second_disk = await world.snapshot(ledger, vm, vdi, until="noted")
        await world.block(ledger, vm)
    world.xapi.refused["VM.destroy", first] = "OPERATION_NOT_ALLOWED"
    world.xapi.refused["VDI.destroy", second_disk] = "VDI_IN_USE"
    report = await world.sweep()
    assert {failure.step.ref for failure in report.failed} == {first, second_disk}
    assert world.exists(first, first_disk, second, second_disk) == [True, False, False, True]
    assert world.xapi.db.mapping(vm, "blocked_operations") == {}
    world.xapi.refused.clear()
    assert (await world.sweep()).failed == ()
    assert world.exists(first, second_disk) == [False, False]
    assert await world.ledgers.runs() == []


async def full_house(world: World) -> set[str]:
    """Leftovers of every kind; returns the objects that must go."""
    vm, vdi = world.guest()
    before = set(world.xapi.everything())
    async with world.ledgers.begin(NODE) as ledger:
        for until in ("vm", "noted", "disk", "end"):
            _, disk = await world.snapshot(ledger, vm, vdi, until=until)
        await world.block(ledger, vm)
        await world.restored(ledger, made=True)
        temporary = world.xapi.add_sr("nfs")
        await ledger.intend(Kind.SR, uuid=world.xapi.uuid(temporary))
        await world.base(ledger, vdi, "slot")
    world.xapi.vbd(world.xapi.dom0, disk, "autodetect", currently_attached=True)
    world.xapi.db.create("task", name_label="xbfs/node: x", status="pending")
    doomed = set(world.xapi.everything()) - before
    async with world.ledgers.begin(NODE) as ledger:
        newer = await world.base(ledger, vdi, "slot", type="user")
    world.xapi.vbd(world.xapi.dom0, newer, "autodetect", currently_attached=True)
    return doomed | set(world.xapi.db.refs(newer, "VBDs"))


@pytest.mark.parametrize("way", ["broken connection", "cancelled"])
async def test_a_sweep_that_ends_anywhere_is_finished_by_the_next(
    memory: Path, way: str, autojump_clock: MockClock
) -> None:
    number = 0
    while True:
        number += 1
        world = World(memory / str(number))
        doomed = await full_house(world)
        stays = set(world.xapi.everything()) - doomed
        world.xapi.dies_at = number
        if way == "cancelled":
            world.xapi.on_death = trio.CancelScope()
            with world.xapi.on_death:
                await world.sweep()
            ended = world.xapi.on_death.cancelled_caught
        else:
            try:
                await world.sweep()
                ended = False
            except PoolUnreachable:
                ended = True
        world.xapi.dies_at = 0
        assert stays <= set(world.xapi.everything())
        world.clock.advance(HOUR_S + 1)
        report = await world.sweep()
        assert report.failed == ()
        assert set(world.xapi.everything()) == stays
        (state,) = await world.ledgers.runs()
        assert [item.keep is not None for item in state.record.items.values()] == [True]
        if not ended:
            break
    assert number > 40


async def test_objects_that_vanish_under_the_sweep_are_fine(world: World) -> None:
    vm, vdi = world.guest()
    async with world.ledgers.begin(NODE) as ledger:
        await world.snapshot(ledger, vm, vdi)
    world.xapi.faults["VM.destroy"] = ["HANDLE_INVALID"]
    world.xapi.faults["VDI.get_VBDs"] = ["HANDLE_INVALID"]
    assert (await world.sweep()).failed == ()


async def test_disks_that_a_user_attached_stay(world: World) -> None:
    vm, vdi = world.guest()
    async with world.ledgers.begin(NODE) as ledger:
        snapshot, disk = await world.snapshot(ledger, vm, vdi)
    world.xapi.vbd(world.guest("rescue")[0], disk, 1)
    world.xapi.vbd(snapshot, vdi, 1)
    report = await world.sweep()
    assert world.exists(disk, vdi) == [True, True]
    assert [note.reason for note in report.notes] == [f"of dead run {ledger.run}, but VM rescue uses it"]


@pytest.mark.parametrize("made", [False, True])
async def test_half_imported_vms_go_with_their_disks(world: World, made: bool) -> None:
    async with world.ledgers.begin(NODE) as ledger:
        vm, disk = await world.restored(ledger, made=made)
    await world.sweep()
    assert world.exists(vm, disk) == [False, False]


async def test_restored_vms_that_are_complete_or_run_stay(world: World) -> None:
    async with world.ledgers.begin(NODE) as ledger:
        done, done_disk = await world.restored(ledger, made=True)
        world.xapi.db.set(done, name_label="web")
        runs, runs_disk = await world.restored(ledger, made=True, power_state="Running")
    report = await world.sweep()
    assert world.exists(done, done_disk, runs, runs_disk) == [True] * 4
    assert [note.cls for note in report.notes if "power state" in note.reason] == ["VM"]


async def test_switches_and_srs(world: World) -> None:
    db, uuid = world.xapi.db, world.xapi.uuid
    async with world.ledgers.begin(NODE) as ledger:
        for before in ("", "true"):
            sr = world.xapi.add_sr("nfs", other_config={"gc": "false", "x": before})
            await ledger.intend(Kind.SWITCH, sr=uuid(sr), key="gc", value="false", before=before)
        temporary = world.xapi.add_sr("nfs")
        await ledger.intend(Kind.SR, uuid=uuid(temporary))
        world.xapi.vdi(SR=temporary)
        marked = world.xapi.add_sr("nfs")
        world.mark(marked, ledger, await ledger.intend(Kind.SR), own=False)
    await world.sweep()
    assert world.exists(temporary, marked) == [False, False]
    assert {c["x"]: c.get("gc") for sr in db.all("SR") if (c := db.mapping(sr, "other_config"))} == {
        "": None,
        "true": "true",
    }


async def test_what_a_host_may_still_make_is_waited_for(world: World) -> None:
    vm, vdi = world.guest()
    async with world.ledgers.begin(NODE) as ledger:
        item = await ledger.intend(Kind.SNAPSHOT, vm_uuid=world.xapi.uuid(vm), name="web")
        await ledger.intend(Kind.VDI, uuid="never there")
    await world.sweep()
    assert await world.open_items() == [item]
    late = world.xapi.vm(snapshot_name(ledger.run, 1, "web"), is_a_snapshot=True, snapshot_of=vm)
    world.xapi.vbd(late, world.snapshot_vdi(vdi))
    await world.sweep()
    assert world.exists(late) == [False]


async def test_what_never_came_is_forgotten(world: World) -> None:
    async with world.ledgers.begin(NODE) as ledger:
        await ledger.intend(Kind.SNAPSHOT, vm_uuid="vm", name="web")
    world.clock.advance(HOUR_S + 1)
    await world.sweep()
    assert await world.ledgers.runs() == []


async def test_names_alone_are_not_enough(world: World) -> None:
    vm, vdi = world.guest()
    other, _ = world.guest("other")
    async with world.ledgers.begin(NODE) as ledger:
        item = await ledger.intend(Kind.SNAPSHOT, vm_uuid=world.xapi.uuid(vm), name="web")
        name = snapshot_name(ledger.run, item.number, "web")
        same = [
            world.xapi.vm(name),
            world.xapi.vm(name, is_a_template=True),
            world.xapi.vm(name, is_a_snapshot=True, snapshot_of=other),
        ]
    await world.sweep()
    assert world.exists(*same, vdi) == [True] * 4
