"""An Xapi in memory: records of the published object model, the calls that tidy up, faults. No disks, no time."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import trio

from tools.xensim.db import Database
from tools.xensim.failures import Failure
from xbfs_engine.core.errors import PoolUnreachable
from xbfs_engine.source.xapi.failures import failure

if TYPE_CHECKING:
    from collections.abc import Callable

NULL = "OpaqueRef:NULL"
GIB = 1 << 30


class FakeXapi:
    """A pool of one host with one SR of each common kind. ``diary``: the calls that change something.

    ``faults``: by method, the codes that its next calls fail with; ``refused``: by method and object, always.
    ``dies_at``: the number of the call from which on connections break, or at which ``on_death`` is cancelled.
    """

    name = "lab"

    def __init__(self, node: str = "node") -> None:
        self.originator = f"xbfs/{node}"
        self.db = Database()
        self.diary: list[str] = []
        self.faults: dict[str, list[str]] = {}
        self.refused: dict[tuple[str, str], str] = {}
        self.calls = 0
        self.dies_at = 0
        self.on_death: trio.CancelScope | None = None
        self.time = datetime(2026, 9, 21, 14, 13, 20, tzinfo=UTC)
        db = self.db
        self.host = db.create(
            "host",
            name_label="host1",
            address="10.0.0.1",
            hostname="host1",
            enabled=True,
            software_version={"product_version": "8.3.0", "product_brand": "XCP-ng"},
        )
        db.create("pool", name_label="lab", master=self.host, restrictions={"restrict_cbt": "false"})
        self.dom0 = db.create("VM", name_label="dom0", is_control_domain=True, resident_on=self.host)
        features = {"VDI_CONFIG_CBT": 1, "VDI_SNAPSHOT": 1}
        for kind in ("nfs", "lvm"):
            db.create("SM", type=kind, features=features)
        db.create("SM", type="iso", features={})
        self.sr = self.add_sr("nfs")
        self.lvm = self.add_sr("lvm")
        self.iso = self.add_sr("iso", content_type="iso")
        self.network = db.create("network", name_label="storage", bridge="xenbr0", purpose=["nbd"])
        db.create("PIF", host=self.host, network=self.network, currently_attached=True, IP="10.0.0.1")

    # what a test builds

    def add_sr(self, kind: str, **fields: Any) -> str:
        plain = {"content_type": "user", "physical_size": 1000 * GIB, "physical_utilisation": 100 * GIB}
        ref = self.db.create("SR", name_label=kind, type=kind, **(plain | fields))
        self.db.create("PBD", SR=ref, host=self.host, currently_attached=True)
        return ref

    def vm(self, name: str, **fields: Any) -> str:
        return self.db.create("VM", **({"name_label": name, "power_state": "Halted"} | fields))

    def vdi(self, **fields: Any) -> str:
        plain = {"name_label": "disk", "SR": self.sr, "virtual_size": 10 * GIB, "type": "user", "managed": True}
        return self.db.create("VDI", **(plain | {"on_boot": "persist", "sm_config": {"vdi_type": "vhd"}} | fields))

    def vbd(self, vm: str, vdi: str, number: int | str = 0, **fields: Any) -> str:
        return self.db.create(
            "VBD", **({"VM": vm, "VDI": vdi, "userdevice": str(number), "type": "Disk", "mode": "RW"} | fields)
        )

    def uuid(self, ref: str) -> str:
        return self.db.text(ref, "uuid")

    def mark(self, ref: str, pairs: dict[str, str]) -> None:
        self.db.set(ref, other_config=self.db.mapping(ref, "other_config") | pairs)

    def everything(self) -> dict[str, dict[str, Any]]:
        """All objects but the host's own, to be compared."""
        classes = ("VM", "VDI", "VBD", "SR", "PBD", "task")
        return {ref: dict(self.db.get(ref)) for cls in classes for ref in self.db.all(cls)}

    # Xapi

    async def call(self, method: str, *arguments: Any, timeout_s: float = 60.0) -> Any:
        del timeout_s
        await trio.lowlevel.checkpoint()
        self.calls += 1
        if self.calls == self.dies_at and self.on_death is not None:
            self.on_death.cancel()
            await trio.lowlevel.checkpoint()
        if 0 < self.dies_at <= self.calls:
            raise PoolUnreachable(f"call {self.calls}, {method}: broken off")
        cls, _, name = method.partition(".")
        if not name.startswith("get_"):
            self.diary.append(method)
        codes = self.faults.get(method, [])
        code = codes.pop(0) if codes else self.refused.get((method, str(arguments[0]) if arguments else ""), "")
        try:
            if code:
                raise Failure(code, *(str(argument) for argument in arguments[:1]))
            handler = getattr(self, f"{cls}_{name}", None)
            return _as_wire(handler(*arguments) if handler else self._generic(cls, name, *arguments))
        except Failure as exc:
            raise failure(method, exc.description) from None

    async def run_task(
        self, method: str, *arguments: Any, timeout_s: float, progress: Callable[[float], None] | None = None
    ) -> str:
        del progress
        return str(await self.call(method, *arguments, timeout_s=timeout_s))

    async def records(self, cls: str) -> dict[str, dict[str, Any]]:
        found: dict[str, dict[str, Any]] = await self.call(f"{cls}.get_all_records")
        return found

    def _generic(self, cls: str, name: str, *arguments: Any) -> Any:
        if name == "get_all_records":
            return {ref: self.db.get(ref) for ref in self.db.all(cls)}
        if name == "get_by_uuid":
            return self.db.by_uuid(cls, arguments[0])
        ref = self.db.check(cls, arguments[0])
        if name == "get_record":
            return self.db.get(ref)
        if name.startswith("get_") and name.removeprefix("get_") in self.db.get(ref):
            return self.db.field(ref, name.removeprefix("get_"))
        for verb in ("add_to_", "remove_from_"):
            if name.startswith(verb):
                key = name.removeprefix(verb)
                rest = {k: v for k, v in self.db.mapping(ref, key).items() if k != arguments[1]}
                if verb == "add_to_":
                    rest[arguments[1]] = arguments[2]
                return self.db.set(ref, **{key: rest})
        raise Failure("MESSAGE_METHOD_UNKNOWN", f"{cls}.{name}")

    def VM_destroy(self, vm: str) -> None:
        if self.db.text(self.db.check("VM", vm), "power_state") != "Halted":
            raise Failure("VM_BAD_POWER_STATE", vm, "halted", "running")
        for vbd in self.db.refs(vm, "VBDs"):
            self.db.destroy(vbd)
        self.db.destroy(vm)

    def VM_snapshot(self, vm: str, _name: str) -> None:
        self.db.check("VM", vm)
        raise AssertionError("a fake takes no snapshots")

    def VDI_destroy(self, vdi: str) -> None:
        self._unused(vdi, "destroy")
        self.db.destroy(vdi)

    def VDI_data_destroy(self, vdi: str) -> None:
        self._unused(vdi, "data_destroy")
        if not self.db.flag(vdi, "cbt_enabled"):
            raise Failure("VDI_NO_CBT_METADATA", vdi)
        self.db.set(vdi, type="cbt_metadata")

    def VBD_unplug_force(self, vbd: str) -> None:
        self.db.set(self.db.check("VBD", vbd), currently_attached=False)

    def VBD_destroy(self, vbd: str) -> None:
        self.db.destroy(self.db.check("VBD", vbd))

    def PBD_unplug(self, pbd: str) -> None:
        self.db.set(self.db.check("PBD", pbd), currently_attached=False)

    def PBD_destroy(self, pbd: str) -> None:
        self.db.destroy(self.db.check("PBD", pbd))

    def SR_forget(self, sr: str) -> None:
        if self.db.refs(sr, "PBDs"):
            raise Failure("SR_HAS_PBD", sr)
        for vdi in self.db.refs(sr, "VDIs"):
            self.db.destroy(vdi)
        self.db.destroy(sr)

    def task_cancel(self, task: str) -> None:
        self.db.set(self.db.check("task", task), status="cancelled")

    def task_destroy(self, task: str) -> None:
        self.db.destroy(self.db.check("task", task))

    def host_get_servertime(self, _host: str) -> datetime:
        return self.time

    def _unused(self, vdi: str, what: str) -> None:
        """XAPI refuses while any VBD is attached, and data_destroy while any is there at all."""
        for vbd in self.db.refs(self.db.check("VDI", vdi), "VBDs"):
            if what == "data_destroy" or self.db.flag(vbd, "currently_attached"):
                raise Failure("VDI_IN_USE", vdi, what)
        if what == "destroy":
            for vbd in self.db.refs(vdi, "VBDs"):
                self.db.destroy(vbd)


def _as_wire(value: Any) -> Any:
    """Integers are strings in XML-RPC."""
    if isinstance(value, bool):
        return value
    if isinstance(value, int):
        return str(value)
    if isinstance(value, dict):
        return {key: _as_wire(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_as_wire(item) for item in value]
    return "" if value is None else value
