"""Takes from a pool what a session has there. May be repeated after any failure: what is gone is fine.

Never SR.destroy, never VDI.destroy on the session's SR: both would delete files of the session while it may be wanted
yet. SR.forget drops the objects alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import trio

from xbfs.instant.pool.record import SESSION_KEY
from xbfs_engine.core.errors import PoolError, SessionBusy, VmNotReady, XapiFailure
from xbfs_engine.restore.vm.calls import patiently
from xbfs_engine.source.xapi.failures import Handling, handling_of
from xbfs_engine.source.xapi.fields import Fields
from xbfs_engine.source.xapi.inventory import take_inventory

if TYPE_CHECKING:
    from collections.abc import Callable

    from xbfs.instant.pool.record import Journal, PoolRecord
    from xbfs_engine.source.xapi.inventory import Inventory, Sr, Vbd, Vdi, Vm
    from xbfs_engine.source.xapi.session import Ref, Xapi, XapiValue

STOP_S = 300.0
_USED = frozenset({"NETWORK_CONTAINS_VIF", "NETWORK_CONTAINS_PIF"})
_WRONG_STATE = "VM_BAD_POWER_STATE"
_TRIES = 3
_BUSY_S = 2.0


class Present(NamedTuple):
    """What of a session is on the pool. ``here``: VBDs of the VM whose disks are on the session's SR, ``away``: those
    of the session's disks that were brought elsewhere; both by number."""

    inventory: Inventory
    sr: Sr | None
    vm: Vm | None
    here: dict[int, tuple[Vbd, Vdi]]
    away: dict[int, tuple[Vbd, Vdi]]

    def strangers(self, record: PoolRecord) -> list[str]:
        """Names of what others keep on the session's SR: snapshots, clones, disks that other VMs use."""
        if self.sr is None:
            return []
        own = {vdi.uuid for _, vdi in self.here.values()} | set(record.vdis.values())
        return sorted(
            vdi.name or vdi.uuid
            for vdi in self.inventory.vdis.values()
            if vdi.sr == self.sr.ref and vdi.managed and (vdi.uuid not in own or self._others_use(vdi))
        )

    def _others_use(self, vdi: Vdi) -> bool:
        users = (self.inventory.vms.get(vbd.vm) for vbd in self.inventory.vbds_of_vdi.get(vdi.ref, ()))
        return any(user is not None and user != self.vm and not user.is_control_domain for user in users)

    def is_moved(self, record: PoolRecord) -> bool:
        """Whether the VM needs nothing of the session any more."""
        return bool(self.away) and not self.here and not self.unplaced(record)

    def unplaced(self, record: PoolRecord) -> frozenset[int]:
        """Numbers of disks that were copied, and whose old VBD is gone but the new one not there yet."""
        placed = self.here.keys() | self.away.keys()
        return frozenset(number for number, copy in record.copies.items() if copy.complete and number not in placed)


async def look(pool: Xapi, record: PoolRecord) -> Present:
    """What is there. Raises PoolError, also if it is another pool."""
    inventory = await take_inventory(pool)
    if inventory.pool_uuid != record.pool_uuid:
        raise PoolError(
            f"pool {record.pool} is not the one that the session is on: it has uuid {inventory.pool_uuid}",
            hint=f"configure the pool with uuid {record.pool_uuid} under this name: `xbfs pool add`",
        )
    sr = inventory.sr_by_uuid(record.sr_uuid)
    vm = inventory.vm_by_uuid(record.vm_uuid) if record.vm_uuid else None
    if vm is None:
        # Before its uuid was noted; a copy that somebody made of it has another name or is a snapshot.
        named = [vm for vm in inventory.vms.values() if vm.name == record.working_name and not vm.is_a_snapshot]
        vm = named[0] if len(named) == 1 and not named[0].is_a_template else None
    here, away = {}, {}
    for vbd in inventory.disks(vm) if vm else ():
        vdi = inventory.vdi_of(vbd)
        if vdi is None or vbd.type == "CD" or vbd.number is None:
            continue
        if sr is not None and vdi.sr == sr.ref:
            here[vbd.number] = vbd, vdi
        elif vbd.number in record.vdis:
            away[vbd.number] = vbd, vdi
    return Present(inventory, sr, vm, here, away)


async def tear_down(pool: Xapi, journal: Journal, say: Callable[[str], None], *, force: bool) -> None:
    """The VM with its VBDs, VIFs and own network, then the SR; a VM that is wholly elsewhere stays.

    Raises SessionBusy if the VM runs, VmNotReady if it is half elsewhere, both but for ``force``; PoolError.
    """
    present = await look(pool, journal.record)
    vm = present.vm
    if vm is not None and present.is_moved(journal.record):
        say(f"VM {vm.name} stays: its disks are on another SR")
    elif vm is not None:
        if present.away and not force:
            raise VmNotReady(
                f"VM {vm.name} has been moved to another SR in part",
                hint="go on with `xbfs boot migrate`; --force deletes the VM, and leaves the disks that were moved",
            )
        await _remove(pool, vm, say, force=force)
    await drop_copies(pool, journal, present)
    await leave_network(pool, journal.record, say)
    if present.sr is not None:
        await forget(pool, present.sr, say)


async def leave_network(pool: Xapi, record: PoolRecord, say: Callable[[str], None]) -> None:
    """Destroy the network of an isolated VM; one that has interfaces is its users', and none of ours any more.

    Raises PoolError.
    """
    for ref, found in (await pool.records("network")).items():
        network = Fields("network", ref, found)
        if network.mapping("other_config").get(SESSION_KEY) != record.sr_uuid:
            continue
        if network.texts("VIFs") or not await _destroyed(pool, ref):
            say(f"network {network.text('name_label')} stays: it is used")
            await gone_is_fine(pool, "network.remove_from_other_config", ref, SESSION_KEY)


async def _destroyed(pool: Xapi, network: Ref) -> bool:
    """Whether it is gone; not if somebody has come to use it."""
    try:
        await gone_is_fine(pool, "network.destroy", network)
    except XapiFailure as exc:
        if exc.code not in _USED:
            raise
        return False
    return True


async def drop_copies(pool: Xapi, journal: Journal, present: Present, *, keep: frozenset[int] = frozenset()) -> None:
    """Destroy what a migration of a halted VM began and did not finish: new VDIs on the other SR, by their uuid, or by
    their marker where that was not noted yet. One that is attached has taken the place of its disk, and stays.

    ``keep``: numbers of copies to leave alone. Raises PoolError, StorageError.
    """
    record, inventory = journal.record, present.inventory
    for number, copy in record.copies.items():
        if number in keep:
            continue
        for vdi in inventory.vdis.values():
            is_it = vdi.uuid == copy.vdi_uuid if copy.vdi_uuid else vdi.other_config.get(SESSION_KEY) == record.sr_uuid
            if is_it and (present.sr is None or vdi.sr != present.sr.ref) and not inventory.vbds_of_vdi.get(vdi.ref):
                await gone_is_fine(pool, "VDI.destroy", vdi.ref)
        await journal.note_copy(number, None)


async def forget(pool: Xapi, sr: Sr, say: Callable[[str], None]) -> None:
    """Disconnect the session's SR from all hosts, also those that joined since, and forget it. Raises PoolError."""
    say(f"disconnecting and forgetting SR {sr.name}")
    found = await gone_is_fine(pool, "SR.get_PBDs", sr.ref)
    for pbd in found if isinstance(found, list) else []:
        await gone_is_fine(pool, "PBD.unplug", str(pbd))
        await gone_is_fine(pool, "PBD.destroy", str(pbd))
    await gone_is_fine(pool, "SR.forget", sr.ref)


async def gone_is_fine(pool: Xapi, method: str, ref: Ref, *arguments: XapiValue) -> XapiValue | None:
    """A call about an object that may be gone: then None. Raises PoolError."""
    try:
        return await patiently(pool, method, ref, *arguments)
    except XapiFailure as exc:
        if handling_of(exc) is not Handling.GONE:
            raise
        return None


async def _remove(pool: Xapi, vm: Vm, say: Callable[[str], None], *, force: bool) -> None:
    """The record of a VM and of its parts; its disks stay."""
    state = vm.power_state
    if state != "Halted" and not force:
        raise SessionBusy(f"VM {vm.name} is {state.lower()}", hint="shut it down first; --force powers it off")
    if force:
        # What its original was protected from comes with it.
        await gone_is_fine(pool, "VM.set_blocked_operations", vm.ref, {})
    for tries_left in reversed(range(_TRIES)):
        if state != "Halted":
            say(f"powering VM {vm.name} off")
            await _power_off(pool, vm.ref)
        say(f"deleting VM {vm.name}")
        try:
            await gone_is_fine(pool, "VM.destroy", vm.ref)
        except XapiFailure as exc:
            # A start that was given up went on while we waited for it.
            if exc.code != _WRONG_STATE or not force or not tries_left:
                raise
            state = str(await gone_is_fine(pool, "VM.get_power_state", vm.ref) or "Halted")
        else:
            return


async def _power_off(pool: Xapi, vm: Ref) -> None:
    give_up_at = trio.current_time() + STOP_S
    while True:
        try:
            await pool.run_task("VM.hard_shutdown", vm, timeout_s=STOP_S)
        except XapiFailure as exc:
            if exc.code == _WRONG_STATE or handling_of(exc) is Handling.GONE:
                return
            if handling_of(exc) is not Handling.BUSY or trio.current_time() > give_up_at:
                raise
            await trio.sleep(_BUSY_S)
        else:
            return
