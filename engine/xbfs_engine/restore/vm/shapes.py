"""Records for the calls that create a VM and its parts, out of what a restore point remembers of them. Pure.

What they may hold is told by the published object model; that VM.create wants nearly all of it, by xen-api and Xen
Orchestra. A point's records are only passed on, but for what would tie the new VM to the old one's place or identity.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from xbfs_engine.core.errors import WireError
from xbfs_engine.restore.vm.ova import MAC_SEED
from xbfs_engine.source.xapi.markers import PREFIX
from xbfs_engine.source.xapi.values import NULL_REF

if TYPE_CHECKING:
    from collections.abc import Mapping

    from xbfs_engine.codec.wire import Value
    from xbfs_engine.restore.vm.plan import VifPlan
    from xbfs_engine.source.xapi.session import Ref, XapiValue
    from xbfs_engine.source.xapi.vm_record import Plain

_VM: Final = (
    *("name_description", "user_version", "tags", "recommendations", "PCI_bus", "platform", "xenstore_data"),
    *("memory_static_min", "memory_dynamic_min", "memory_dynamic_max", "memory_static_max"),
    *("VCPUs_params", "VCPUs_max", "VCPUs_at_startup"),
    *("actions_after_shutdown", "actions_after_reboot", "actions_after_crash", "actions_after_softreboot"),
    *("PV_bootloader", "PV_kernel", "PV_ramdisk", "PV_args", "PV_bootloader_args", "PV_legacy_args"),
    *("HVM_boot_policy", "HVM_boot_params", "NVRAM", "domain_type", "hardware_platform_version", "has_vendor_device"),
    *("ha_restart_priority", "start_delay", "shutdown_delay", "order", "reference_label", "other_config"),
)
_VBD: Final = ("bootable", "mode", "type", "unpluggable", "qos_algorithm_type", "qos_algorithm_params")
_VIF: Final = (
    *("device", "MTU", "other_config", "qos_algorithm_type", "qos_algorithm_params"),
    *("locking_mode", "ipv4_allowed", "ipv6_allowed"),
)
_SHADOW: Final = "HVM_shadow_multiplier"


def vm_fields(vm: Plain, *, keep_identity: bool) -> dict[str, XapiValue]:
    """For VM.create, without name and blocked operations. Raises WireError."""
    found = _taken(vm, _VM, "VM")
    other_config = texts_of(vm, "other_config")
    dropped = () if keep_identity else (MAC_SEED,)
    found |= {
        "is_a_template": False,
        "affinity": NULL_REF,
        "ha_always_run": False,
        "other_config": {
            key: value for key, value in other_config.items() if key not in dropped and not key.startswith(PREFIX)
        },
    }
    if keep_identity and isinstance(vm.get("generation_id"), str):
        found |= _taken(vm, ("generation_id",), "VM")
    shadow = vm.get(_SHADOW, "1.0")
    # Floats without decimals are mishandled by some releases (Xen Orchestra, XenServer 7.2).
    if str(shadow) not in {"1.0", "1"}:
        try:
            found[_SHADOW] = float(str(shadow))
        except ValueError as exc:
            raise WireError(f"the restore point's VM has no usable {_SHADOW}") from exc
    return found


def vbd_fields(vbd: Plain, vm: Ref, vdi: Ref | None, userdevice: str) -> dict[str, XapiValue]:
    """For VBD.create; ``vdi`` None: an empty drive. Raises WireError."""
    known: dict[str, XapiValue] = {
        "bootable": userdevice == "0",
        "mode": "RW",
        "type": "Disk",
        "unpluggable": True,
        "qos_algorithm_type": "",
        "qos_algorithm_params": {},
    }
    known |= _taken(vbd, _VBD, "VBD")
    own: dict[str, XapiValue] = {
        "VM": vm,
        "VDI": NULL_REF if vdi is None else vdi,
        "empty": vdi is None,
        "userdevice": userdevice,
        "other_config": {},
    }
    return known | own


def vif_fields(plan: VifPlan, vm: Ref, *, keep_mac: bool) -> dict[str, XapiValue]:
    """For VIF.create; without its MAC the pool chooses one. Raises WireError."""
    mac = plan.vif.get("MAC")
    return _taken(plan.vif, _VIF, "VIF") | {
        "VM": vm,
        "network": plan.network.ref,
        "MAC": mac if keep_mac and isinstance(mac, str) else "",
    }


def texts_of(record: Mapping[str, XapiValue] | Plain, name: str) -> dict[str, str]:
    """A field that maps text to text; empty where there is none. Raises WireError."""
    value = record.get(name, {})
    if isinstance(value, dict):
        found = {key: item for key, item in value.items() if isinstance(item, str)}
        if len(found) == len(value):
            return found
    raise WireError(f"the restore point has no usable {name}")


def _taken(record: Plain, names: tuple[str, ...], cls: str) -> dict[str, XapiValue]:
    return {name: _value(record[name], f"{cls}.{name}") for name in names if name in record}


def _value(value: Value, what: str) -> XapiValue:
    match value:
        case str() | bool() | int():
            return value
        case list():
            return [_value(item, what) for item in value]
        case dict():
            return {key: _value(item, what) for key, item in value.items()}
        case _:
            raise WireError(f"the restore point's {what} is nothing that XAPI knows")
