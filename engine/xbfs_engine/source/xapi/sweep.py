"""The sweep: takes away what dead runs of this node left on a pool, and nothing else.

The plan is ``sweep_plan``'s; here it is carried out and noted in the ledgers. Every step may fail without keeping the
others from being done; what failed stays in its ledger, so the next sweep tries it again, and a sweep that is killed
is a sweep not done. Two sweeps at once share the dead runs between them (``Ledgers.claim``).
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol

from xbfs_engine.core.errors import CertificateRejected, PoolError, PoolUnreachable, XapiFailure
from xbfs_engine.core.log import Logger
from xbfs_engine.source.xapi.failures import Handling, handling_of
from xbfs_engine.source.xapi.inventory import take_inventory
from xbfs_engine.source.xapi.ledger import Kind
from xbfs_engine.source.xapi.patience import Patience
from xbfs_engine.source.xapi.removal import destroy_data, destroy_vdi, destroy_vm, gone_is_fine
from xbfs_engine.source.xapi.sweep_plan import Deed, Kept, Note, Plan, Step, make_plan

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
    from collections.abc import Set as AbstractSet

    from xbfs_engine.source.xapi.inventory import Inventory
    from xbfs_engine.source.xapi.ledger import Ledgers, RunLedger
    from xbfs_engine.source.xapi.session import Xapi
    from xbfs_engine.source.xapi.values import Ref

__all__ = ["Deed", "Failed", "Kept", "KnownBases", "Note", "Step", "SweepReport", "sweep"]

BUSY_S: Final = 50.0
"""How long a sweep waits for one busy object: there will be another sweep."""

_log = Logger("xapi.sweep")


class KnownBases(Protocol):
    """Knows which bases of deltas the restore points of a repository need."""

    async def __call__(self, pool_uuid: str, slots: AbstractSet[str]) -> Mapping[str, str]:
        """By slot (``markers.slot_of``), the uuid of the VDI on this pool that the newest restore point names as the
        base of the next one, or "" if it names none. At least those of ``slots`` that are of the repository; slots of
        others are missing. Raises StorageError.
        """
        ...


class Failed(NamedTuple):
    """A step that could not be done; it is tried again by the next sweep."""

    step: Step
    reason: str
    hint: str


@dataclass(frozen=True, slots=True)
class SweepReport:
    """What a sweep did, or would do: ``done``. ``notes``: things of XBFS that were left alone, and why."""

    dry_run: bool
    done: tuple[Step, ...]
    failed: tuple[Failed, ...]
    kept: tuple[Kept, ...]
    notes: tuple[Note, ...]


async def sweep(
    xapi: Xapi,
    ledgers: Ledgers,
    *,
    node: str,
    dry_run: bool,
    bases: KnownBases | None = None,
    inventory: Inventory | None = None,
) -> SweepReport:
    """Remove the leftovers of dead runs of ``node``; with ``dry_run`` only say what they are.

    ``bases``: asked when the dead runs are known, for a run may have committed its point at the last moment. Without
    it both the newest base whose point is known to be durable and all newer ones stay.
    ``inventory``: for a dry run, where one was just taken.
    Raises PoolUnreachable, CertificateRejected, StorageError; what the pool refuses is in the report.
    """
    assert dry_run or inventory is None
    async with ledgers.claim(node) as dead:
        # After the claim: what a run that died before has made is in this picture.
        inventory = inventory or await take_inventory(xapi)
        tasks = await xapi.records("task")
        # After the tasks: whoever made one of them and is at work is seen to be live.
        live = frozenset(state.record.run for state in await ledgers.runs() if state.live) - dead.keys()
        slots = {item.keep.slot for ledger in dead.values() for item in ledger.items if item.keep is not None}
        plan = make_plan(
            inventory,
            dead={run: ledger.items for run, ledger in dead.items()},
            live=live,
            node=node,
            now_ns=ledgers.now_ns(),
            bases=await bases(inventory.pool_uuid, slots) if bases is not None else {},
        )
        # Tasks do not tell their run, so they are waste only when none can be at work.
        steps = [*([] if live or plan.strangers else _tasks(xapi, tasks)), *plan.steps]
        failed: list[Failed] = []
        if not dry_run:
            await _adopt(plan, dead)
            failed = await _carry_out(xapi, Patience(ledgers.random, limit_s=BUSY_S), steps)
            await _note(plan, dead, failed)
    done = tuple(step for step in steps if all(step is not failure.step for failure in failed))
    return SweepReport(dry_run, done, tuple(failed), tuple(plan.kept), tuple(plan.notes))


def _tasks(xapi: Xapi, records: Mapping[Ref, Mapping[str, object]]) -> list[Step]:
    """Tasks that carry our name (``tasks.own_task``)."""
    prefix = f"{xapi.originator}: "
    return [
        Step(Deed.END_TASK, ref, str(record.get("uuid", "")), name)
        for ref, record in records.items()
        if (name := str(record.get("name_label", ""))).startswith(prefix)
    ]


async def _adopt(plan: Plan, dead: Mapping[str, RunLedger]) -> None:
    """Note the disks of snapshot VMs by themselves: once their VM is gone nothing else tells of them."""
    for owner, vdi in plan.adopted:
        ledger = dead[owner.run]
        if all(item.uuid != vdi.uuid for item in ledger.items):
            await ledger.intend(Kind.VDI, vm_uuid=owner.item.vm_uuid, uuid=vdi.uuid)


async def _note(plan: Plan, dead: Mapping[str, RunLedger], failed: Sequence[Failed]) -> None:
    """Close the items of which nothing is left."""
    for owner in plan.confirmed:
        await dead[owner.run].confirm(owner.item)
    unfinished = {failure.step.uuid for failure in failed}
    closed = [(owner.run, owner.item.number) for owner in plan.released]
    closed += [
        (step.owner.run, item.number)
        for step in plan.steps
        if step.owner is not None and step.uuid not in unfinished
        for item in dead[step.owner.run].items
        if item.uuid == step.uuid or (item.number == step.owner.item.number and not step.is_adopted)
    ]
    for run, number in dict.fromkeys(closed):
        await dead[run].gone(dead[run].item(number))


async def _carry_out(xapi: Xapi, patience: Patience, steps: Sequence[Step]) -> list[Failed]:
    failed = []
    for step in steps:
        try:
            await _DEEDS[step.deed](xapi, patience, step)
        except (PoolUnreachable, CertificateRejected):
            raise
        except PoolError as exc:
            _log.warning("leftover_stays", deed=step.deed.value, uuid=step.uuid, reason=exc.message)
            failed.append(Failed(step, exc.message, exc.hint))
        else:
            _log.info("leftover_removed", deed=step.deed.value, uuid=step.uuid)
    return failed


async def _end_task(xapi: Xapi, patience: Patience, step: Step) -> None:
    with _gone_is_fine():
        if await xapi.call("task.get_status", step.ref) == "pending":
            await gone_is_fine(xapi, patience, "task.cancel", step.ref)
        await gone_is_fine(xapi, patience, "task.destroy", step.ref)


async def _destroy_vm(xapi: Xapi, patience: Patience, step: Step) -> None:
    await destroy_vm(xapi, patience, step.ref)


async def _destroy_data(xapi: Xapi, patience: Patience, step: Step) -> None:
    await destroy_data(xapi, patience, step.ref, abandoned=True)


async def _destroy_vdi(xapi: Xapi, patience: Patience, step: Step) -> None:
    await destroy_vdi(xapi, patience, step.ref, abandoned=True)


async def _reset(xapi: Xapi, _: Patience, step: Step) -> None:
    assert step.owner is not None
    before = step.owner.item.about.get("before", "")
    with _gone_is_fine():
        await xapi.call("SR.remove_from_other_config", step.ref, step.detail)
        if before:
            await xapi.call("SR.add_to_other_config", step.ref, step.detail, before)


async def _forget_sr(xapi: Xapi, patience: Patience, step: Step) -> None:
    """Never SR.destroy: that would take the data."""
    with _gone_is_fine():
        pbds = await xapi.call("SR.get_PBDs", step.ref)
        for pbd in pbds if isinstance(pbds, list) else []:
            await gone_is_fine(xapi, patience, "PBD.unplug", str(pbd))
            await gone_is_fine(xapi, patience, "PBD.destroy", str(pbd))
        await gone_is_fine(xapi, patience, "SR.forget", step.ref)


async def _unblock(xapi: Xapi, _: Patience, step: Step) -> None:
    with _gone_is_fine():
        await xapi.call("VM.remove_from_blocked_operations", step.ref, step.detail)


_DEEDS: Final[Mapping[Deed, Callable[[Xapi, Patience, Step], Awaitable[None]]]] = {
    Deed.END_TASK: _end_task,
    Deed.DESTROY_VM: _destroy_vm,
    Deed.DESTROY_DATA: _destroy_data,
    Deed.DESTROY_VDI: _destroy_vdi,
    Deed.RESET: _reset,
    Deed.FORGET_SR: _forget_sr,
    Deed.UNBLOCK: _unblock,
}


@contextmanager
def _gone_is_fine() -> Iterator[None]:
    try:
        yield
    except XapiFailure as exc:
        if handling_of(exc) is not Handling.GONE:
            raise
