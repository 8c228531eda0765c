"""Taking the snapshot of a VM, and getting rid of it when no point comes of it.

The snapshot's name is unique and was recorded before: so it is found again when the answer to VM.snapshot was lost.
"""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Final

from xbfs_engine.core.errors import PoolError, VmNotReady, XapiFailure
from xbfs_engine.ingest.vm.disks import Needless, Snapshot, TakenDisk
from xbfs_engine.source.xapi.fields import Fields
from xbfs_engine.source.xapi.ledger import Kind
from xbfs_engine.source.xapi.markers import snapshot_name
from xbfs_engine.source.xapi.removal import destroy_vdi, destroy_vm

if TYPE_CHECKING:
    from collections.abc import Mapping

    from xbfs_engine.ingest.vm.disks import Bases, ChosenVm, VmDisk
    from xbfs_engine.source.xapi.ledger import Item, RunLedger
    from xbfs_engine.source.xapi.patience import Patience
    from xbfs_engine.source.xapi.session import Ref, Xapi, XapiValue

_SNAPSHOT_TIMEOUT_S: Final = 1800.0
"""A snapshot takes seconds a disk; LVM with many disks on a busy SR some minutes."""

_OTHER_FORM: Final = "MESSAGE_PARAMETER_COUNT_MISMATCH"

_TAKEN: Final = "MAP_DUPLICATE_KEY"

_STATE_CHANGED: Final = "VM_BAD_POWER_STATE"
"""A VM can be snapshotted in every state that lasts: it was just being started or stopped."""

_SCAN_HELPS: Final = frozenset({f"SR_BACKEND_FAILURE_{number}" for number in (40, 46, 47, 65)})
"""What SM says of disks and SRs that it does not see at the moment."""

_SCAN_S: Final = 600.0


class SnapshotTaker:
    """Takes and discards the snapshot of one VM."""

    def __init__(self, xapi: Xapi, patience: Patience, ledger: RunLedger, vm: ChosenVm, bases: Bases) -> None:
        self._xapi = xapi
        self._patience = patience
        self._ledger = ledger
        self._vm = vm
        self._bases = bases
        self._item: Item | None = None
        self._vdi_items: dict[Ref, Item] = {}
        self._has_failed = False

    async def take(self, untracked: Mapping[int, str]) -> Snapshot:
        """Snapshot the VM; ``untracked``: by disk number, why changes are not tracked.

        Raises VmNotReady, PoolError; then call ``discard``.
        """
        self._item = await self._ledger.intend(Kind.SNAPSHOT, vm_uuid=self._vm.uuid, name=self._vm.name)
        vm_ref = await self._snapshot(self._name(self._item))
        if self._has_failed:
            # Whoever says that it was busy may have left one all the same; by its name alone it is known as ours.
            await self._destroy(keep=vm_ref)
        vm_uuid = str(await self._get("VM.get_uuid", vm_ref))
        self._item = await self._ledger.made(self._item, vm_uuid)
        await self._mark("VM", vm_ref, vm_uuid, self._item)
        by_number = await self._vdis_of(vm_ref)
        taken: list[TakenDisk] = []
        for disk in self._vm.disks:
            ref = by_number.pop(disk.number, None)
            if ref is None:
                raise VmNotReady(
                    f"the snapshot of {self._vm.name!r} lacks disk {disk.number}",
                    hint="the VM was changed meanwhile: run it again",
                )
            taken.append(await self._taken(disk, ref, untracked.get(disk.number)))
        needless = [await self._taken_along(ref) for ref in by_number.values()]
        return Snapshot(vm_ref, self._item, taken, needless)

    async def discard(self) -> None:
        """Destroy whatever there is of the snapshot: VM, and VDIs with all they hold. Raises PoolError at the end."""
        if self._item is not None:
            await self._destroy()
            await self._ledger.gone(self._item)

    async def _destroy(self, keep: Ref | None = None) -> None:
        """All snapshots of the name, but for ``keep``. Raises PoolError at the end."""
        assert self._item is not None
        failures: list[PoolError] = []
        vdis: dict[Ref, None] = {}
        found = await self._get("VM.get_by_name_label", self._name(self._item))
        for vm_ref in found if isinstance(found, list) else []:
            if vm_ref == keep:
                continue
            try:
                vdis |= dict.fromkeys((await self._vdis_of(str(vm_ref))).values())
                await destroy_vm(self._xapi, self._patience, str(vm_ref))
            except PoolError as exc:
                failures.append(exc)
        for ref in vdis:
            try:
                await destroy_vdi(self._xapi, self._patience, ref)
            except PoolError as exc:
                failures.append(exc)
            else:
                if ref in self._vdi_items:
                    await self._ledger.gone(self._vdi_items[ref])
        if failures:
            raise failures[0]

    def _name(self, item: Item) -> str:
        return snapshot_name(self._ledger.run, item.number, self._vm.name)

    async def _snapshot(self, name: str) -> Ref:
        """The snapshot VM. Not repeated when the connection breaks: nobody would know of the first one."""
        ignored: list[XapiValue] = [disk.vdi_ref for disk in self._vm.left_out]
        try:
            return await self._call_snapshot(name, ignored)
        except XapiFailure as exc:
            if exc.code != _OTHER_FORM:
                raise
        harmful = [disk for disk in self._vm.left_out if disk.harmful]
        if harmful:
            told = ", ".join(f"disk {disk.number} ({disk.reason})" for disk in harmful)
            raise VmNotReady(
                f"{self._vm.name!r} can not be snapshotted with {told}: this pool's release can leave out no disk",
                hint="detach the disk from the VM, or upgrade the pool (XenServer 8, XCP-ng 8.3)",
            )
        return await self._call_snapshot(name)

    async def _call_snapshot(self, name: str, *ignored: XapiValue) -> Ref:
        async def call() -> Ref:
            method = "VM.snapshot"
            return await self._xapi.run_task(method, self._vm.ref, name, *ignored, timeout_s=_SNAPSHOT_TIMEOUT_S)

        async def attempt() -> Ref:
            try:
                return await call()
            except XapiFailure as exc:
                self._has_failed = True
                if exc.code == _STATE_CHANGED:
                    return await call()
                if exc.code in _SCAN_HELPS:
                    await self._scan()
                raise

        return await self._patience.get(attempt, "VM.snapshot", repeatable=False)

    async def _scan(self) -> None:
        """Have SM look at the disks again; what is wrong with that shows at the next try."""
        for sr in sorted({disk.sr_ref for disk in self._vm.disks}):
            with suppress(XapiFailure):
                await self._xapi.call("SR.scan", sr, timeout_s=_SCAN_S)

    async def _taken(self, disk: VmDisk, ref: Ref, untracked: str | None) -> TakenDisk:
        record = await self._get("VDI.get_record", ref)
        fields = Fields("VDI", ref, record if isinstance(record, dict) else {})
        if untracked is None and not fields.flag("cbt_enabled", default=False):
            untracked = "the snapshot has no changed-block log"
        if untracked is None and fields.reference("snapshot_of") != disk.vdi_ref:
            untracked = "the snapshot is not of the disk that the VM has now"
        uuid = fields.text("uuid")
        slot = self._bases.slot(disk.number) if untracked is None else ""
        item = await self._found(ref, uuid, slot)
        return TakenDisk(disk, ref, uuid, item, fields.integer("virtual_size"), untracked)

    async def _taken_along(self, ref: Ref) -> Needless:
        """A VDI of a disk that is not backed up, which an old pool can not leave out."""
        uuid = str(await self._get("VDI.get_uuid", ref))
        return Needless(ref, await self._found(ref, uuid, ""))

    async def _found(self, ref: Ref, uuid: str, slot: str) -> Item:
        """Record and mark a VDI that came with the snapshot VM, whose name told of it until now.

        ``slot``: of the delta whose base it may become; the ledger hears of that when the point is committed.
        """
        item = await self._ledger.intend(Kind.VDI, vm_uuid=self._vm.uuid, uuid=uuid)
        self._vdi_items[ref] = item
        await self._mark("VDI", ref, uuid, item, slot)
        return item

    async def _mark(self, cls: str, ref: Ref, uuid: str, item: Item, slot: str = "") -> None:
        """Put our marker on, in place of what the snapshot may have copied."""
        for key, value in self._ledger.marker(item, uuid=uuid, slot=slot).to_other_config().items():
            await self._set(f"{cls}.remove_from_other_config", ref, key)
            await self._set(f"{cls}.add_to_other_config", ref, key, value)

    async def _vdis_of(self, vm_ref: Ref) -> dict[int, Ref]:
        """By number, the VDIs of the disks of a snapshot VM."""
        found: dict[int, Ref] = {}
        vbds = await self._get("VM.get_VBDs", vm_ref)
        for vbd in vbds if isinstance(vbds, list) else []:
            record = await self._get("VBD.get_record", str(vbd))
            fields = Fields("VBD", str(vbd), record if isinstance(record, dict) else {})
            vdi = fields.reference("VDI")
            # A CD's VDI is the ISO itself: no snapshot, and not ours.
            if vdi is not None and fields.text("type") != "CD":
                found[fields.integer("userdevice")] = vdi
        return found

    async def _get(self, method: str, argument: str) -> XapiValue:
        return await self._patience.get(lambda: self._xapi.call(method, argument), method, repeatable=True)

    async def _set(self, method: str, *arguments: str) -> None:
        try:
            await self._patience.get(lambda: self._xapi.call(method, *arguments), method, repeatable=True)
        except XapiFailure as exc:
            # Our own first try, whose answer was lost.
            if exc.code != _TAKEN:
                raise
