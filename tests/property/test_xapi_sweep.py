"""Whatever runs left and whatever else is on a pool: after a sweep exactly what is ours and dead is gone."""

from __future__ import annotations

import tempfile
from contextlib import AsyncExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.swept_pool import NODE, World
from xbfs_engine.source.xapi.markers import run_of_reason

if TYPE_CHECKING:
    from collections.abc import Awaitable

STAGES = st.sampled_from(["vm", "noted", "marked", "disk", "end"])
RUNS = st.lists(
    st.tuples(
        st.sampled_from(["dead", "live", "other node"]),
        st.lists(
            st.tuples(st.sampled_from(["snapshot", "block", "restore", "base"]), STAGES, st.booleans()), max_size=4
        ),
    ),
    max_size=4,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(RUNS, st.lists(st.sampled_from(["guest", "snapshot", "dom0", "block", "task"]), max_size=6), st.integers(0, 99))
async def test_exactly_ours_and_dead_are_gone(
    runs: list[tuple[str, list[tuple[str, str, bool]]]], foreign: list[str], seed: int
) -> None:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
        world = World(Path(directory), seed)
        vm, vdi = world.guest()
        for what in foreign:
            make_foreign(world, what)
        doomed, swept = await make_runs(world, [run for run in runs if run[0] != "live"], vm, vdi)
        async with AsyncExitStack() as stack:
            for fate, _ in runs:
                if fate == "live":
                    live = await stack.enter_async_context(world.ledgers.begin(NODE))
                    await world.snapshot(live, vm, vdi)
            before = world.xapi.everything()
            report = await world.sweep()
            after = world.xapi.everything()
            assert report.failed == ()
            assert set(before) - set(after) == doomed
            assert {ref: plain(record, set()) for ref, record in after.items()} == {
                ref: plain(record, swept) for ref, record in before.items() if ref not in doomed
            }
            assert (await world.sweep()).done == ()


LISTS = {"VBDs", "VDIs", "snapshots"}


def plain(record: dict[str, Any], swept: set[str]) -> dict[str, Any]:
    """A record as it must be after a sweep: without who points to it, and without blocks of the ``swept`` runs."""
    kept = {key: value for key, value in record.items() if key not in LISTS}
    if "blocked_operations" in kept:
        reasons = kept["blocked_operations"].items()
        kept["blocked_operations"] = {
            operation: reason for operation, reason in reasons if (run_of_reason(reason) or ("",))[0] not in swept
        }
    return kept


def make_foreign(world: World, what: str) -> None:
    vm, vdi = world.guest("foreign")
    match what:
        case "snapshot":
            snapshot = world.xapi.vm("nightly", is_a_snapshot=True, snapshot_of=vm)
            world.xapi.vbd(snapshot, world.snapshot_vdi(vdi))
            world.xapi.vdi(is_a_snapshot=True, snapshot_of=vdi, type="cbt_metadata", cbt_enabled=True)
        case "dom0":
            world.xapi.vbd(world.xapi.dom0, world.snapshot_vdi(vdi), "autodetect", currently_attached=True)
        case "block":
            world.xapi.db.set(vm, blocked_operations={"pool_migrate": "someone's", "destroy": "never"})
        case "task":
            world.xapi.db.create("task", name_label="Async.VM.start", status="pending")


async def make_runs(
    world: World, runs: list[tuple[str, list[tuple[str, str, bool]]]], vm: str, vdi: str
) -> tuple[set[str], set[str]]:
    """The objects that must go, and the ids of dead runs of this node."""
    doomed: set[str] = set()
    swept: set[str] = set()
    newest = ""
    for fate, things in runs:
        async with world.ledgers.begin(NODE if fate == "dead" else "other") as ledger:
            swept |= {ledger.run} if fate == "dead" else set()
            for kind, stage, flag in things:
                made: set[str] = set()
                if kind == "block":
                    await world.block(ledger, world.guest("blocked")[0])
                elif kind == "restore":
                    made = await added(world, world.restored(ledger, made=flag))
                elif kind == "snapshot":
                    made = await added(world, world.snapshot(ledger, vm, vdi, until=stage))
                    disk = next(ref for ref in made if world.xapi.db.cls(ref) == "VDI")
                    if flag:
                        world.copy_of(disk)
                else:
                    base = await world.base(ledger, vdi, "slot")
                    if fate == "dead":
                        doomed |= {newest} if newest else set()
                        newest = base
                doomed |= made if fate == "dead" else set()
    return doomed, swept


async def added(world: World, making: Awaitable[object]) -> set[str]:
    known = set(world.xapi.everything())
    await making
    return set(world.xapi.everything()) - known
