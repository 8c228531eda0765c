"""What is on a pool: hosts, SRs, VMs, disks and how they hang together, read in a dozen calls. Frozen records.

Who points is read before who is pointed at, so a reference that leads nowhere means an object that was destroyed
meanwhile: it is treated as not there. Reading needs no more than the role read-only. Knows nothing of backups.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Final, NamedTuple

from xbfs_engine.core.errors import PoolError, XapiFailure
from xbfs_engine.source.xapi.failures import Handling, handling_of
from xbfs_engine.source.xapi.fields import Fields

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from xbfs_engine.source.xapi.session import Xapi
    from xbfs_engine.source.xapi.values import Ref, XapiValue

CHAIN_MAX: Final = 30
"""VHDs in one chain, beyond which SM refuses a snapshot (SM, SR_BACKEND_FAILURE_109)."""

CBT_FEATURE: Final = "VDI_CONFIG_CBT"
CBT_OPERATION: Final = "vdi_enable_cbt"
"""SM.features, and SR.allowed_operations; VDI.allowed_operations never lists it (xen-api, xapi_vdi.ml)."""

_THICK: Final = frozenset({"lvm", "lvmoiscsi", "lvmohba", "lvmofcoe"})
_THIN_ALLOCATIONS: Final = frozenset({"thin", "xlvhd"})
_PARENT: Final = "vhd-parent"


class Nbd(Enum):
    """Whether and how hosts of a pool serve disks by NBD (network.purpose)."""

    NONE = "none"
    TLS = "nbd"
    INSECURE = "insecure_nbd"
    BOTH = "both"  # then hosts refuse to serve at all


class Host(NamedTuple):
    """A host of the pool."""

    ref: Ref
    uuid: str
    name: str
    address: str
    enabled: bool
    version: str
    brand: str


class Sr(NamedTuple):
    """A storage repository. ``hosts``: those it is plugged to; ``thick``: a snapshot needs a disk's full size."""

    ref: Ref
    uuid: str
    name: str
    type: str
    content_type: str
    thick: bool
    tracks_changes: bool
    takes_snapshots: bool
    size_bytes: int
    used_bytes: int
    shared: bool
    hosts: tuple[Ref, ...]
    other_config: Mapping[str, str]


class Vdi(NamedTuple):
    """A virtual disk. ``parent_uuid``: of its VHD parent, or empty."""

    ref: Ref
    uuid: str
    name: str
    sr: Ref
    type: str
    size_bytes: int
    managed: bool
    sharable: bool
    reset_on_boot: bool
    is_raw: bool
    is_a_snapshot: bool
    snapshot_of: Ref | None
    cbt_enabled: bool
    parent_uuid: str
    other_config: Mapping[str, str]


class Vbd(NamedTuple):
    """A VM's use of a disk. ``position``: userdevice as XAPI has it, a number for all VMs that ever were attached."""

    ref: Ref
    uuid: str
    vm: Ref
    vdi: Ref | None
    position: str
    type: str
    attached: bool

    @property
    def number(self) -> int | None:
        """The position as a number; None for names (of dom0's devices: "xvda", "autodetect")."""
        text = self.position
        return int(text) if text.isascii() and text.isdigit() and len(text) < 4 else None


class Vm(NamedTuple):
    """A VM, template, snapshot or control domain."""

    ref: Ref
    uuid: str
    name: str
    power_state: str
    is_a_template: bool
    is_a_snapshot: bool
    is_control_domain: bool
    snapshot_of: Ref | None
    resident_on: Ref | None
    tags: tuple[str, ...]
    blocked_operations: Mapping[str, str]
    other_config: Mapping[str, str]


class Chain(NamedTuple):
    """The VHDs that a disk consists of. ``pending``: uuids of those that wait to be coalesced."""

    depth: int
    pending: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Inventory:
    """A pool at one moment; everything by reference."""

    pool_uuid: str
    pool_name: str
    master: Ref | None
    restrictions: Mapping[str, str]
    nbd: Nbd
    nbd_hosts: frozenset[Ref]
    hosts: Mapping[Ref, Host]
    srs: Mapping[Ref, Sr]
    vms: Mapping[Ref, Vm]
    vdis: Mapping[Ref, Vdi]
    vbds: Mapping[Ref, Vbd]
    vdi_of_uuid: Mapping[str, Vdi]
    vbds_of_vm: Mapping[Ref, Sequence[Vbd]]
    vbds_of_vdi: Mapping[Ref, Sequence[Vbd]]
    children: Mapping[str, Sequence[Vdi]]

    def vm_by_uuid(self, uuid: str) -> Vm | None:
        """The VM with this uuid."""
        return next((vm for vm in self.vms.values() if vm.uuid == uuid), None)

    def sr_by_uuid(self, uuid: str) -> Sr | None:
        """The SR with this uuid."""
        return next((sr for sr in self.srs.values() if sr.uuid == uuid), None)

    def disks(self, vm: Vm) -> list[Vbd]:
        """All VBDs of a VM, also empty and CD ones, by position."""
        return sorted(self.vbds_of_vm.get(vm.ref, ()), key=lambda vbd: (vbd.number is None, vbd.number, vbd.position))

    def vdi_of(self, vbd: Vbd) -> Vdi | None:
        """The disk in a VBD, if there is one."""
        return self.vdis.get(vbd.vdi) if vbd.vdi else None

    def snapshots(self, vm: Vm) -> list[Vm]:
        """The VM's snapshots."""
        return [other for other in self.vms.values() if other.is_a_snapshot and other.snapshot_of == vm.ref]

    def chain(self, vdi: Vdi) -> Chain:
        """The chain of a disk. Pending is a VHD that only one other VHD, itself no disk, still needs (Xen Orchestra).

        Such a one is merged into its child by the SR's garbage collector; a disk at the end is merged seldom.
        """
        pending = []
        seen = {vdi.uuid}
        node = self.vdi_of_uuid.get(vdi.parent_uuid)
        while node is not None and node.uuid not in seen:
            seen.add(node.uuid)
            children = self.children.get(node.uuid, ())
            if not node.managed and len(children) == 1 and not children[0].managed:
                pending.append(node.uuid)
            node = self.vdi_of_uuid.get(node.parent_uuid)
        return Chain(len(seen), tuple(pending))

    def pending(self, sr: Sr) -> list[Vdi]:
        """All VHDs of an SR that wait to be coalesced."""
        return [
            vdi
            for vdi in self.vdis.values()
            if vdi.sr == sr.ref
            and not vdi.managed
            and len(children := self.children.get(vdi.uuid, ())) == 1
            and not children[0].managed
        ]


async def take_inventory(xapi: Xapi) -> Inventory:
    """Read a pool. Raises PoolError, also for answers that make no sense."""
    vbds = {ref: _vbd(fields) for ref, fields in (await _all(xapi, "VBD")).items()}
    vms = {ref: _vm(fields) for ref, fields in (await _all(xapi, "VM")).items()}
    vdis = {ref: _vdi(fields) for ref, fields in (await _all(xapi, "VDI")).items()}
    pbds = await _all(xapi, "PBD")
    srs = await _all(xapi, "SR")
    managers = {fields.text("type"): fields for fields in (await _all(xapi, "SM")).values()}
    pifs = await _all(xapi, "PIF")
    networks = await _all(xapi, "network")
    hosts = {ref: _host(fields) for ref, fields in (await _all(xapi, "host")).items()}
    pools = list((await _all(xapi, "pool")).values())
    if len(pools) != 1:
        raise PoolError(f"the host says that it has {len(pools)} pools", hint="is it really a XenServer host?")
    plugged = defaultdict(list)
    for pbd in pbds.values():
        if pbd.flag("currently_attached") and (host := pbd.reference("host")) in hosts:
            plugged[pbd.reference("SR")].append(host)
    nbd, nbd_hosts = _nbd(networks, pifs)
    by_vm, by_vdi, children = defaultdict(list), defaultdict(list), defaultdict(list)
    for vbd in vbds.values():
        by_vm[vbd.vm].append(vbd)
        if vbd.vdi:
            by_vdi[vbd.vdi].append(vbd)
    for vdi in vdis.values():
        if vdi.parent_uuid:
            children[vdi.parent_uuid].append(vdi)
    return Inventory(
        pool_uuid=pools[0].text("uuid"),
        pool_name=pools[0].text("name_label"),
        master=pools[0].reference("master"),
        restrictions=pools[0].mapping("restrictions"),
        nbd=nbd,
        nbd_hosts=nbd_hosts,
        hosts=hosts,
        srs={ref: _sr(fields, managers, tuple(filter(None, plugged[ref]))) for ref, fields in srs.items()},
        vms=vms,
        vdis=vdis,
        vbds=vbds,
        vdi_of_uuid={vdi.uuid: vdi for vdi in vdis.values()},
        vbds_of_vm=by_vm,
        vbds_of_vdi=by_vdi,
        children=children,
    )


async def records_if_known(xapi: Xapi, cls: str) -> dict[Ref, dict[str, XapiValue]]:
    """All records of a class that old releases do not know: then none. Raises PoolError."""
    try:
        return await xapi.records(cls)
    except XapiFailure as exc:
        if handling_of(exc) is Handling.UNSUPPORTED:
            return {}
        raise


async def _all(xapi: Xapi, cls: str) -> dict[Ref, Fields]:
    return {ref: Fields(cls, ref, record) for ref, record in (await xapi.records(cls)).items()}


def _nbd(networks: Mapping[Ref, Fields], pifs: Mapping[Ref, Fields]) -> tuple[Nbd, frozenset[Ref]]:
    """How disks are served, and by the hosts that have an address on such a network (xen-api, network purposes)."""
    serving = {ref: set(network.texts("purpose")) & {"nbd", "insecure_nbd"} for ref, network in networks.items()}
    purposes = {purpose for found in serving.values() for purpose in found}
    hosts = {
        host
        for pif in pifs.values()
        if pif.flag("currently_attached") and serving.get(pif.reference("network") or "") and pif.text("IP", "")
        if (host := pif.reference("host"))
    }
    match sorted(purposes):
        case []:
            return Nbd.NONE, frozenset()
        case [one]:
            return Nbd(one), frozenset(hosts)
        case _:
            return Nbd.BOTH, frozenset()


def _host(fields: Fields) -> Host:
    software = fields.mapping("software_version")
    return Host(
        ref=fields.ref,
        uuid=fields.text("uuid"),
        name=fields.text("name_label"),
        address=fields.text("address"),
        enabled=fields.flag("enabled"),
        version=software.get("product_version", ""),
        brand=software.get("product_brand", ""),
    )


def _sr(fields: Fields, managers: Mapping[str, Fields], hosts: tuple[Ref, ...]) -> Sr:
    kind, allowed = fields.text("type"), fields.texts("allowed_operations")
    features = managers[kind].mapping("features") if kind in managers else {}
    thin = fields.mapping("sm_config").get("allocation", "thick") in _THIN_ALLOCATIONS
    return Sr(
        ref=fields.ref,
        uuid=fields.text("uuid"),
        name=fields.text("name_label"),
        type=kind,
        content_type=fields.text("content_type"),
        thick=kind in _THICK and not thin,
        tracks_changes=CBT_FEATURE in features or CBT_OPERATION in allowed,
        takes_snapshots="VDI_SNAPSHOT" in features or "vdi_snapshot" in allowed,
        size_bytes=fields.integer("physical_size"),
        used_bytes=fields.integer("physical_utilisation"),
        shared=fields.flag("shared"),
        hosts=hosts,
        other_config=fields.mapping("other_config"),
    )


def _vdi(fields: Fields) -> Vdi:
    sm_config = fields.mapping("sm_config")
    return Vdi(
        ref=fields.ref,
        uuid=fields.text("uuid"),
        name=fields.text("name_label"),
        sr=fields.text("SR"),
        type=fields.text("type"),
        size_bytes=fields.integer("virtual_size"),
        managed=fields.flag("managed"),
        sharable=fields.flag("sharable"),
        reset_on_boot=fields.text("on_boot", "persist") == "reset",
        is_raw=sm_config.get("type") == "raw" or sm_config.get("vdi_type") == "aio",
        is_a_snapshot=fields.flag("is_a_snapshot"),
        snapshot_of=fields.reference("snapshot_of"),
        # Came with XenServer 7.3.
        cbt_enabled=fields.flag("cbt_enabled", default=False),
        parent_uuid=sm_config.get(_PARENT, ""),
        other_config=fields.mapping("other_config"),
    )


def _vbd(fields: Fields) -> Vbd:
    return Vbd(
        ref=fields.ref,
        uuid=fields.text("uuid"),
        vm=fields.text("VM"),
        vdi=None if fields.flag("empty", default=False) else fields.reference("VDI"),
        position=fields.text("userdevice"),
        type=fields.text("type"),
        attached=fields.flag("currently_attached"),
    )


def _vm(fields: Fields) -> Vm:
    return Vm(
        ref=fields.ref,
        uuid=fields.text("uuid"),
        name=fields.text("name_label"),
        power_state=fields.text("power_state"),
        is_a_template=fields.flag("is_a_template"),
        is_a_snapshot=fields.flag("is_a_snapshot"),
        is_control_domain=fields.flag("is_control_domain"),
        snapshot_of=fields.reference("snapshot_of"),
        resident_on=fields.reference("resident_on"),
        tags=fields.texts("tags"),
        blocked_operations=fields.mapping("blocked_operations"),
        other_config=fields.mapping("other_config"),
    )
