"""Makes on a pool what was planned: an SR that shows the session's disks, and the VM on it.

The journal is there before. What fails here is taken back by ``tear_down``, by whoever called.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Final

import trio

from xbfs.instant.pool.notes import SessionLedger
from xbfs.instant.pool.record import SESSION_KEY
from xbfs_engine.core.errors import InstantError, PoolError, XapiFailure
from xbfs_engine.restore.vm.calls import make, patiently, put_key
from xbfs_engine.restore.vm.disks import MadeDisk
from xbfs_engine.restore.vm.job import START_S
from xbfs_engine.restore.vm.machine import VmMaker
from xbfs_engine.restore.vm.target import Network
from xbfs_engine.source.xapi.failures import Handling, handling_of
from xbfs_engine.source.xapi.fields import Fields
from xbfs_engine.source.xapi.ledger import Item, Kind

if TYPE_CHECKING:
    from collections.abc import Callable

    from xbfs.instant.pool.plan import BootPlan
    from xbfs.instant.pool.record import Journal
    from xbfs_engine.restore.vm.machine import MadeVm
    from xbfs_engine.restore.vm.plan import VmPlan
    from xbfs_engine.source.xapi.session import Pool, Ref, Xapi, XapiValue

_OURS: Final = ("gc", "leaf-coalesce", "coalesce")
"""What SM would do to our files behind the session's back (SM, cleanup.py): each is switched off."""


async def build(
    pool: Pool, journal: Journal, plan: BootPlan, node: str, place: tuple[str, str], say: Callable[[str], None]
) -> MadeVm:
    """The VM, halted. ``place``: address and path that hosts mount. Raises PoolError, InstantError, StorageError,
    WireError."""
    say(f"introducing SR {plan.sr_name}")
    sr = await _introduce(pool, plan)
    for host in plan.hosts:
        say(f"connecting {host.name}")
        await _connect(pool, sr, host.ref, place)
    say("looking for the disks")
    disks = await _find_disks(pool, sr, plan)
    say("making the VM")
    vm = plan.vm if not plan.isolated else await _isolated(pool, plan)
    maker = VmMaker(pool, SessionLedger(journal, node), vm)
    made = await maker.make(disks)
    await trio.lowlevel.checkpoint_if_cancelled()
    with trio.CancelScope(shield=True):
        await maker.finish(made)
    return made


async def start(pool: Xapi, vm: Ref) -> None:
    """Have it run. Raises PoolError."""
    await pool.run_task("VM.start", vm, False, False, timeout_s=START_S)


async def _introduce(pool: Xapi, plan: BootPlan) -> Ref:
    uuid, text = plan.record.sr_uuid, f"disks of {plan.vm.point.vm_name} out of restore point {plan.vm.point.id[:12]}"
    with trio.CancelScope(shield=True):
        sr = await make(pool, "SR.introduce", uuid, plan.sr_name, text, "nfs", "user", True, {})
    for key in _OURS:
        await put_key(pool, "SR", sr, key, "false")
    await put_key(pool, "SR", sr, SESSION_KEY, uuid)
    return sr


async def _connect(pool: Xapi, sr: Ref, host: Ref, place: tuple[str, str]) -> None:
    server, path = place
    device: dict[str, XapiValue] = {"server": server, "serverpath": path}
    record: dict[str, XapiValue] = {"host": host, "SR": sr, "device_config": device, "other_config": {}}
    with trio.CancelScope(shield=True):
        pbd = await make(pool, "PBD.create", record)
    try:
        await patiently(pool, "PBD.plug", pbd)
    except XapiFailure as exc:
        raise InstantError(
            f"a host does not get at {server}:{path}: {exc.message}",
            hint="hosts need TCP ports 111, 2049 and 20048 of this machine; --server says by which address",
        ) from exc


async def _find_disks(pool: Xapi, sr: Ref, plan: BootPlan) -> list[MadeDisk]:
    await patiently(pool, "SR.scan", sr)
    found = []
    for disk in plan.vm.disks:
        uuid = plan.record.vdis[disk.number]
        try:
            ref = str(await patiently(pool, "VDI.get_by_uuid", uuid))
        except XapiFailure as exc:
            if handling_of(exc) is not Handling.GONE:
                raise
            raise InstantError(f"the pool does not see disk {disk.number} on the new SR") from exc
        record = await patiently(pool, "VDI.get_record", ref)
        fields = Fields("VDI", ref, record if isinstance(record, dict) else {})
        size_bytes = fields.integer("virtual_size")
        if fields.reference("SR") != sr or size_bytes < disk.disk.size_bytes:
            raise PoolError(f"the pool sees disk {disk.number} with {size_bytes} bytes, or elsewhere", hint="")
        await patiently(pool, "VDI.set_name_label", ref, disk.name)
        await patiently(pool, "VDI.set_name_description", ref, disk.description)
        found.append(MadeDisk(disk, ref, uuid, size_bytes, Item(0, Kind.VDI, 0)))
    return found


async def _isolated(pool: Xapi, plan: BootPlan) -> VmPlan:
    """The VM in a network of its own: without a PIF nothing leaves the host that it runs on (xen-api, networks)."""
    if not plan.vm.vifs:
        return plan.vm
    record: dict[str, XapiValue] = {
        "name_label": plan.vm.vifs[0].network.name,
        "name_description": f"leads nowhere: for a VM of restore point {plan.vm.point.id[:12]}",
        # There from the start, so that it is found again whatever becomes of the answer.
        "other_config": {SESSION_KEY: plan.record.sr_uuid},
        "tags": [],
    }
    with trio.CancelScope(shield=True):
        ref = await make(pool, "network.create", record)
    found = await patiently(pool, "network.get_record", ref)
    fields = Fields("network", ref, found if isinstance(found, dict) else {})
    network = Network(ref, fields.text("uuid"), fields.text("name_label"), fields.text("bridge"))
    return replace(plan.vm, vifs=tuple(vif._replace(network=network) for vif in plan.vm.vifs))
