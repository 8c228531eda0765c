"""Taking back what a restore made on a pool, when it fails or is cancelled.

The ledger says what was made; an object whose uuid nobody learned is found by its marker or, for a VM, by its name.
What can not be taken back in time stays in the ledger, and the next sweep takes it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import trio

from xbfs_engine.core.errors import PoolError, StorageError, XapiFailure
from xbfs_engine.core.log import Logger
from xbfs_engine.restore.vm.calls import patiently
from xbfs_engine.source.xapi.failures import Handling, handling_of
from xbfs_engine.source.xapi.fields import Fields
from xbfs_engine.source.xapi.ledger import Kind
from xbfs_engine.source.xapi.markers import import_name, marker_of

if TYPE_CHECKING:
    from xbfs_engine.source.xapi.ledger import Item, RunLedger
    from xbfs_engine.source.xapi.session import Ref, Xapi

UNDO_S: Final = 300.0
"""How long it may take: as many disks as a VM has, each of which a host may hold for some seconds yet."""

_log = Logger("xbfs.restore")

_CLASSES: Final = {Kind.VM: "VM", Kind.VDI: "VDI"}
"""In this order: VMs go before their disks."""


async def undo(xapi: Xapi, ledger: RunLedger, *, why: BaseException) -> None:
    """Take back all that the run made, not to be cancelled; what stays is logged. Raises nothing of its own."""
    # A host that did not answer, or not in time, may yet make what is not there now.
    silent = isinstance(why, PoolError) and handling_of(why) is Handling.TRANSIENT
    certain = isinstance(why, Exception) and not silent
    with trio.move_on_after(UNDO_S, shield=True) as scope:
        for kind in _CLASSES:
            await undo_kind(xapi, ledger, kind, certain=certain)
    if scope.cancelled_caught:
        _log.warning("a restore is not taken back in time", items=len(ledger.items))


async def undo_kind(xapi: Xapi, ledger: RunLedger, kind: Kind, *, certain: bool) -> None:
    """Take back the VMs or the VDIs. ``certain``: what is not there now will never be."""
    cls = _CLASSES[kind]
    items = [item for item in ledger.items if item.kind is kind]
    if not items:
        return
    try:
        records = [Fields(cls, ref, record) for ref, record in (await xapi.records(cls)).items()]
        for item in items:
            found = [fields.ref for fields in records if _is(fields, item, ledger)]
            for ref in found:
                await _destroy(xapi, cls, ref)
            if found or item.uuid or certain:
                await ledger.gone(item)
    except (PoolError, StorageError) as exc:
        _log.warning("part of a restore is left for the sweep", cls=cls, error=exc.message)


async def _destroy(xapi: Xapi, cls: str, ref: Ref) -> None:
    try:
        await patiently(xapi, f"{cls}.destroy", ref)
    except XapiFailure as exc:
        if handling_of(exc) is not Handling.GONE:
            raise


def _is(fields: Fields, item: Item, ledger: RunLedger) -> bool:
    """Whether an object is what an item was noted for."""
    uuid = fields.text("uuid")
    if item.uuid:
        return uuid == item.uuid
    marker = marker_of(fields.mapping("other_config"))
    if marker is not None and (marker.run, marker.item) == (ledger.run, item.number):
        return marker.is_on(uuid)
    name = item.about.get("name")
    return (
        item.kind is Kind.VM
        and name is not None
        and fields.text("name_label") == import_name(ledger.run, item.number, name)
        and not fields.flag("is_a_snapshot")
        and not fields.flag("is_a_template")
    )
