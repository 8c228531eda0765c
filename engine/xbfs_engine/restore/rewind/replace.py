"""A new VDI in place of one that a host refuses to write into: written whole, verified, and put where the old one was.

The old VDI is never touched beyond its name: it stays, detached. The new one is in the ledger before it is made, and
ours until it is the VM's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

import trio

from xbfs_engine.core.errors import PoolError, VmNotReady, XapiFailure
from xbfs_engine.core.log import Logger
from xbfs_engine.source.xapi.fields import Fields
from xbfs_engine.source.xapi.ledger import Kind
from xbfs_engine.source.xapi.markers import PREFIX
from xbfs_engine.source.xapi.removal import destroy_vdi

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from xbfs_engine.restore.rewind.matching import MatchedDisk
    from xbfs_engine.source.xapi.inventory import Vm
    from xbfs_engine.source.xapi.ledger import RunLedger
    from xbfs_engine.source.xapi.patience import Patience
    from xbfs_engine.source.xapi.session import Ref, Xapi, XapiValue

_CREATE_S: Final = 600.0
_CLEAN_UP_S: Final = 120.0
_KEPT_OF_VBD: Final = (
    *("userdevice", "bootable", "mode", "type", "unpluggable", "other_config"),
    *("qos_algorithm_type", "qos_algorithm_params"),
)
OLD_SUFFIX: Final = " (before rewind)"

_log = Logger("xbfs.rewind")


class NewDisk(NamedTuple):
    """The VDI that took the place."""

    ref: Ref
    uuid: str


async def replaced(
    xapi: Xapi,
    patience: Patience,
    ledger: RunLedger,
    *,
    vm: Vm,
    disk: MatchedDisk,
    write: Callable[[Ref], Awaitable[None]],
) -> NewDisk:
    """Make a VDI of the same size on the same SR, have ``write`` write and verify it, and attach it for the old one.

    Raises PoolError, StorageError and what ``write`` raises; then the old one is attached as before.
    """
    new: NewDisk | None = None
    item = await ledger.intend(Kind.VDI, vm_uuid=vm.uuid)
    try:
        record: dict[str, XapiValue] = {
            "name_label": disk.vdi.name,
            "name_description": f"rewound by xbfs run {ledger.run}",
            "SR": disk.vdi.sr,
            "virtual_size": str(disk.vdi.size_bytes),
            "type": "user",
            "sharable": False,
            "read_only": False,
            "other_config": dict(ledger.marker(item).to_other_config()),
            "xenstore_data": {},
            # Not the old one's: it says how that one is stored.
            "sm_config": {},
            "tags": [],
        }
        ref = str(await xapi.call("VDI.create", record, timeout_s=_CREATE_S))
        new = NewDisk(ref, str(await xapi.call("VDI.get_uuid", ref)))
        item = await ledger.made(item, new.uuid)
        await write(ref)
        await _swap(xapi, patience, vm, disk, new)
    except BaseException:
        if new is not None:
            with trio.move_on_after(_CLEAN_UP_S, shield=True):
                try:
                    await destroy_vdi(xapi, patience, new.ref)
                    await ledger.gone(item)
                except PoolError as exc:
                    _log.warning("a new disk is left for the sweep", vdi=new.uuid, error=exc.message)
        raise
    await ledger.gone(item)
    for key in ledger.marker(item).to_other_config():
        assert key.startswith(PREFIX)
        await _get(xapi, patience, "VDI.remove_from_other_config", new.ref, key)
    await _get(xapi, patience, "VDI.set_name_label", disk.vdi.ref, disk.vdi.name + OLD_SUFFIX)
    return new


async def _swap(xapi: Xapi, patience: Patience, vm: Vm, disk: MatchedDisk, new: NewDisk) -> None:
    """A position of a VM holds one disk (xen-api, VBD.create), so the old one leaves first, and returns on failure."""
    answer = await _get(xapi, patience, "VBD.get_record", disk.vbd.ref)
    record = answer if isinstance(answer, dict) else {}
    # With its types checked, as it is sent back.
    Fields("VBD", disk.vbd.ref, record).text("userdevice")
    fields: dict[str, XapiValue] = {key: record[key] for key in _KEPT_OF_VBD if key in record}
    fields |= {"VM": vm.ref, "empty": False}
    with trio.CancelScope(shield=True):
        await _get(xapi, patience, "VBD.destroy", disk.vbd.ref)
        try:
            await xapi.call("VBD.create", {**fields, "VDI": new.ref})
        except PoolError as exc:
            try:
                await _get(xapi, patience, "VBD.create", {**fields, "VDI": disk.vdi.ref})
            except XapiFailure as again:
                if again.code != "DEVICE_ALREADY_EXISTS":
                    raise VmNotReady(
                        f"disk {disk.number} of {vm.name!r} is detached: neither the new VDI {new.uuid} nor the old "
                        f"{disk.vdi.uuid} could be attached: {again.message}",
                        hint=f"attach {disk.vdi.uuid} to position {disk.vbd.position} with `xe vbd-create`",
                    ) from exc
            raise


async def _get(xapi: Xapi, patience: Patience, method: str, *arguments: XapiValue) -> XapiValue:
    return await patience.get(lambda: xapi.call(method, *arguments), method, repeatable=True)
