"""The sweep: takes away what dead runs of this node left on a pool, and nothing else.

The plan is ``sweep_plan``'s; here it is carried out and noted in the ledgers. Every step may fail without keeping the
others from being done; what failed stays in its ledger, so the next sweep tries it again, and a sweep that is killed
is a sweep not done. Two sweeps at once share the dead runs between them (``Ledgers.claim``).
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NamedTuple

import trio

from xbfs_engine.core.errors import CertificateRejected, PoolError, PoolUnreachable, XapiFailure
from xbfs_engine.core.log import Logger
from xbfs_engine.source.xapi.failures import Handling, handling_of
from xbfs_engine.source.xapi.inventory import take_inventory
from xbfs_engine.source.xapi.ledger import Kind
from xbfs_engine.source.xapi.sweep_plan import Deed, Kept, Note, Plan, Step, make_plan

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence

    from xbfs_engine.source.xapi.inventory import Inventory
    from xbfs_engine.source.xapi.ledger import Ledgers, RunLedger
    from xbfs_engine.source.xapi.session import Ref, Xapi

__all__ = ["Deed", "Failed", "Kept", "Note", "Step", "SweepReport", "sweep"]

BUSY_TRIES: Final = 10
BUSY_PAUSE_S: Final = 5.0
"""Hosts let go of disks seconds after their readers left; as long as other clients needed (Xen Orchestra, 7826)."""

_DESTROY_S: Final = 600.0

_log = Logger("xapi.sweep")


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
    bases: Mapping[str, str] | None = None,
    inventory: Inventory | None = None,
) -> SweepReport:
    """Remove the leftovers of dead runs of ``node``; with ``dry_run`` only say what they are.

    ``bases``: by slot (``markers.slot_of``), the uuid of the VDI that the newest restore point names as the base of
    the next one, or "": with it a base whose run died between commit and note is known for good or for waste.
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
        plan = make_plan(
            inventory,
            dead={run: ledger.items for run, ledger in dead.items()},
            live=live,
            node=node,
            now_ns=ledgers.now_ns(),
            bases=bases or {},
        )
        # Tasks do not tell their run, so they are waste only when none can be at work.
        steps = [*([] if live or plan.strangers else _tasks(xapi, tasks)), *plan.steps]
        failed: list[Failed] = []
        if not dry_run:
            await _adopt(plan, dead)
            failed = await _carry_out(xapi, steps)
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


async def _carry_out(xapi: Xapi, steps: Sequence[Step]) -> list[Failed]:
    failed = []
    for step in steps:
        try:
            await _DEEDS[step.deed](xapi, step)
        except (PoolUnreachable, CertificateRejected):
            raise
        except PoolError as exc:
            _log.warning("leftover_stays", deed=step.deed.value, uuid=step.uuid, reason=exc.message)
            failed.append(Failed(step, exc.message, exc.hint))
        else:
            _log.info("leftover_removed", deed=step.deed.value, uuid=step.uuid)
    return failed


async def _end_task(xapi: Xapi, step: Step) -> None:
    with _gone_is_fine():
        if await xapi.call("task.get_status", step.ref) == "pending":
            await _insist(xapi, "task.cancel", step.ref)
        await _insist(xapi, "task.destroy", step.ref)


async def _destroy_vm(xapi: Xapi, step: Step) -> None:
    await _insist(xapi, "VM.destroy", step.ref)


async def _destroy_data(xapi: Xapi, step: Step) -> None:
    await _insist(xapi, "VDI.data_destroy", step.ref, first=_detach)


async def _destroy_vdi(xapi: Xapi, step: Step) -> None:
    await _insist(xapi, "VDI.destroy", step.ref, first=_detach)


async def _detach(xapi: Xapi, vdi: Ref) -> None:
    """Take a disk from the control domains that hold it for NBD clients (xen-api, xapi-nbd)."""
    vbds = await xapi.call("VDI.get_VBDs", vdi)
    for vbd in vbds if isinstance(vbds, list) else []:
        with _gone_is_fine():
            if await xapi.call("VM.get_is_control_domain", await xapi.call("VBD.get_VM", vbd)) is True:
                if await xapi.call("VBD.get_currently_attached", vbd) is True:
                    await xapi.call("VBD.unplug_force", vbd, timeout_s=_DESTROY_S)
                await xapi.call("VBD.destroy", vbd)


async def _reset(xapi: Xapi, step: Step) -> None:
    assert step.owner is not None
    before = step.owner.item.about.get("before", "")
    with _gone_is_fine():
        await xapi.call("SR.remove_from_other_config", step.ref, step.detail)
        if before:
            await xapi.call("SR.add_to_other_config", step.ref, step.detail, before)


async def _forget_sr(xapi: Xapi, step: Step) -> None:
    """Never SR.destroy: that would take the data."""
    with _gone_is_fine():
        pbds = await xapi.call("SR.get_PBDs", step.ref)
        for pbd in pbds if isinstance(pbds, list) else []:
            await _insist(xapi, "PBD.unplug", str(pbd))
            await _insist(xapi, "PBD.destroy", str(pbd))
        await _insist(xapi, "SR.forget", step.ref)


async def _unblock(xapi: Xapi, step: Step) -> None:
    with _gone_is_fine():
        await xapi.call("VM.remove_from_blocked_operations", step.ref, step.detail)


_DEEDS: Final[Mapping[Deed, Callable[[Xapi, Step], Awaitable[None]]]] = {
    Deed.END_TASK: _end_task,
    Deed.DESTROY_VM: _destroy_vm,
    Deed.DESTROY_DATA: _destroy_data,
    Deed.DESTROY_VDI: _destroy_vdi,
    Deed.RESET: _reset,
    Deed.FORGET_SR: _forget_sr,
    Deed.UNBLOCK: _unblock,
}


async def _insist(
    xapi: Xapi, method: str, ref: Ref, *, first: Callable[[Xapi, Ref], Awaitable[None]] | None = None
) -> None:
    """Call ``method`` until the object is no longer busy, each time after ``first``; one that has gone is fine."""
    for tries in range(1, BUSY_TRIES + 1):
        try:
            with _gone_is_fine():
                if first is not None:
                    await first(xapi, ref)
                await xapi.call(method, ref, timeout_s=_DESTROY_S)
        except XapiFailure as exc:
            if handling_of(exc) is not Handling.BUSY or tries == BUSY_TRIES:
                raise
        else:
            return
        await trio.sleep(BUSY_PAUSE_S)


@contextmanager
def _gone_is_fine() -> Iterator[None]:
    try:
        yield
    except XapiFailure as exc:
        if handling_of(exc) is not Handling.GONE:
            raise
