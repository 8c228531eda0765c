"""Snapshot VDIs of ours that are the base of nothing: of points before the last, of fall-backs, of dead runs.

What tells them is our marker with the disk's slot, put on the very object; the repository says which one is the base.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from xbfs_engine.core.errors import XapiFailure
from xbfs_engine.core.log import Logger
from xbfs_engine.source.xapi.failures import Handling, handling_of
from xbfs_engine.source.xapi.fields import Fields
from xbfs_engine.source.xapi.markers import marker_of
from xbfs_engine.source.xapi.removal import destroy_vdi

if TYPE_CHECKING:
    from collections.abc import Set as AbstractSet

    from xbfs_engine.ingest.vm.disks import Bases
    from xbfs_engine.source.xapi.markers import Marker
    from xbfs_engine.source.xapi.patience import Patience
    from xbfs_engine.source.xapi.session import Ref, Xapi

_log = Logger("xbfs.vm")


class OlderBases:
    """Destroys them for one VM. ``node``: ours; ``live``: runs of this node that are at work, ours included."""

    def __init__(self, xapi: Xapi, patience: Patience, bases: Bases, *, node: str, live: AbstractSet[str]) -> None:
        self._xapi = xapi
        self._patience = patience
        self._bases = bases
        self._node = node
        self._live = live

    async def end_others(self, vdi_ref: Ref, number: int, keep: AbstractSet[str]) -> None:
        """Those of this node's dead and finished runs among the snapshots of a disk, but for ``keep`` (uuids).

        Raises PoolError.
        """
        found = await self._xapi.call("VDI.get_snapshots", vdi_ref)
        for ref in found if isinstance(found, list) else []:
            marked = await self._marked(str(ref), number)
            if marked is None or marked.self_uuid in keep:
                continue
            if marked.node == self._node and marked.run not in self._live:
                _log.info("destroying a snapshot that is no base", vdi=marked.self_uuid, run=marked.run)
                await destroy_vdi(self._xapi, self._patience, str(ref))

    async def end_base(self, number: int, uuid: str) -> None:
        """The base that the last point of this repository named, whichever node made it. Raises PoolError."""
        try:
            ref = str(await self._xapi.call("VDI.get_by_uuid", uuid))
        except XapiFailure as exc:
            if handling_of(exc) == Handling.GONE:
                return
            raise
        if await self._marked(ref, number) is not None:
            await destroy_vdi(self._xapi, self._patience, ref)

    async def _marked(self, ref: Ref, number: int) -> Marker | None:
        """The marker of a VDI, if it is a base of this disk in this repository and not a copy of one."""
        try:
            record = await self._xapi.call("VDI.get_record", ref)
        except XapiFailure as exc:
            if handling_of(exc) == Handling.GONE:
                return None
            raise
        fields = Fields("VDI", ref, record if isinstance(record, dict) else {})
        marker = marker_of(fields.mapping("other_config"))
        if marker is None or marker.self_uuid != fields.text("uuid") or marker.slot != self._bases.slot(number):
            return None
        return marker
