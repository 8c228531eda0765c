"""A pool in memory for tests of the backup cycle: VMs, VDIs with content, changed-block logs, faults, a diary of calls.

Objects have every published field (the simulator's object model); integers travel as strings, as in XML-RPC.
"""

from __future__ import annotations

import base64
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import trio

from tests.support.engine import MemorySource
from tools.xensim.db import Database
from tools.xensim.failures import Failure
from xbfs_engine.core.errors import PoolUnreachable, SourceUnreadable
from xbfs_engine.core.limits import CBT_BLOCK_SIZE, MIB
from xbfs_engine.formats.vhd_stream import AllocatedBlocks
from xbfs_engine.source.xapi.failures import failure

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from xbfs_engine.ingest.vm.reading import Wanted

NULL = "OpaqueRef:NULL"
VDI_BLOCK = 2 * MIB


@dataclass
class Fault:
    """The ``nth`` call of ``method`` (1 is the next one; 0: every one) fails with ``code``; ``after`` its effect."""

    method: str
    code: str
    params: tuple[str, ...] = ()
    nth: int = 1
    after: bool = False


@dataclass
class Log:
    """A changed-block log as SM keeps it: what changed since the snapshot before."""

    blocks: set[int] = field(default_factory=set)
    child: str = NULL


class FakePool:
    """Implements Xapi. ``diary``: the mutating calls in order, as "VM.snapshot"."""

    name = "lab"
    originator = "xbfs/test"

    def __init__(self, *, takes_ignore_vdis: bool = True, licensed: bool = True) -> None:
        self.db = Database()
        self.takes_ignore_vdis = takes_ignore_vdis
        self.licensed = licensed
        self.content: dict[str, bytearray] = {}
        self.logs: dict[str, Log] = {}
        self.faults: list[Fault] = []
        self.diary: list[tuple[str, tuple[Any, ...]]] = []
        self.calls = 0
        self.before_call: Callable[[int, str], Awaitable[None]] | None = None
        host = self.db.create("host", name_label="host1", address="10.0.0.1", hostname="host1")
        restrictions = {"restrict_cbt": "false"}
        self.pool = self.db.create("pool", name_label="lab", master=host, restrictions=restrictions, other_config={})
        self.host = host
        dom0 = {"is_control_domain": True, "resident_on": host, "power_state": "Running"}
        self.dom0 = self.db.create("VM", name_label="dom0", **dom0)
        self.db.create("SM", type="nfs", features={"VDI_CONFIG_CBT": "1", "VDI_SNAPSHOT": "1"}, name_label="NFS")
        self.sr = self.db.create(
            "SR",
            name_label="nfs",
            type="nfs",
            content_type="user",
            physical_size=1 << 44,
            allowed_operations=["vdi_enable_cbt", "vdi_snapshot", "vdi_destroy", "vdi_create"],
        )
        self.db.create("PBD", SR=self.sr, host=host, currently_attached=True)
        self.db.create("network", name_label="nbd", purpose=["nbd"], bridge="xenbr0")

    # what a test builds

    def vm(self, name: str, **fields: Any) -> str:
        return self.db.create(
            "VM", **{"name_label": name, "power_state": "Running", "resident_on": self.host, **fields}
        )

    def disk(self, vm: str, number: int, size_bytes: int = 4 * MIB, content: bytes = b"", **fields: Any) -> str:
        vdi = self.db.create(
            "VDI",
            **{
                "name_label": f"disk {number}",
                "SR": self.sr,
                "virtual_size": size_bytes,
                "type": "user",
                "managed": True,
                "on_boot": "persist",
                "sm_config": {"vdi_type": "vhd"},
                **fields,
            },
        )
        self.content[vdi] = bytearray(size_bytes)
        self.content[vdi][: len(content)] = content
        self.vbd(vm, vdi, number)
        return vdi

    def vbd(self, vm: str, vdi: str, number: int | str, **fields: Any) -> str:
        return self.db.create(
            "VBD", **{"VM": vm, "VDI": vdi, "userdevice": str(number), "type": "Disk", "mode": "RW", **fields}
        )

    def write(self, vdi: str, offset: int, data: bytes) -> None:
        """Write like the guest."""
        self.content[vdi][offset : offset + len(data)] = data
        if vdi in self.logs:
            last = (offset + len(data) - 1) // CBT_BLOCK_SIZE
            self.logs[vdi].blocks.update(range(offset // CBT_BLOCK_SIZE, last + 1))

    def grow(self, vdi: str, size_bytes: int) -> None:
        self.content[vdi].extend(bytes(size_bytes - len(self.content[vdi])))
        self.db.set(vdi, virtual_size=size_bytes)

    def revert(self, vm: str) -> None:
        """Disks get new VDIs with the same content and no log, as VM.revert makes them."""
        for vbd in self.db.refs(vm, "VBDs"):
            old = self.db.text(vbd, "VDI")
            fields = {k: v for k, v in self.db.get(old).items() if k in {"name_label", "SR", "virtual_size", "type"}}
            new = self.db.create("VDI", **fields, managed=True, on_boot="persist", sm_config={"vdi_type": "vhd"})
            self.content[new] = bytearray(self.content[old])
            self.db.set(vbd, VDI=new)
            self._drop(old)

    def uuid(self, ref: str) -> str:
        return self.db.text(ref, "uuid")

    def methods(self) -> list[str]:
        return [method for method, _ in self.diary]

    def leftovers(self) -> list[str]:
        """What a finished run must not leave: snapshots, blocked operations, VBDs of dom0."""
        found = [f"VM {self.db.text(r, 'name_label')}" for r in self.db.where("VM", is_a_snapshot=True)]
        found += [f"VDI {self.uuid(r)}" for r in self.snapshot_vdis() if self.db.text(r, "type") != "cbt_metadata"]
        found += [f"blocked {self.db.text(r, 'name_label')}" for r in self.db.all("VM") if self.blocked(r)]
        return found + [f"VBD {r}" for r in self.db.refs(self.dom0, "VBDs")]

    def snapshot_vdis(self) -> list[str]:
        return self.db.where("VDI", is_a_snapshot=True)

    def blocked(self, vm: str) -> dict[str, str]:
        return self.db.mapping(vm, "blocked_operations")

    # Xapi

    async def call(self, method: str, *arguments: Any, timeout_s: float = 60.0) -> Any:
        del timeout_s
        self.calls += 1
        if self.before_call is not None:
            await self.before_call(self.calls, method)
        await trio.lowlevel.checkpoint()
        fault = self._fault(method)
        if fault is not None and not fault.after:
            raise _error(method, fault.code, fault.params)
        cls, _, name = method.partition(".")
        reads = name.startswith("get_") or name == "list_changed_blocks"
        if not reads:
            self.diary.append((method, arguments))
        try:
            handler = getattr(self, f"{cls}_{name}", None)
            result = handler(*arguments) if handler else self._generic(cls, name, *arguments)
        except Failure as exc:
            raise _error(method, exc.code, exc.params) from None
        if fault is not None:
            raise _error(method, fault.code, fault.params)
        return _as_wire(result)

    async def run_task(
        self, method: str, *arguments: Any, timeout_s: float, progress: Callable[[float], None] | None = None
    ) -> str:
        del progress
        result = await self.call(method, *arguments, timeout_s=timeout_s)
        return result if isinstance(result, str) else ""

    async def records(self, cls: str) -> dict[str, dict[str, Any]]:
        found: dict[str, dict[str, Any]] = await self.call(f"{cls}.get_all_records")
        return found

    def _fault(self, method: str) -> Fault | None:
        for fault in self.faults:
            if fault.method == method:
                if fault.nth == 0:
                    return fault
                fault.nth -= 1
                if fault.nth == 0:
                    self.faults.remove(fault)
                    return fault
        return None

    def _generic(self, cls: str, name: str, *arguments: Any) -> Any:
        if name == "get_all_records":
            return {ref: self.db.get(ref) for ref in self.db.all(cls)}
        if name == "get_all":
            return self.db.all(cls)
        if name == "get_by_uuid":
            return self.db.by_uuid(cls, arguments[0])
        if name == "get_by_name_label":
            return self.db.where(cls, name_label=arguments[0])
        ref = self.db.check(cls, arguments[0])
        if name == "get_record":
            return self.db.get(ref)
        verb, _, key = name.partition("_")
        if verb == "get":
            return self.db.field(ref, key)
        if verb == "set":
            return self.db.set(ref, **{key: arguments[1]})
        if name.startswith("add_to_"):
            key = name.removeprefix("add_to_")
            mapping = self.db.mapping(ref, key)
            if arguments[1] in mapping:
                raise Failure("MAP_DUPLICATE_KEY", cls, key, ref, arguments[1])
            return self.db.set(ref, **{key: {**mapping, arguments[1]: arguments[2]}})
        if name.startswith("remove_from_"):
            key = name.removeprefix("remove_from_")
            return self.db.set(ref, **{key: {k: v for k, v in self.db.mapping(ref, key).items() if k != arguments[1]}})
        raise Failure("MESSAGE_METHOD_UNKNOWN", f"{cls}.{name}")

    def VM_snapshot(self, vm: str, name: str, *ignored: Any) -> str:
        if bool(ignored) != self.takes_ignore_vdis:
            raise Failure("MESSAGE_PARAMETER_COUNT_MISMATCH", "VM.snapshot", "2", "3")
        ignore = ignored[0] if ignored else []
        pairs = [
            (vbd, self.db.text(vbd, "VDI"))
            for vbd in self.db.refs(vm, "VBDs")
            if self.db.text(vbd, "type") == "Disk" and self.db.text(vbd, "VDI") not in {NULL, *ignore}
        ]
        for _, vdi in pairs:
            if self.db.flag(vdi, "sharable"):
                raise Failure("VDI_IS_SHARABLE", vdi)
            if self.db.text(vdi, "on_boot") == "reset":
                raise Failure("VDI_ON_BOOT_MODE_INCOMPATIBLE_WITH_OPERATION")
        snapshot = self.db.create(
            "VM",
            name_label=name,
            is_a_snapshot=True,
            is_a_template=True,
            snapshot_of=vm,
            power_state="Halted",
            other_config=self.db.mapping(vm, "other_config"),
        )
        for vbd, vdi in pairs:
            self.vbd(snapshot, self._snapshot_vdi(vdi), self.db.text(vbd, "userdevice"))
        return snapshot

    def _snapshot_vdi(self, vdi: str) -> str:
        kept = {"name_label", "SR", "virtual_size", "type", "cbt_enabled", "other_config", "managed", "sm_config"}
        fields = {key: value for key, value in self.db.get(vdi).items() if key in kept}
        snapshot = self.db.create("VDI", **fields, is_a_snapshot=True, snapshot_of=vdi)
        self.content[snapshot] = bytearray(self.content[vdi])
        if vdi in self.logs:
            # SM renames the VDI's log to the snapshot's and begins a new one.
            self.logs[snapshot] = self.logs[vdi]
            for log in self.logs.values():
                if log.child == vdi:
                    log.child = snapshot
            self.logs[snapshot].child = vdi
            self.logs[vdi] = Log()
        return snapshot

    def VM_destroy(self, vm: str) -> None:
        for vbd in self.db.refs(self.db.check("VM", vm), "VBDs"):
            self.db.destroy(vbd)
        self.db.destroy(vm)

    def VBD_destroy(self, vbd: str) -> None:
        self.db.destroy(self.db.check("VBD", vbd))

    def VBD_unplug_force(self, vbd: str) -> None:
        self.db.set(self.db.check("VBD", vbd), currently_attached=False)

    def VDI_enable_cbt(self, vdi: str) -> None:
        if not self.licensed:
            raise Failure("LICENCE_RESTRICTION", "CBT")
        if not self.db.flag(vdi, "cbt_enabled"):
            self.logs[vdi] = Log()
            self.db.set(vdi, cbt_enabled=True)

    def VDI_disable_cbt(self, vdi: str) -> None:
        self.logs.pop(vdi, None)
        for log in self.logs.values():
            if log.child == vdi:
                log.child = NULL
        self.db.set(vdi, cbt_enabled=False)

    def VDI_list_changed_blocks(self, vdi_from: str, vdi_to: str) -> str:
        for vdi in (vdi_from, vdi_to):
            self.db.check("VDI", vdi)
            if not self.db.flag(vdi, "cbt_enabled"):
                raise Failure("VDI_NO_CBT_METADATA", vdi)
        blocks: set[int] = set()
        at = vdi_from
        while at != vdi_to:
            at = self.logs[at].child if at in self.logs else NULL
            if at not in self.logs:
                raise Failure("SR_BACKEND_FAILURE_460", "", "Source and target VDI are unrelated", "")
            blocks |= self.logs[at].blocks
        count = -(-self.db.number(vdi_to, "virtual_size") // CBT_BLOCK_SIZE)
        bitmap = bytearray(-(-count // 8))
        for block in blocks:
            bitmap[block // 8] |= 0x80 >> (block % 8)
        return base64.b64encode(bitmap).decode()

    def VDI_data_destroy(self, vdi: str) -> None:
        if self.db.text(vdi, "type") == "cbt_metadata":
            return
        if not self.db.flag(vdi, "cbt_enabled"):
            raise Failure("VDI_NO_CBT_METADATA", vdi)
        if self.db.refs(vdi, "VBDs"):
            raise Failure("VDI_IN_USE", vdi, "data_destroy")
        self.content.pop(vdi)
        self.db.set(vdi, type="cbt_metadata")

    def VDI_destroy(self, vdi: str) -> None:
        if self.db.refs(self.db.check("VDI", vdi), "VBDs"):
            raise Failure("VDI_IN_USE", vdi, "destroy")
        self._drop(vdi)

    def _drop(self, vdi: str) -> None:
        log = self.logs.pop(vdi, None)
        if log is not None:
            if log.child in self.logs:
                self.logs[log.child].blocks |= log.blocks
            for parent in self.logs.values():
                if parent.child == vdi:
                    parent.child = log.child
        self.content.pop(vdi, None)
        self.db.destroy(vdi)


class FakeAccess:
    """DiskAccess over a FakePool's content. ``nbd_fails``: reads over NBD break."""

    def __init__(self, pool: FakePool, *, nbd: bool = True) -> None:
        self.pool = pool
        self.nbd_offered = nbd
        self.nbd_error: Exception | None = None
        self.allocation_error: Exception | None = None
        self.sources: list[tuple[str, str, MemorySource]] = []
        self.opened = 0

    async def has_nbd(self, vdi_ref: str) -> bool:
        self.pool.db.check("VDI", vdi_ref)
        return self.nbd_offered

    @asynccontextmanager
    async def nbd(self, disk: Wanted) -> AsyncIterator[MemorySource]:
        if self.nbd_error is not None:
            raise self.nbd_error
        yield self._open("nbd", disk)

    @asynccontextmanager
    async def stream(self, disk: Wanted) -> AsyncIterator[MemorySource]:
        yield self._open("stream", disk)

    async def allocation(self, vdi_ref: str, size_bytes: int) -> AllocatedBlocks:
        if self.allocation_error is not None:
            raise self.allocation_error
        content = self.pool.content[vdi_ref]
        bits = "".join(
            "1" if any(content[at : at + VDI_BLOCK]) else "0" for at in range(0, size_bytes, VDI_BLOCK)
        ).ljust(-(-size_bytes // VDI_BLOCK // 8) * 8, "0")
        return AllocatedBlocks(size_bytes, VDI_BLOCK, int(bits, 2).to_bytes(len(bits) // 8) if bits else b"")

    def _open(self, way: str, disk: Wanted) -> MemorySource:
        self.opened += 1
        if disk.vdi_ref not in self.pool.content:
            raise SourceUnreadable("no data")
        source = MemorySource.of(self.pool.content[disk.vdi_ref])
        self.sources.append((way, disk.vdi_ref, source))
        return source


def _error(method: str, code: str, params: tuple[str, ...]) -> Exception:
    if code == "UNREACHABLE":
        return PoolUnreachable(f"{method}: the connection broke")
    return failure(method, [code, *params])


def _as_wire(value: Any) -> Any:
    if isinstance(value, bool) or value is None:
        return "" if value is None else value
    if isinstance(value, int):
        return str(value)
    if isinstance(value, dict):
        return {key: _as_wire(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_as_wire(item) for item in value]
    return value
