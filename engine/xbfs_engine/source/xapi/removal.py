"""Getting rid of snapshot VMs and VDIs of ours, all of a VDI or its data, while hosts still let go of them.

A host keeps a disk attached to its dom0 for some seconds after an NBD client has left, sometimes for ever; and
data_destroy waits only four seconds for that (xen-api, xapi_vdi.ml). An object that has gone is no error anywhere here.
Keeps no state; any task may call it.
"""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Final

import trio

from xbfs_engine.core.errors import XapiFailure
from xbfs_engine.core.log import Logger
from xbfs_engine.source.xapi.failures import Handling, handling_of

if TYPE_CHECKING:
    from xbfs_engine.source.xapi.patience import Patience
    from xbfs_engine.source.xapi.session import Xapi
    from xbfs_engine.source.xapi.values import Ref, XapiValue

IN_USE_PAUSES_S: Final = (0.5, 1.0, 2.0, *(5.0,) * 9)
"""Mostly a host lets go within a second or two; ten times five seconds is what other clients were seen to need (Xen
Orchestra, issues 7826 and 7960)."""

_STUBBORN_S: Final = 2.0
"""After such a pause a host is helped to let go; before it may just be about to."""

DESTROY_S: Final = 600.0
_IN_USE: Final = frozenset({"VDI_IN_USE", "SR_BACKEND_FAILURE_24"})

_log = Logger("xapi.removal")


async def destroy_vdi(xapi: Xapi, patience: Patience, ref: Ref, *, abandoned: bool = False) -> None:
    """Destroy a VDI. ``abandoned``: whoever read it is dead, so hosts are made to let go at once. Raises PoolError."""
    await _insist(xapi, patience, "VDI.destroy", ref, abandoned=abandoned)


async def destroy_data(xapi: Xapi, patience: Patience, ref: Ref, *, abandoned: bool = False) -> None:
    """Destroy the data of a snapshot VDI and keep its changed-block log. Raises PoolError."""
    await _insist(xapi, patience, "VDI.data_destroy", ref, abandoned=abandoned)


async def destroy_vm(xapi: Xapi, patience: Patience, ref: Ref) -> None:
    """Destroy the record of a VM, not its VDIs. Raises PoolError."""
    await gone_is_fine(xapi, patience, "VM.destroy", ref)


async def gone_is_fine(xapi: Xapi, patience: Patience, method: str, ref: Ref) -> None:
    """Call ``method``, which takes away the object, with patience for all but VDIs in use. Raises PoolError."""
    try:
        await patience.get(
            lambda: xapi.call(method, ref, timeout_s=DESTROY_S), method, repeatable=True, busy=_not_in_use
        )
    except XapiFailure as exc:
        if handling_of(exc) is not Handling.GONE:
            raise


async def _insist(xapi: Xapi, patience: Patience, method: str, ref: Ref, *, abandoned: bool) -> None:
    if abandoned:
        await _detach(xapi, ref)
    for pause_s in (*IN_USE_PAUSES_S, None):
        try:
            await gone_is_fine(xapi, patience, method, ref)
        except XapiFailure as exc:
            if exc.code not in _IN_USE or pause_s is None:
                raise
        else:
            return
        await trio.sleep(pause_s)
        if abandoned or pause_s >= _STUBBORN_S:
            await _detach(xapi, ref)


def _not_in_use(error: XapiFailure) -> bool:
    return error.code not in _IN_USE


async def _detach(xapi: Xapi, vdi_ref: Ref) -> None:
    """Take the VDI from the control domains that hold it. What does not work now is tried again with the VDI."""
    with suppress(XapiFailure):
        vbds = await xapi.call("VDI.get_VBDs", vdi_ref)
        for vbd in vbds if isinstance(vbds, list) else []:
            if await _is_of_control_domain(xapi, vbd):
                _log.info("detaching a disk from dom0", vbd=str(vbd))
                with suppress(XapiFailure):
                    await xapi.call("VBD.unplug_force", vbd, timeout_s=DESTROY_S)
                with suppress(XapiFailure):
                    await xapi.call("VBD.destroy", vbd)


async def _is_of_control_domain(xapi: Xapi, vbd: XapiValue) -> bool:
    try:
        vm = await xapi.call("VBD.get_VM", vbd)
        return await xapi.call("VM.get_is_control_domain", vm) is True
    except XapiFailure:
        return False
