"""The archive of a VM's metadata, as XAPI exports and imports it: changed so that it makes the VM that is wanted.

A tar whose member ova.xml is an XML-RPC value: {version, objects: [{class, id, snapshot}]}, in which references are
ids of the archive's own (xen-api, importexport.ml). What is not known here is passed on as it is. Pure. Archives come
out of a repository, so hostile ones end in WireError; time and memory are linear in their size.
"""

from __future__ import annotations

import io
import re
import tarfile
import xmlrpc.client
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NamedTuple, TypeAlias, cast
from xml.parsers import expat

from xbfs_engine.core.errors import WireError
from xbfs_engine.source.xapi.markers import PREFIX
from xbfs_engine.source.xapi.values import NULL_REF
from xbfs_engine.source.xapi.vm_record import ARCHIVE_SIZE_MAX

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from xbfs_engine.restore.vm.plan import VifPlan
    from xbfs_engine.restore.vm.target import Network

MEMBER: Final = "ova.xml"
MAC_SEED: Final = "mac_seed"
"""In other_config: what XAPI makes a VM's MACs of; two VMs with one would get the same (xen-api)."""

_DEPTH_MAX: Final = 32
_DECLARATION: Final = re.compile(rb"\s*<\?xml[^>]*\?>")
_KEPT: Final = frozenset({"host", "SR", "VDI", "VM", "VM_guest_metrics", "VM_metrics", "network", "VBD", "VIF", "VTPM"})
"""Classes that a restore takes; graphics and PVS need hardware and sites of the old pool."""

_EMPTIED: Final = ("snapshots", "children", "VGPUs", "VUSBs", "attached_PCIs", "consoles", "crash_dumps")

_Snapshot: TypeAlias = "dict[str, object]"


class ArchivedObject(NamedTuple):
    """One object: ``fields`` are those of its record."""

    cls: str
    id: str
    fields: _Snapshot


@dataclass(frozen=True, slots=True)
class Changes:
    """What the VM shall be. ``disks``: by userdevice, the uuid of the VDI that is there. ``vifs``: by MAC.

    ``uuid``: None for a copy. ``marker``: goes into other_config. ``blocked``: operations and why.
    """

    name: str
    uuid: str | None
    disks: Mapping[str, str]
    vifs: Mapping[str, VifPlan]
    marker: Mapping[str, str]
    blocked: Mapping[str, str]
    vtpm: bool


class Rewritten(NamedTuple):
    """An archive to import. ``vdi_map``: the uuid of each disk in it to that of the VDI to take."""

    archive: bytes
    vdi_map: dict[str, str]


def rewrite(archive: bytes, vm_uuid: str, changes: Changes) -> Rewritten:
    """Change an archive of the VM, or of a snapshot of it. Raises WireError for one that can not be used."""
    document, objects = _read(archive)
    vm = _the_vm(objects, vm_uuid)
    kept: list[ArchivedObject] = []
    vdi_map: dict[str, str] = {}
    vifs = 0
    vdis = {one.id: one for one in objects if one.cls == "VDI"}
    networks: dict[str, ArchivedObject] = {one.id: one for one in objects if one.cls == "network"}
    wanted = {vm.id} | {_text(vm, name) for name in ("affinity", "metrics", "guest_metrics") if name in vm.fields}
    for one in objects:
        owner = _text(one, "vTPM'_VM" if one.cls == "VTPM" else "VM") if one.cls in {"VBD", "VIF", "VTPM"} else vm.id
        if owner != vm.id:
            continue
        if one.cls == "VBD":
            if _rewrite_vbd(one, vdis, changes.disks, vdi_map):
                wanted |= {one.id, _text(one, "VDI")}
        elif one.cls == "VIF":
            # The archive may be of a snapshot: what its VIF and the VM's have in common is the MAC.
            plan = changes.vifs.get(_text(one, "MAC").lower())
            if plan is None:
                raise WireError("the metadata archive has a VIF that the VM had not")
            vifs += 1
            # One object a VIF: two VIFs of one network may be wished into two.
            copy = ArchivedObject(
                "network", f"{one.id}/network", _network(networks.get(_text(one, "network")), plan.network)
            )
            one.fields.update({"network": copy.id, "device": plan.device})
            kept.append(copy)
            wanted |= {one.id, copy.id}
        elif one.cls == "VTPM" and changes.vtpm:
            wanted.add(one.id)
    if set(vdi_map.values()) != set(changes.disks.values()) or vifs != len(changes.vifs):
        raise WireError("the metadata archive lacks disks or VIFs that the VM had")
    wanted |= {_text(vdis[one], "SR") for one in wanted if one in vdis and "SR" in vdis[one].fields}
    _rewrite_vm(vm, wanted, objects, changes)
    kept += [one for one in objects if one.id in wanted and one.cls in _KEPT and one.cls != "network"]
    records = [{"class": one.cls, "id": one.id, "snapshot": one.fields} for one in kept]
    return Rewritten(_tar(document | {"objects": records}), vdi_map)


def _rewrite_vm(vm: ArchivedObject, wanted: set[str], objects: list[ArchivedObject], changes: Changes) -> None:
    other_config = vm.fields.get("other_config")
    if not isinstance(other_config, dict):
        raise WireError("the metadata archive's VM has no other_config")
    dropped = () if changes.uuid is not None else (MAC_SEED,)
    config = {key: value for key, value in other_config.items() if not key.startswith(PREFIX) and key not in dropped}
    parts = {
        name: [one.id for one in objects if one.cls == cls and one.id in wanted]
        for name, cls in (("VBDs", "VBD"), ("VIFs", "VIF"), ("VTPMs", "VTPM"))
    }
    empty: dict[str, list[str]] = {name: [] for name in _EMPTIED}
    null = dict.fromkeys(("snapshot_of", "parent", "suspend_VDI", "suspend_SR"), NULL_REF)
    new: _Snapshot = {
        **{name: value for name, value in (parts | empty | null).items() if name in vm.fields},
        "name_label": changes.name,
        "is_a_template": False,
        "is_a_snapshot": False,
        "power_state": "Halted",
        "other_config": config | dict(changes.marker),
        "blocked_operations": dict(changes.blocked),
    }
    vm.fields.update(new)
    for name in ("ha_always_run", "is_default_template", "is_vmss_snapshot"):
        if name in vm.fields:
            vm.fields[name] = False
    if changes.uuid is not None:
        vm.fields["uuid"] = changes.uuid


def _rewrite_vbd(
    vbd: ArchivedObject, vdis: Mapping[str, ArchivedObject], disks: Mapping[str, str], vdi_map: dict[str, str]
) -> bool:
    """Whether the VBD stays: drives, without what is in them, and the disks that are there."""
    vbd.fields["currently_attached"] = False
    if _text(vbd, "type") == "CD":
        vbd.fields.update({"VDI": NULL_REF, "empty": True})
        return True
    new = disks.get(_text(vbd, "userdevice"))
    vdi = vdis.get(_text(vbd, "VDI"))
    if new is None or vdi is None:
        return False
    vdi_map[_text(vdi, "uuid")] = new
    return True


def _network(archived: ArchivedObject | None, network: Network) -> _Snapshot:
    """A network that an import finds on the pool: it looks for the name first, then for the bridge (xen-api)."""
    fields = dict(archived.fields) if archived else {}
    return fields | {"uuid": network.uuid, "name_label": network.name, "bridge": network.bridge, "VIFs": [], "PIFs": []}


def _the_vm(objects: list[ArchivedObject], uuid: str) -> ArchivedObject:
    vms = [one for one in objects if one.cls == "VM" and one.fields.get("is_control_domain") is not True]
    found = [vm for vm in vms if vm.fields.get("uuid") == uuid] or vms
    if len(found) != 1:
        raise WireError(f"the metadata archive holds {len(vms)} VMs")
    return found[0]


def _read(archive: bytes) -> tuple[_Snapshot, list[ArchivedObject]]:
    try:
        with tarfile.open(fileobj=io.BytesIO(archive), mode="r:") as members:
            first = members.next()
            stream = members.extractfile(first) if first is not None and first.name == MEMBER else None
            text = stream.read(ARCHIVE_SIZE_MAX + 1) if stream is not None else b""
    except (tarfile.TarError, ValueError, OverflowError, EOFError, OSError) as exc:
        raise WireError("the metadata archive is no tar that can be read") from exc
    if not text or len(text) > ARCHIVE_SIZE_MAX:
        raise WireError(f"the metadata archive does not begin with {MEMBER}, or it is too large")
    document = _decode(text)
    objects = document.get("objects")
    if not isinstance(objects, list):
        raise WireError("the metadata archive lists no objects")
    return document, [_object(one) for one in objects]


def _object(one: object) -> ArchivedObject:
    match one:
        case {"class": str() as cls, "id": str() as number, "snapshot": dict() as fields}:
            return ArchivedObject(cls, number, fields)
        case _:
            raise WireError("the metadata archive lists something that is no object")


def _decode(text: bytes) -> _Snapshot:
    """The value in ova.xml, which must be a struct. Its types are kept: it is to be written again."""
    unmarshaller = xmlrpc.client.Unmarshaller()
    parser = expat.ParserCreate()
    parser.StartElementHandler = unmarshaller.start
    parser.EndElementHandler = unmarshaller.end
    parser.CharacterDataHandler = unmarshaller.data
    parser.StartDoctypeDeclHandler = _no_doctype
    unmarshaller.xml("", None)  # expat hands out str: nothing is left to decode
    try:
        for piece in (b"<params><param>", _DECLARATION.sub(b"", text, count=1), b"</param></params>"):
            parser.Parse(piece, False)
        parser.Parse(b"", True)
        (value,) = cast("tuple[object, ...]", unmarshaller.close())
    except Exception as exc:
        # The standard library's parser raises whatever its input makes it.
        raise WireError(f"{MEMBER} in the metadata archive is no XML-RPC value") from exc
    if not isinstance(value, dict) or any(depth > _DEPTH_MAX for depth in _depths(value)):
        raise WireError(f"{MEMBER} in the metadata archive is no struct, or nested too deeply")
    return value


def _depths(value: object) -> Iterator[int]:
    """The depth of every value, without recursion."""
    stack = [(value, 0)]
    while stack:
        one, depth = stack.pop()
        yield depth
        if isinstance(one, dict):
            stack += [(item, depth + 1) for item in one.values()]
        elif isinstance(one, list):
            stack += [(item, depth + 1) for item in one]


def _no_doctype(*_: object) -> None:
    raise ValueError("a document type")


def _text(one: ArchivedObject, name: str) -> str:
    value = one.fields.get(name)
    if not isinstance(value, str):
        raise WireError(f"the metadata archive has a {one.cls[:20]} without {name}")
    return value


def _tar(document: _Snapshot) -> bytes:
    try:
        text = xmlrpc.client.Marshaller("utf-8", allow_none=True).dumps((document,))
        content = text.partition("<param>\n")[2].rpartition("</param>")[0].strip().encode()
    except (TypeError, OverflowError, UnicodeEncodeError, RecursionError) as exc:
        raise WireError("the metadata archive holds what XML-RPC can not carry") from exc
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as members:
        member = tarfile.TarInfo(MEMBER)
        member.size = len(content)
        members.addfile(member, io.BytesIO(content))
    return buffer.getvalue()
