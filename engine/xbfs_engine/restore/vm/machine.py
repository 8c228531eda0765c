"""The VM of a restore: made out of its archive by the pool itself, or out of its records where that can not be.

Until ``finish`` it is called "[Importing …]", can not be started, and is marked as ours. Its name is the last thing it
gets: by that a sweep tells a complete VM from one that a run left half-made.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Literal

import trio

from xbfs_engine.core.errors import PoolError, VmNotReady, WireError, XapiFailure
from xbfs_engine.core.log import Logger
from xbfs_engine.restore.vm import ova
from xbfs_engine.restore.vm.calls import make, patiently, put_key, release
from xbfs_engine.restore.vm.shapes import texts_of, vbd_fields, vif_fields, vm_fields
from xbfs_engine.restore.vm.undo import undo_kind
from xbfs_engine.source.xapi.failures import Handling, handling_of
from xbfs_engine.source.xapi.fields import Fields
from xbfs_engine.source.xapi.http import import_metadata
from xbfs_engine.source.xapi.ledger import Kind
from xbfs_engine.source.xapi.markers import SELF_KEY, block_reason, import_name

if TYPE_CHECKING:
    from collections.abc import Sequence

    from xbfs_engine.restore.vm.disks import MadeDisk
    from xbfs_engine.restore.vm.plan import VmPlan
    from xbfs_engine.source.xapi.ledger import Item, RunLedger
    from xbfs_engine.source.xapi.session import Pool, Ref, XapiValue

Way = Literal["archive", "records"]

_BLOCKED: Final = ("start", "start_on")
"""Nobody shall start half a VM."""

_THERE: Final = frozenset({"VM_TO_IMPORT_IS_NOT_NEWER_VERSION", "VM_BAD_POWER_STATE"})
"""The pool holds a VM of this uuid: it came after the plan was made."""

_log = Logger("xbfs.restore")


@dataclass(slots=True)
class MadeVm:
    """A VM on the pool. ``way``: how it was made; ``reason``: why not by its archive. ``lost``: what it lacks."""

    ref: Ref
    uuid: str
    item: Item
    way: Way
    reason: str = ""
    lost: list[str] = field(default_factory=list)


class ArchiveRefused(Exception):
    """Why an archive can not be imported; the records can be used instead."""


class VmMaker:
    """Makes one VM around disks that are filled. Belongs to one task."""

    def __init__(self, pool: Pool, ledger: RunLedger, plan: VmPlan) -> None:
        self._pool = pool
        self._ledger = ledger
        self._plan = plan

    async def make(self, disks: Sequence[MadeDisk]) -> MadeVm:
        """A halted VM that can not be started yet. Raises VmNotReady, PoolError, StorageError, WireError."""
        # Both ways take seconds; stopped in between, a host might go on with a VM that nobody knows.
        with trio.CancelScope(shield=True):
            made = await self._make(disks)
        return made

    async def finish(self, made: MadeVm) -> None:
        """Make it the user's, under its name. Raises PoolError."""
        pool, plan = self._pool, self._plan
        await release(pool, "VM", made.ref, plan.point)
        blocked = texts_of(plan.record.vm, "blocked_operations")
        await patiently(pool, "VM.set_blocked_operations", made.ref, dict(blocked))
        await patiently(pool, "VM.set_name_label", made.ref, plan.name)

    async def _make(self, disks: Sequence[MadeDisk]) -> MadeVm:
        try:
            return await self._by_archive(disks)
        except ArchiveRefused as exc:
            _log.info("made by records", reason=str(exc))
            # XAPI undoes an import that fails; one that we do not like is there.
            await undo_kind(self._pool, self._ledger, Kind.VM, certain=True)
            return await self._by_records(disks, str(exc))

    async def _by_archive(self, disks: Sequence[MadeDisk]) -> MadeVm:
        plan, archive = self._plan, self._plan.record.archive
        if archive is None:
            raise ArchiveRefused("the restore point has no metadata archive")
        item = await self._intend()
        changes = ova.Changes(
            name=self._working_name(item),
            uuid=plan.point.vm_uuid if plan.keep_identity else None,
            disks={str(disk.plan.number): disk.uuid for disk in disks},
            vifs={vif.mac: vif for vif in plan.vifs},
            marker=self._ledger.marker(item).to_other_config(),
            blocked=self._blocked(),
            vtpm=plan.vtpm_allowed,
        )
        try:
            rewritten = ova.rewrite(archive, plan.point.vm_uuid, changes)
            # Never force: with restore it would replace a VM of the same uuid (xen-api, import.ml).
            refs = await import_metadata(
                self._pool, rewritten.archive, vdi_map=rewritten.vdi_map, restore=plan.keep_identity
            )
        except WireError as exc:
            raise ArchiveRefused(exc.message) from exc
        except XapiFailure as exc:
            raise self._judged(exc) from exc
        if len(refs) != 1:
            raise PoolError(f"the pool made {len(refs)} VMs of the metadata of one", hint="see its log of tasks")
        made = await self._made(refs[0], item, "archive", "")
        await self._check_disks(made, disks)
        await self._move_vifs(made)
        if plan.keep_identity and made.uuid != plan.point.vm_uuid:
            made.lost.append("uuid: the pool gave it a new one")
        return made

    def _judged(self, error: XapiFailure) -> Exception:
        """What a refused import means."""
        uuid = self._plan.point.vm_uuid
        if error.code in _THERE:
            return VmNotReady(
                f"the pool holds a VM with the uuid {uuid} already: {error.message}",
                hint="restore a copy without --keep-identity, or delete the VM first",
            )
        if error.code == "DUPLICATE_MAC_SEED" and self._plan.keep_identity:
            return VmNotReady(
                f"a copy of the VM is on the pool, whose MACs come of the same seed: {error.message}",
                hint="restore without --keep-identity, or delete the copy first",
            )
        if handling_of(error) in {Handling.TRANSIENT, Handling.BUSY}:
            return error
        return ArchiveRefused(error.message)

    async def _check_disks(self, made: MadeVm, disks: Sequence[MadeDisk]) -> None:
        """An import drops what it does not find without a word when it is lenient: look at what it made."""
        found: dict[str, Ref | None] = {}
        for ref in await self._parts(made.ref, "VBDs"):
            vbd = await self._fields("VBD", ref)
            if vbd.text("type") != "CD":
                found[vbd.text("userdevice")] = vbd.reference("VDI")
        if found != {str(disk.plan.number): disk.ref for disk in disks}:
            raise ArchiveRefused("the pool did not give the VM its disks")

    async def _move_vifs(self, made: MadeVm) -> None:
        """Into the networks that were chosen: several may have the name by which the import found one."""
        wanted = {vif.device: vif.network for vif in self._plan.vifs}
        for ref in await self._parts(made.ref, "VIFs"):
            vif = await self._fields("VIF", ref)
            network = wanted.get(vif.text("device"))
            if network is not None and vif.reference("network") != network.ref:
                await patiently(self._pool, "VIF.move", ref, network.ref)

    async def _by_records(self, disks: Sequence[MadeDisk], reason: str) -> MadeVm:
        pool, plan, ledger = self._pool, self._plan, self._ledger
        item = await self._intend()
        record = vm_fields(plan.record.vm, keep_identity=plan.keep_identity)
        other_config = texts_of(record, "other_config") | ledger.marker(item).to_other_config()
        record |= {
            "name_label": self._working_name(item),
            "other_config": dict(other_config),
            "blocked_operations": dict(self._blocked()),
        }
        made = await self._made(await make(pool, "VM.create", record), item, "records", reason)
        for disk in disks:
            await make(pool, "VBD.create", vbd_fields(disk.plan.vbd, made.ref, disk.ref, str(disk.plan.number)))
        for drive in plan.drives:
            await make(pool, "VBD.create", vbd_fields(drive, made.ref, None, str(drive.get("userdevice"))))
        for vif in plan.vifs:
            await make(pool, "VIF.create", vif_fields(vif, made.ref, keep_mac=plan.keep_identity))
        bios = texts_of(plan.record.vm, "bios_strings")
        if bios:
            await self._optionally(made, "BIOS strings", "VM.set_bios_strings", made.ref, dict(bios))
        for vtpm in plan.record.vtpms if plan.vtpm_allowed else ():
            if await self._optionally(made, "vTPM", "VTPM.create", made.ref, vtpm.get("is_unique") is True):
                made.lost.append("content of the vTPM: only the metadata archive holds it")
        if plan.keep_identity:
            made.lost.append("uuid: only an import of the metadata archive keeps it")
        return made

    async def _optionally(self, made: MadeVm, what: str, method: str, *arguments: XapiValue) -> bool:
        """Whether the pool did something that a VM can be without."""
        try:
            await patiently(self._pool, method, *arguments, repeatable=False)
        except XapiFailure as exc:
            if handling_of(exc) not in {Handling.REFUSED, Handling.UNSUPPORTED}:
                raise
            made.lost.append(f"{what}: {exc.message}")
            return False
        return True

    async def _intend(self) -> Item:
        return await self._ledger.intend(Kind.VM, vm_uuid=self._plan.point.vm_uuid, name=self._plan.name)

    async def _made(self, ref: Ref, item: Item, way: Way, reason: str) -> MadeVm:
        uuid = str(await patiently(self._pool, "VM.get_uuid", ref))
        item = await self._ledger.made(item, uuid)
        await put_key(self._pool, "VM", ref, SELF_KEY, uuid)
        return MadeVm(ref, uuid, item, way, reason)

    async def _parts(self, vm: Ref, name: str) -> list[Ref]:
        found = await patiently(self._pool, f"VM.get_{name}", vm)
        return [str(ref) for ref in found] if isinstance(found, list) else []

    async def _fields(self, cls: str, ref: Ref) -> Fields:
        record = await patiently(self._pool, f"{cls}.get_record", ref)
        return Fields(cls, ref, record if isinstance(record, dict) else {})

    def _working_name(self, item: Item) -> str:
        return import_name(self._ledger.run, item.number, self._plan.name)

    def _blocked(self) -> dict[str, str]:
        return dict.fromkeys(_BLOCKED, block_reason(self._ledger.run, self._ledger.node))
