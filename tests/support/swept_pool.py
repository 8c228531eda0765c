"""A pool and the ledgers of a node, with what runs that died at any point left on it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tests.support.fake_xapi import NULL, FakeXapi
from tests.support.runtime import FixedClock, SeededRandom
from xbfs_engine.core.runtime import Runtime
from xbfs_engine.source.xapi.ledger import Item, Kind, Ledgers, RunLedger
from xbfs_engine.source.xapi.markers import block_reason, import_name, snapshot_name
from xbfs_engine.source.xapi.sweep import SweepReport, sweep

if TYPE_CHECKING:
    from pathlib import Path

NODE = "node"


class World:
    """A pool and the ledgers of this node for it."""

    def __init__(self, directory: Path, seed: int = 1) -> None:
        self.xapi = FakeXapi(NODE)
        self.clock = FixedClock()
        self.ledgers = Ledgers(directory / "runs", Runtime(self.clock, SeededRandom(seed)))

    async def sweep(self, **options: Any) -> SweepReport:
        return await sweep(self.xapi, self.ledgers, node=NODE, **({"dry_run": False} | options))

    async def open_items(self) -> list[Item]:
        return [item for state in await self.ledgers.runs() for item in state.record.items.values()]

    def guest(self, name: str = "web", **fields: Any) -> tuple[str, str]:
        """A VM with a disk."""
        vm, vdi = self.xapi.vm(name, **fields), self.xapi.vdi(cbt_enabled=True)
        self.xapi.vbd(vm, vdi)
        return vm, vdi

    def snapshot_vdi(self, vdi: str) -> str:
        return self.xapi.vdi(is_a_snapshot=True, snapshot_of=vdi, cbt_enabled=True)

    async def snapshot(self, ledger: RunLedger, vm: str, vdi: str, *, until: str = "end") -> tuple[str, str]:
        """What a cycle makes, as far as ``until``: vm, noted, marked, disk, end."""
        uuid = self.xapi.uuid(vm)
        item = await ledger.intend(Kind.SNAPSHOT, vm_uuid=uuid, name="web")
        snapshot = self.xapi.vm(snapshot_name(ledger.run, item.number, "web"), is_a_snapshot=True, snapshot_of=vm)
        disk = self.snapshot_vdi(vdi)
        self.xapi.vbd(snapshot, disk)
        if until == "vm":
            return snapshot, disk
        await ledger.made(item, self.xapi.uuid(snapshot))
        if until == "noted":
            return snapshot, disk
        self.mark(snapshot, ledger, item)
        if until == "marked":
            return snapshot, disk
        item = await ledger.intend(Kind.VDI, vm_uuid=uuid, uuid=self.xapi.uuid(disk))
        if until != "disk":
            self.mark(disk, ledger, item)
        return snapshot, disk

    async def base(self, ledger: RunLedger, vdi: str, slot: str, *, confirmed: bool = True, **fields: Any) -> str:
        ref = self.xapi.vdi(is_a_snapshot=True, snapshot_of=vdi, cbt_enabled=True, type="cbt_metadata")
        self.xapi.db.set(ref, **fields)
        item = await ledger.keep(await ledger.intend(Kind.VDI, uuid=self.xapi.uuid(ref)), slot)
        self.mark(ref, ledger, item)
        if confirmed:
            await ledger.confirm(item)
        return ref

    async def restored(self, ledger: RunLedger, *, made: bool, **fields: Any) -> tuple[str, str]:
        """A restore that is not complete: a VM and a disk."""
        item = await ledger.intend(Kind.VDI)
        disk = self.xapi.vdi()
        self.mark(disk, ledger, item, own=False)
        item = await ledger.intend(Kind.VM, name="web")
        vm = self.xapi.vm(import_name(ledger.run, item.number, "web"), **fields)
        self.xapi.vbd(vm, disk)
        if made:
            await ledger.made(item, self.xapi.uuid(vm))
        return vm, disk

    async def block(self, ledger: RunLedger, vm: str) -> None:
        await ledger.intend(Kind.BLOCK, vm_uuid=self.xapi.uuid(vm), uuid=self.xapi.uuid(vm))
        self.xapi.db.set(vm, blocked_operations={"pool_migrate": block_reason(ledger.run, ledger.node)})

    def mark(self, ref: str, ledger: RunLedger, item: Item, *, own: bool = True) -> None:
        marker = ledger.marker(item, uuid=self.xapi.uuid(ref) if own else "")
        self.xapi.mark(ref, marker.to_other_config())

    def copy_of(self, ref: str) -> str:
        """What a user's clone of an object is: the same other_config, another uuid."""
        fields = dict(self.xapi.db.get(ref))
        for name in (
            "uuid",
            "VBDs",
            "snapshots",
            "crash_dumps",
            "VIFs",
            "VTPMs",
            "children",
            "consoles",
            "VDIs",
            "PBDs",
        ):
            fields.pop(name, None)
        return self.xapi.db.create(self.xapi.db.cls(ref), **(fields | {"is_a_snapshot": False, "snapshot_of": NULL}))

    def exists(self, *refs: str) -> list[bool]:
        return [self.xapi.db.exists(ref) for ref in refs]
