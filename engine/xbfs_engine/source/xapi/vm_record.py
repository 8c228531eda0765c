"""What is remembered of a VM beside its disks, so that it can be made again: as ``RestorePoint.vm`` holds it.

Two forms side by side: the archive of ``export_metadata``, which XAPI imports by itself and which holds the state of
vTPMs, and records of VM, VBDs, VDIs, VIFs, networks, VTPMs and SRs, for what the archive can not do. Records are as
XAPI gives them, but: references, which mean nothing later, are left out and nesting or uuids stand for them; integers
stay the strings that XML-RPC has; floats and times become text; what only tells of the moment is left out.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final, NamedTuple, TypeAlias

from xbfs_engine.codec.wire import Record
from xbfs_engine.core.errors import PoolError, XapiFailure
from xbfs_engine.core.limits import DISKS_PER_POINT_MAX, KIB, MIB
from xbfs_engine.source.xapi.failures import Handling, handling_of
from xbfs_engine.source.xapi.fields import Fields
from xbfs_engine.source.xapi.markers import PREFIX, run_of_reason

if TYPE_CHECKING:
    from collections.abc import Mapping

    from xbfs_engine.codec.wire import Value
    from xbfs_engine.source.xapi.session import Xapi
    from xbfs_engine.source.xapi.values import Ref, XapiValue

Plain: TypeAlias = "dict[str, Value]"
"""Fields of one object: text, truth values, lists and maps of them."""

ARCHIVE_KEY: Final = "archive"
RECORD_KEY: Final = "record"
"""Where the two forms lie in ``RestorePoint.vm``."""

ARCHIVE_SIZE_MAX: Final = 16 * MIB
"""An archive has some 100 KiB; a manifest at most 64 MiB (``limits.OBJECT_SIZE_MAX``)."""

_VERSION: Final = 1
_FIELD_SIZE_MAX: Final = 512 * KIB
"""Characters of one field with all it holds; UEFI variables, the largest, have at most 128 KiB (varstored)."""

_DEVICES_MAX: Final = 64
"""VIFs, VTPMs or notes: XAPI allows 16 VIFs and one VTPM."""

_DEPTH_MAX: Final = 4
_REF: Final = "OpaqueRef:"
_OF_THE_MOMENT: Final = frozenset(
    {
        *("allowed_operations", "current_operations", "runtime_properties", "status_code", "status_detail"),
        *("last_booted_record", "requires_reboot", "storage_lock", "pending_guidances", "pending_guidances_full"),
        *("pending_guidances_recommended", "qos_supported_algorithms", "domid", "memory_target"),
    }
)
_DEVICES: Final = (("VGPUs", "vGPU"), ("VUSBs", "USB device"), ("attached_PCIs", "PCI device"))


class DiskShape(NamedTuple):
    """A VBD and the VDI in it; ``sr_uuid`` is empty without one."""

    vbd: Plain
    vdi: Plain | None
    sr_uuid: str


class VifShape(NamedTuple):
    """A VIF and its network; ``vlan``: the VLAN's number, -1 for none."""

    vif: Plain
    network: Plain
    vlan: str


@dataclass(frozen=True, slots=True)
class VmRecord:
    """What is known of a VM. ``srs``: by uuid. ``guest``: what its agent told of the system in it.

    ``notes``: what it had and a restore can not give it back. ``archive``: of export_metadata.
    """

    vm: Plain
    disks: tuple[DiskShape, ...]
    vifs: tuple[VifShape, ...]
    vtpms: tuple[Plain, ...]
    srs: Mapping[str, Plain]
    host: Plain
    pool: Plain
    guest: Plain
    notes: tuple[str, ...]
    archive: bytes | None = field(repr=False)

    def to_fields(self) -> dict[str, Value]:
        """As fields of ``RestorePoint.vm``."""
        record: dict[str, Value] = {
            "version": _VERSION,
            "vm": self.vm,
            "disks": [{"vbd": disk.vbd, "vdi": disk.vdi, "sr": disk.sr_uuid} for disk in self.disks],
            "vifs": [{"vif": shape.vif, "network": shape.network, "vlan": shape.vlan} for shape in self.vifs],
            "vtpms": [{"vtpm": vtpm} for vtpm in self.vtpms],
            "srs": dict(self.srs),
            "host": self.host,
            "pool": self.pool,
            "guest": self.guest,
            "notes": [{"text": note} for note in self.notes],
        }
        return {RECORD_KEY: record} | ({} if self.archive is None else {ARCHIVE_KEY: self.archive})


def vm_record_of(vm: Mapping[str, Value]) -> VmRecord:
    """Decode what ``to_fields`` gave; other fields of ``vm`` are others'. Raises WireError, FormatTooNew."""
    outer = Record({key: vm[key] for key in (RECORD_KEY, ARCHIVE_KEY) if key in vm}, "VM record")
    record = outer.record(RECORD_KEY)
    record.version(_VERSION)
    disks, vifs, vtpms, notes = [], [], [], []
    for item in record.records("disks", DISKS_PER_POINT_MAX):
        vdi = item.mapping("vdi") if item.optional("vdi") else None
        disks.append(DiskShape(item.mapping("vbd"), vdi, item.text("sr", 64)))
        item.done()
    for item in record.records("vifs", _DEVICES_MAX):
        vifs.append(VifShape(item.mapping("vif"), item.mapping("network"), item.text("vlan", 24)))
        item.done()
    for item in record.records("vtpms", _DEVICES_MAX):
        vtpms.append(item.mapping("vtpm"))
        item.done()
    for item in record.records("notes", _DEVICES_MAX):
        notes.append(item.text("text"))
        item.done()
    srs = record.record("srs")
    uuids = {disk.sr_uuid for disk in disks if disk.sr_uuid}
    found = VmRecord(
        vm=record.mapping("vm"),
        disks=tuple(disks),
        vifs=tuple(vifs),
        vtpms=tuple(vtpms),
        srs={uuid: srs.mapping(uuid) for uuid in sorted(uuids)},
        host=record.mapping("host"),
        pool=record.mapping("pool"),
        guest=record.mapping("guest"),
        notes=tuple(notes),
        archive=outer.raw(ARCHIVE_KEY, size_max=ARCHIVE_SIZE_MAX) if outer.optional(ARCHIVE_KEY) else None,
    )
    srs.done()
    record.done()
    return found


async def capture_vm(xapi: Xapi, vm_ref: Ref, archive: bytes | None) -> VmRecord:
    """Read what the pool knows of a VM. ``archive``: of export_metadata, None where there is none.

    Raises PoolError; objects that vanish meanwhile are noted.
    """
    return await _Capture(xapi).vm(vm_ref, archive)


class _Capture:
    """One capture: keeps its notes, and what was read once."""

    def __init__(self, xapi: Xapi) -> None:
        self._xapi = xapi
        self._notes: list[str] = []
        self._srs: dict[Ref, tuple[str, Plain]] = {}

    async def vm(self, ref: Ref, archive: bytes | None) -> VmRecord:
        fields, record = await self._required("VM", ref)
        disks = [await self._disk(vbd) for vbd in fields.texts("VBDs")[:DISKS_PER_POINT_MAX]]
        vifs = [await self._vif(vif) for vif in fields.texts("VIFs")[:_DEVICES_MAX]]
        vtpms = [await self._read("VTPM", vtpm) for vtpm in fields.texts("VTPMs")[:_DEVICES_MAX]]
        for name, what in _DEVICES:
            count = len(fields.texts(name))
            if count:
                self._notes.append(f"{count} {what}{'' if count == 1 else 's'}")
        if archive is not None and len(archive) > ARCHIVE_SIZE_MAX:
            self._notes.append(f"its metadata archive of {len(archive)} bytes is too large to be kept")
            archive = None
        vm = self._plain("VM", record)
        vm["blocked_operations"] = {
            name: reason
            for name, reason in fields.mapping("blocked_operations").items()
            if run_of_reason(reason) is None
        }
        vm["other_config"] = {
            key: value for key, value in fields.mapping("other_config").items() if not key.startswith(PREFIX)
        }
        host, pool = await self._place(fields)
        return VmRecord(
            vm=vm,
            disks=tuple(sorted((disk for disk in disks if disk), key=lambda disk: str(disk.vbd.get("userdevice")))),
            vifs=tuple(sorted((vif for vif in vifs if vif), key=lambda shape: str(shape.vif.get("device")))),
            vtpms=tuple(self._plain("VTPM", found[1]) for found in vtpms if found),
            srs=dict(self._srs.values()),
            host=host,
            pool=pool,
            guest=await self._guest(fields),
            notes=tuple(self._notes[:_DEVICES_MAX]),
            archive=archive,
        )

    async def _disk(self, ref: Ref) -> DiskShape | None:
        found = await self._read("VBD", ref)
        if found is None:
            return None
        vbd, record = found
        vdi_ref = vbd.reference("VDI")
        inside = await self._read("VDI", vdi_ref) if vdi_ref else None
        if inside is None:
            return DiskShape(self._plain("VBD", record), None, "")
        vdi, vdi_record = inside
        sr_uuid = await self._sr(vdi.text("SR"))
        return DiskShape(self._plain("VBD", record), self._plain("VDI", vdi_record), sr_uuid)

    async def _sr(self, ref: Ref) -> str:
        if ref not in self._srs:
            found = await self._read("SR", ref)
            if found is None:
                return ""
            sr = found[0]
            shape: Plain = {name: sr.text(name) for name in ("name_label", "type", "content_type")}
            shape |= {"shared": sr.flag("shared"), "sm_config": dict(sr.mapping("sm_config"))}
            self._srs[ref] = (sr.text("uuid"), shape)
        return self._srs[ref][0]

    async def _vif(self, ref: Ref) -> VifShape | None:
        found = await self._read("VIF", ref)
        if found is None:
            return None
        vif, record = found
        network_ref = vif.reference("network")
        network = await self._read("network", network_ref) if network_ref else None
        if network is None:
            return VifShape(self._plain("VIF", record), {}, "-1")
        vlan = "-1"
        for pif_ref in network[0].texts("PIFs")[:1]:
            pif = await self._read("PIF", pif_ref)
            vlan = str(pif[0].integer("VLAN")) if pif else vlan
        return VifShape(self._plain("VIF", record), self._plain("network", network[1]), vlan)

    async def _place(self, vm: Fields) -> tuple[Plain, Plain]:
        """The host it ran on, or the master; and the pool."""
        pools = [Fields("pool", ref, record) for ref, record in (await self._xapi.records("pool")).items()]
        if len(pools) != 1:
            raise PoolError(f"the host says that it has {len(pools)} pools", hint="is it really a XenServer host?")
        pool = pools[0]
        ref = vm.reference("resident_on") or pool.reference("master")
        found = await self._read("host", ref) if ref else None
        host: Plain = {}
        if found is not None:
            host = {name: found[0].text(name) for name in ("uuid", "name_label")}
            host |= {name: dict(found[0].mapping(name)) for name in ("software_version", "cpu_info")}
        return host, {name: pool.text(name) for name in ("uuid", "name_label")}

    async def _guest(self, vm: Fields) -> Plain:
        ref = vm.reference("guest_metrics")
        found = await self._read("VM_guest_metrics", ref) if ref else None
        if found is None:
            return {}
        return {name: dict(found[0].mapping(name)) for name in ("os_version", "PV_drivers_version")}

    async def _required(self, cls: str, ref: Ref) -> tuple[Fields, Mapping[str, XapiValue]]:
        record = await self._xapi.call(f"{cls}.get_record", ref)
        if not isinstance(record, dict):
            raise PoolError(f"{cls}.get_record: the host's answer is no record", hint="is it really a XenServer host?")
        return Fields(cls, ref, record), record

    async def _read(self, cls: str, ref: Ref) -> tuple[Fields, Mapping[str, XapiValue]] | None:
        """None, with a note, if it vanished or the release does not know the class."""
        try:
            return await self._required(cls, ref)
        except XapiFailure as exc:
            if handling_of(exc) not in {Handling.GONE, Handling.UNSUPPORTED}:
                raise
            self._notes.append(f"a {cls} that could not be read ({exc.code})")
            return None

    def _plain(self, cls: str, record: Mapping[str, XapiValue]) -> Plain:
        found: Plain = {}
        for name, value in record.items():
            if name in _OF_THE_MOMENT or _has_ref(value):
                continue
            plain, size = _as_plain(value, 0)
            if size > _FIELD_SIZE_MAX:
                self._notes.append(f"{cls}.{name[:64]}, which is too long to be kept")
            else:
                found[name] = plain
        return found


def _has_ref(value: XapiValue) -> bool:
    match value:
        case str():
            return value.startswith(_REF)
        case list():
            return any(_has_ref(item) for item in value)
        case dict():
            return any(_has_ref(item) for item in value.values())
        case _:
            return False


def _as_plain(value: XapiValue, depth: int) -> tuple[Value, int]:
    """A value as the repository can hold it, and its size. Raises PoolError."""
    if depth > _DEPTH_MAX:
        raise PoolError("a record of the pool is nested too deeply", hint="is it really a XenServer host?")
    match value:
        case str():
            return value, len(value)
        case bool():
            return value, 1
        case float():
            return repr(value), 24
        case int():
            return str(value), 24
        case datetime():
            return value.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"), 20
        case list():
            items = [_as_plain(item, depth + 1) for item in value]
            return [item for item, _ in items], sum(size + 8 for _, size in items)
        case dict():
            pairs = {key: _as_plain(item, depth + 1) for key, item in value.items()}
            return {key: item for key, (item, _) in pairs.items()}, sum(
                len(key) + size + 8 for key, (_, size) in pairs.items()
            )
