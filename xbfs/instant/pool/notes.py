"""A session's record in the place of a run's ledger, so that the VM is made as a restore makes it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from xbfs.instant.pool.record import SESSION_KEY
from xbfs_engine.source.xapi.ledger import Item, Kind, RunLedger
from xbfs_engine.source.xapi.markers import Marker, import_name

if TYPE_CHECKING:
    from xbfs.instant.pool.record import Journal

_NUMBER = 1


def working_name(sr_uuid: str, name: str) -> str:
    """Of the VM until it is complete: alone in the world by the SR's uuid."""
    return import_name(sr_uuid, _NUMBER, name)


@dataclass(frozen=True, slots=True)
class _SessionMarker(Marker):
    def to_other_config(self) -> dict[str, str]:
        return {SESSION_KEY: self.run}


class SessionLedger(RunLedger):
    """Notes the one VM of a session in its journal. What it writes on the pool is no mark of a run to any sweep: the
    uuid of an SR stands where the id of a run would."""

    def __init__(self, journal: Journal, node: str) -> None:
        self._journal = journal
        self._name = node
        self._item: Item | None = None

    @property
    def run(self) -> str:
        """The SR's uuid."""
        return self._journal.record.sr_uuid

    @property
    def node(self) -> str:
        """This machine."""
        return self._name

    @property
    def items(self) -> list[Item]:
        """The VM, if it is or may be there."""
        return [] if self._item is None else [self._item]

    def marker(self, item: Item, *, uuid: str = "", slot: str = "") -> Marker:
        """What is put into other_config of the VM while it is made."""
        return _SessionMarker(self.run, self.node, item.number, item.kind.value, item.vm_uuid, "", uuid, slot)

    async def intend(self, kind: Kind, *, vm_uuid: str = "", uuid: str = "", **about: str) -> Item:
        """The journal knows the VM's name already."""
        self._item = Item(_NUMBER, kind, 0, vm_uuid, about, uuid)
        assert import_name(self.run, _NUMBER, about["name"]) == self._journal.record.working_name
        return self._item

    async def made(self, item: Item, uuid: str) -> Item:
        """Its uuid is known."""
        await self._journal.note_vm(uuid)
        self._item = replace(item, uuid=uuid)
        return self._item

    async def gone(self, item: Item) -> None:
        """It is not there (any more)."""
        await self._journal.note_vm("")
        self._item = None
