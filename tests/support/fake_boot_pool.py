"""FakeXapi with the calls that boot a VM from a session's SR, and bring it away from there."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tests.support.fake_xapi import NULL, FakeXapi
from tools.xensim.failures import Failure
from xbfs_engine.core.errors import PoolUnreachable
from xbfs_engine.source.xapi.failures import failure

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

CLASSES = ("VM", "VDI", "VBD", "VIF", "SR", "PBD", "network", "task")


class FakeBootPool(FakeXapi):
    """``files``: what the session's share shows, sizes by VDI uuid. ``content``: of VDIs by reference.

    The call with the number ``fails_at`` fails: "before" or "after" its effect, as an error; "lost": its effect is
    there and the connection breaks.
    """

    def __init__(self, files: Mapping[str, int], networks: Sequence[str]) -> None:
        super().__init__()
        self.files = dict(files)
        self.content: dict[str, str] = {}
        self.fails_at = 0
        self.effect = "before"
        self.struck = ""
        self.target = self.add_sr("ext")
        for name in networks:
            self.db.create("network", name_label=name, bridge=f"xenbr-{name}")
        self.stranger = self.vm("stranger")
        self.vbd(self.stranger, self.vdi(name_label="strange"))

    async def call(self, method: str, *arguments: Any, timeout_s: float = 60.0) -> Any:
        strikes = self.fails_at == self.calls + 1
        if strikes:
            self.struck = method
        if strikes and self.effect == "before":
            self.calls += 1
            raise failure(method, ["INTERNAL_ERROR", "a fault"])
        result = await super().call(method, *arguments, timeout_s=timeout_s)
        if strikes:
            if self.effect == "lost":
                raise PoolUnreachable(f"{method}: broken off")
            raise failure(method, ["INTERNAL_ERROR", "a fault"])
        return result

    def everything(self) -> dict[str, dict[str, Any]]:
        return {ref: dict(self.db.get(ref)) for cls in CLASSES for ref in self.db.all(cls)}

    def disks_of(self, vm: str) -> dict[int, str]:
        """VDIs by userdevice."""
        vbds = [vbd for vbd in self.db.refs(vm, "VBDs") if self.db.text(vbd, "type") == "Disk"]
        return {int(self.db.text(vbd, "userdevice")): self.db.text(vbd, "VDI") for vbd in vbds}

    def _generic(self, cls: str, name: str, *arguments: Any) -> Any:
        if name.startswith("set_"):
            return self.db.set(self.db.check(cls, arguments[0]), **{name.removeprefix("set_"): arguments[1]})
        if name.startswith("add_to_") and arguments[1] in self.db.mapping(arguments[0], name.removeprefix("add_to_")):
            raise Failure("MAP_DUPLICATE_KEY", cls, name, arguments[0], arguments[1])
        return super()._generic(cls, name, *arguments)

    def SR_introduce(
        self, uuid: str, name: str, text: str, kind: str, content: str, shared: bool, config: dict[str, str]
    ) -> str:
        assert (kind, content, shared, config) == ("nfs", "user", True, {})
        return self.db.create(
            "SR", uuid=uuid, name_label=name, name_description=text, type=kind, content_type=content, shared=shared
        )

    def SR_scan(self, sr: str) -> None:
        if not any(self.db.flag(pbd, "currently_attached") for pbd in self.db.refs(sr, "PBDs")):
            raise Failure("SR_HAS_NO_PBDS", sr)
        assert {
            key: value for key, value in self.db.mapping(sr, "other_config").items() if value == "false"
        }.keys() == {
            "gc",
            "leaf-coalesce",
            "coalesce",
        }
        known = {self.db.text(vdi, "uuid") for vdi in self.db.refs(sr, "VDIs")}
        for uuid, size in self.files.items():
            if uuid not in known:
                vdi = self.vdi(uuid=uuid, SR=sr, virtual_size=size, name_label="")
                self.content[vdi] = f"of {uuid}"

    def SR_destroy(self, _sr: str) -> None:
        raise AssertionError("SR.destroy deletes files")

    def PBD_create(self, record: dict[str, Any]) -> str:
        assert record["device_config"] == {"server": "10.0.0.9", "serverpath": "/xbfs/s"}
        return self.db.create("PBD", **record)

    def PBD_plug(self, pbd: str) -> None:
        self.db.set(self.db.check("PBD", pbd), currently_attached=True)

    def PBD_unplug(self, pbd: str) -> None:
        for vdi in self.db.refs(self.db.text(self.db.check("PBD", pbd), "SR"), "VDIs"):
            if any(self.db.flag(vbd, "currently_attached") for vbd in self.db.refs(vdi, "VBDs")):
                raise Failure("VDI_IN_USE", vdi)
        super().PBD_unplug(pbd)

    def PBD_destroy(self, pbd: str) -> None:
        if self.db.flag(self.db.check("PBD", pbd), "currently_attached"):
            raise Failure("OPERATION_NOT_ALLOWED", "PBD still attached")
        super().PBD_destroy(pbd)

    def VM_create(self, record: dict[str, Any]) -> str:
        return self.db.create("VM", **{"power_state": "Halted"} | record)

    def VM_set_bios_strings(self, _vm: str, _strings: dict[str, str]) -> None:
        return

    def VBD_create(self, record: dict[str, Any]) -> str:
        return self.db.create("VBD", **record)

    def VBD_destroy(self, vbd: str) -> None:
        if self.db.flag(self.db.check("VBD", vbd), "currently_attached"):
            raise Failure("OPERATION_NOT_ALLOWED", "VBD still attached")
        super().VBD_destroy(vbd)

    def VIF_create(self, record: dict[str, Any]) -> str:
        return self.db.create("VIF", **record)

    def network_create(self, record: dict[str, Any]) -> str:
        return self.db.create("network", **record, bridge=f"xapi{len(self.db.all('network'))}")

    def network_destroy(self, network: str) -> None:
        assert self.db.refs(self.db.check("network", network), "VIFs") == [], "interfaces of others go with it"
        self.db.destroy(network)

    def VM_start(self, vm: str, _paused: bool, _force: bool) -> None:
        self._turn(vm, "Halted", "Running", on=True)

    def VM_hard_shutdown(self, vm: str) -> None:
        self._turn(vm, "Running", "Halted", on=False)

    def VM_destroy(self, vm: str) -> None:
        vifs = self.db.refs(self.db.check("VM", vm), "VIFs")
        super().VM_destroy(vm)
        for vif in vifs:
            self.db.destroy(vif)

    def VDI_create(self, record: dict[str, Any]) -> str:
        vdi = self.db.create("VDI", **record, managed=True, on_boot="persist")
        self.content[vdi] = "empty"
        return vdi

    def VDI_destroy(self, vdi: str) -> None:
        assert self.db.text(self.db.text(self.db.check("VDI", vdi), "SR"), "uuid") not in self.files
        assert self.db.text(vdi, "uuid") not in self.files, "a disk of the session is never destroyed by us"
        super().VDI_destroy(vdi)

    def VDI_copy(self, vdi: str, sr: str, base: str, into: str) -> str:
        assert (sr, base) == (NULL, NULL)
        self.content[into] = self.content[self.db.check("VDI", vdi)]
        return into

    def VDI_disable_cbt(self, vdi: str) -> None:
        self.db.set(self.db.check("VDI", vdi), cbt_enabled=False)

    def VDI_pool_migrate(self, vdi: str, sr: str, options: dict[str, str]) -> str:
        assert options == {}
        if self.db.flag(self.db.check("VDI", vdi), "cbt_enabled"):
            raise Failure("VDI_CBT_ENABLED", vdi)
        vbds = self.db.refs(vdi, "VBDs")
        if not any(self.db.flag(vbd, "currently_attached") for vbd in vbds):
            raise Failure("VDI_NEEDS_VM_FOR_MIGRATE", vdi)
        new = self.vdi(SR=sr, virtual_size=self.db.number(vdi, "virtual_size"))
        self.content[new] = self.content.pop(vdi)
        for vbd in vbds:
            self.db.set(vbd, VDI=new)
        self.db.destroy(vdi)
        return new

    def _turn(self, vm: str, before: str, after: str, *, on: bool) -> None:
        state = self.db.text(self.db.check("VM", vm), "power_state")
        if state != before:
            raise Failure("VM_BAD_POWER_STATE", vm, before.lower(), state.lower())
        self.db.set(vm, power_state=after, resident_on=self.host if on else NULL)
        for vbd in self.db.refs(vm, "VBDs"):
            self.db.set(vbd, currently_attached=on and self.db.text(vbd, "VDI") != NULL)
