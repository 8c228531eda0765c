"""Brings the disks of a session's VM to another SR of its pool; may be repeated after any failure.

What is left to do is told by the pool: a disk is moved when the VM's VBD has it on another SR. Disks of a VM that runs
are moved by the pool while it writes; those of a halted one are copied, and its VBDs made again.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Final, NamedTuple

import trio

from xbfs.instant.pool.record import SESSION_KEY, Copy
from xbfs.instant.pool.tear_down import drop_copies, forget, gone_is_fine, leave_network, look
from xbfs_engine.core.errors import ObjectNotFound, PoolError, VmNotReady, XapiFailure
from xbfs_engine.core.limits import GIB
from xbfs_engine.restore.vm.calls import BUSY_LIMIT_S, make, patiently
from xbfs_engine.restore.vm.target import Target, sr_called
from xbfs_engine.source.xapi.failures import Handling, handling_of
from xbfs_engine.source.xapi.fields import Fields
from xbfs_engine.source.xapi.values import NULL_REF

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from xbfs.instant.pool.record import Journal
    from xbfs.instant.pool.tear_down import Present
    from xbfs_engine.source.xapi.inventory import Sr, Vbd, Vdi, Vm
    from xbfs_engine.source.xapi.session import Ref, Xapi, XapiValue

AT_ONCE: Final = 3
"""Storage migrations of a pool at once: xapi refuses the fourth (TOO_MANY_STORAGE_MIGRATES)."""

MOVE_S: Final = 7 * 24 * 3600.0
"""For one disk: some TiB over a slow network."""

_FIRST_S: Final = 2.0
_LONGEST_S: Final = 30.0
_TOO_MANY: Final = "TOO_MANY_STORAGE_MIGRATES"
_LIVE: Final = frozenset({"Running", "Paused"})


class Listener(NamedTuple):
    """``say``: the next step. ``progress``: of a disk by number, from 0 to 1."""

    say: Callable[[str], None]
    progress: Callable[[int, float], None]


class Migrated(NamedTuple):
    """A VM that needs the session no more. ``disks``: uuids of its disks by number."""

    uuid: str
    name: str
    disks: dict[int, str]


async def migrate(pool: Xapi, journal: Journal, sr_name: str, listener: Listener) -> Migrated:
    """Move all disks that are still the session's, then forget its SR. The session itself is the caller's to end.

    Raises ObjectNotFound, VmNotReady, PoolError, StorageError; then all is there yet, and it can be called again.
    """
    present = await look(pool, journal.record)
    vm = _the_vm(present)
    sr = sr_called(Target(present.inventory, ()), sr_name)
    _check(present, vm, sr, journal)
    if vm.power_state in _LIVE:
        await drop_copies(pool, journal, present)
        await _move(pool, present, sr, listener)
    else:
        await _copy_all(pool, journal, present, vm, sr, listener)
    present = await look(pool, journal.record)
    vm = _the_vm(present)
    if not present.is_moved(journal.record):
        raise PoolError(f"disks of VM {vm.name} are still on the session's SR", hint="run it again")
    if strangers := present.strangers(journal.record):
        raise _strangers(strangers)
    for number in list(journal.record.copies):
        await journal.note_copy(number, None)
    await leave_network(pool, journal.record, listener.say)
    if present.sr is not None:
        await forget(pool, present.sr, listener.say)
    return Migrated(vm.uuid, vm.name, {number: vdi.uuid for number, (_, vdi) in present.away.items()})


def _the_vm(present: Present) -> Vm:
    if present.vm is None:
        raise ObjectNotFound(
            "the session's VM is not on the pool any more", hint="`xbfs boot discard` ends the session"
        )
    return present.vm


def _check(present: Present, vm: Vm, sr: Sr, journal: Journal) -> None:
    """Refuse what can be refused before anything is done."""
    if vm.power_state not in _LIVE | {"Halted"}:
        raise VmNotReady(f"VM {vm.name} is {vm.power_state.lower()}", hint="resume it, or shut it down")
    if present.sr is not None and sr.ref == present.sr.ref:
        raise VmNotReady(f"SR {sr.name} is the session's own", hint="name the SR where the disks shall stay")
    if vm.power_state in _LIVE and vm.resident_on not in sr.hosts:
        raise VmNotReady(f"the host of VM {vm.name} does not see SR {sr.name}", hint="connect it: `xe pbd-plug`")
    if strangers := present.strangers(journal.record):
        raise _strangers(strangers)
    needed = sum(vdi.size_bytes if sr.thick else 0 for _, vdi in present.here.values())
    if sr.size_bytes > 0 and needed > sr.size_bytes - sr.used_bytes:
        raise VmNotReady(f"SR {sr.name} has no room for {needed / GIB:.1f} GiB", hint="choose another with --to")
    lost = present.unplaced(journal.record)
    if vm.power_state in _LIVE and lost:
        raise VmNotReady(
            f"VM {vm.name} was started without disk {min(lost)}, which was just being moved", hint="shut it down first"
        )


def _strangers(names: Sequence[str]) -> VmNotReady:
    return VmNotReady(
        f"others have disks on the session's SR: {', '.join(names[:10])}",
        hint="delete the VM's snapshots and clones, and move other disks away: they would be lost with the session",
    )


async def _move(pool: Xapi, present: Present, sr: Sr, listener: Listener) -> None:
    """While the VM runs. What fails does not stop the others."""
    turns, failures = trio.CapacityLimiter(AT_ONCE), []

    async def one(number: int, vdi: Vdi) -> None:
        async with turns:
            listener.say(f"moving disk {number} to SR {sr.name}")
            try:
                await _move_one(pool, vdi, sr, partial(listener.progress, number))
            except PoolError as exc:
                failures.append(exc)

    async with trio.open_nursery() as nursery:
        for number, (_, vdi) in sorted(present.here.items()):
            nursery.start_soon(one, number, vdi)
    if failures:
        raise failures[0]


async def _move_one(pool: Xapi, vdi: Vdi, sr: Sr, progress: Callable[[float], None]) -> None:
    if vdi.cbt_enabled:
        await patiently(pool, "VDI.disable_cbt", vdi.ref)
    delay_s, give_up_at = _FIRST_S, trio.current_time() + BUSY_LIMIT_S
    while True:
        try:
            await pool.run_task("VDI.pool_migrate", vdi.ref, sr.ref, {}, timeout_s=MOVE_S, progress=progress)
        except XapiFailure as exc:
            # The migrations of others end, however long they take.
            passes = handling_of(exc) is Handling.BUSY and trio.current_time() < give_up_at
            if not passes and exc.code != _TOO_MANY:
                raise
            await trio.sleep(delay_s)
            delay_s = min(2 * delay_s, _LONGEST_S)
        else:
            return


async def _copy_all(pool: Xapi, journal: Journal, present: Present, vm: Vm, sr: Sr, listener: Listener) -> None:
    """Of a halted VM. A copy counts from the moment that the VBD of its disk is gone: the VM may have run before."""
    pending = present.unplaced(journal.record)
    await drop_copies(pool, journal, present, keep=pending)
    for number in sorted(pending):
        await _attach(pool, journal, vm, number)
    for number, (vbd, vdi) in sorted(present.here.items()):
        listener.say(f"copying disk {number} to SR {sr.name}")
        await _copy(pool, journal, vbd, vdi, sr, partial(listener.progress, number), number)
        await gone_is_fine(pool, "VBD.destroy", vbd.ref)
        await _attach(pool, journal, vm, number)


async def _copy(
    pool: Xapi, journal: Journal, vbd: Vbd, vdi: Vdi, sr: Sr, progress: Callable[[float], None], number: int
) -> None:
    """Into a VDI of ours, which is found again by its marker until its uuid is noted."""
    record = await patiently(pool, "VBD.get_record", vbd.ref)
    was = Fields("VBD", vbd.ref, record if isinstance(record, dict) else {})
    kept: dict[str, XapiValue] = {
        "bootable": was.flag("bootable"),
        "mode": was.text("mode"),
        "type": was.text("type"),
        "unpluggable": was.flag("unpluggable", default=True),
        "qos_algorithm_type": was.text("qos_algorithm_type", ""),
        "qos_algorithm_params": dict(was.mapping("qos_algorithm_params")),
        "other_config": {},
    }
    source = await patiently(pool, "VDI.get_record", vdi.ref)
    fields = Fields("VDI", vdi.ref, source if isinstance(source, dict) else {})
    await journal.note_copy(number, Copy())
    with trio.CancelScope(shield=True):
        new = await make(
            pool,
            "VDI.create",
            {
                "name_label": fields.text("name_label"),
                "name_description": fields.text("name_description"),
                "SR": sr.ref,
                "virtual_size": vdi.size_bytes,
                "type": "user",
                "sharable": False,
                "read_only": False,
                "other_config": {SESSION_KEY: journal.record.sr_uuid},
                "xenstore_data": {},
                "tags": [],
                "sm_config": {},
            },
        )
        copy = Copy(str(await patiently(pool, "VDI.get_uuid", new)), kept)
        await journal.note_copy(number, copy)
    await pool.run_task("VDI.copy", vdi.ref, NULL_REF, NULL_REF, new, timeout_s=MOVE_S, progress=progress)
    await patiently(pool, "VDI.remove_from_other_config", new, SESSION_KEY)
    await journal.note_copy(number, replace(copy, complete=True))


async def _attach(pool: Xapi, journal: Journal, vm: Vm, number: int) -> None:
    """The copy in the place of its disk, whose VBD is gone."""
    copy = journal.record.copies[number]
    new: Ref = str(await patiently(pool, "VDI.get_by_uuid", copy.vdi_uuid))
    own: dict[str, XapiValue] = {"VM": vm.ref, "VDI": new, "empty": False, "userdevice": str(number)}
    await make(pool, "VBD.create", dict(copy.vbd) | own)
    await journal.note_copy(number, None)
