"""Archives of VM metadata: ova.xml in a tar, as XAPI writes them, and VMs made from them again. No HTTP here."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, NamedTuple, cast
from uuid import uuid4

from . import rpc, schema
from .calls import vif, vm, wire
from .failures import Failure
from .schema import NULL

if TYPE_CHECKING:
    from collections.abc import Collection

    from .context import Context
    from .schema import Record, Ref, Value

MEMBER: Final = "ova.xml"
EXPORT_VERSION: Final = 2
XAPI_MAJOR: Final = 1
_PARTS: Final = {"vbd": "VBDs", "vif": "VIFs", "vtpm": "VTPMs"}
# Fields of a VM that an import does not take over: the pool's own affair, or set by what is made later.
_DERIVED: Final = frozenset({"uuid", "power_state", "resident_on", "domid", "metrics", "guest_metrics", "snapshot_of"})
_TRANSIENT: Final = frozenset({"uuid", "currently_attached", "device", "metrics"})


class Options(NamedTuple):
    """How to import; ``vdi_map`` is uuid of an archived disk to uuid of the disk that takes its place."""

    vdi_map: Mapping[str, str]
    restore: bool = False
    force: bool = False
    dry_run: bool = False


def export(ctx: Context, vms: Sequence[Ref], *, snapshots: bool, excluded: Collection[str] = ()) -> bytes:
    """The archive of VMs and what belongs to them."""
    db = ctx.db
    with db.lock:
        found: dict[Ref, str] = {}
        for ref in [*vms, *(snapshot for one in vms if snapshots for snapshot in db.refs(one, "snapshots"))]:
            _collect(ctx, ref, excluded, found)
        ids = {ref: f"Ref:{number}" for number, ref in enumerate(found)}
        objects: list[Value] = [
            {"class": cls, "id": ids[ref], "snapshot": _archived(ctx, cls, ref, ids)} for ref, cls in found.items()
        ]
    release = ctx.world.release
    version: Record = {
        "hostname": ctx.world.nodes[ctx.host].name,
        "date": "2026-01-01",
        "product_version": release.product_version,
        "product_brand": release.brand,
        "build_number": "xensim",
        "xapi_major": XAPI_MAJOR,
        "xapi_minor": release.api_minor,
        "export_vsn": EXPORT_VERSION,
    }
    return _tar(rpc.encode({"version": version, "objects": objects}).encode())


def import_(ctx: Context, archive: bytes, options: Options) -> list[Ref]:
    """Make the VMs of an archive; nothing of them stays if one fails. Raises Failure."""
    document = _read(archive)
    version = cast("Mapping[str, str]", document["version"])
    if (int(version["xapi_major"]), int(version["xapi_minor"])) > (XAPI_MAJOR, ctx.world.release.api_minor):
        raise Failure("IMPORT_INCOMPATIBLE_VERSION")
    objects: dict[str, dict[str, Record]] = {}
    for one in cast("list[Mapping[str, Value]]", document["objects"]):
        objects.setdefault(str(one["class"]), {})[str(one["id"])] = cast("Record", one["snapshot"])
    run = _Import(ctx, options, objects)
    try:
        return run.vms()
    except Failure:
        run.undo()
        raise


@dataclass(slots=True)
class _Import:
    """One import: archived objects by class and id, and what was made of them."""

    ctx: Context
    options: Options
    objects: Mapping[str, Mapping[str, Record]]
    made: list[Ref] = field(default_factory=list)
    made_of: dict[str, Ref] = field(default_factory=dict)

    def vms(self) -> list[Ref]:
        """All VMs that are no control domains; snapshots come with theirs and are not listed."""
        db = self.ctx.db
        archived = {key: one for key, one in self._all("VM").items() if not one.get("is_control_domain")}
        with db.lock:
            for key, record in archived.items():
                self._check(key, record)
            if self.options.dry_run:
                return []
            for key, record in archived.items():
                self.made_of[key] = self._vm(key, record)
            for key, record in archived.items():
                origin = self.made_of.get(str(record.get("snapshot_of")))
                if origin:
                    db.set(self.made_of[key], snapshot_of=origin, is_a_snapshot=True)
        return [ref for key, ref in self.made_of.items() if not db.flag(ref, "is_a_snapshot")]

    def undo(self) -> None:
        """Remove what was made."""
        with self.ctx.db.lock:
            for ref in reversed(self.made):
                if self.ctx.db.exists(ref):
                    self.ctx.db.destroy(ref)

    def _all(self, cls: str) -> Mapping[str, Record]:
        return self.objects.get(cls, {})

    def _check(self, key: str, record: Record) -> None:
        """Everything that can be refused ahead. Raises Failure."""
        db, options = self.ctx.db, self.options
        replaced = db.where("VM", uuid=str(record["uuid"])) if options.restore else []
        for old in replaced:
            if db.text(old, "power_state") != "Halted":
                raise Failure("VM_BAD_POWER_STATE", old, "halted", db.text(old, "power_state").lower())
            held, wanted = db.number(old, "version"), int(str(record.get("version", 0)))
            if held >= wanted and not options.force:
                raise Failure("VM_TO_IMPORT_IS_NOT_NEWER_VERSION", old, str(held), str(wanted))
        if options.restore:
            seed = cast("Mapping[str, str]", record.get("other_config", {})).get("mac_seed", "")
            for other in db.all("VM"):
                if other not in replaced and seed and db.mapping(other, "other_config").get("mac_seed") == seed:
                    raise Failure("DUPLICATE_MAC_SEED", seed)
        for vbd in self._of("VBD", key).values():
            self._disk(vbd)

    def _of(self, cls: str, vm_key: str) -> Mapping[str, Record]:
        owner = "vTPM'_VM" if cls == "VTPM" else "VM"
        return {key: one for key, one in self._all(cls).items() if one.get(owner) == vm_key}

    def _vm(self, key: str, record: Record) -> Ref:
        ctx, db, restore = self.ctx, self.ctx.db, self.options.restore
        known = schema.classes()["VM"].fields
        fields: Record = {
            name: wire.convert(known[name].type, value, name)
            for name, value in record.items()
            if name in known and "ref" not in known[name].type and name not in _DERIVED
        }
        other_config = dict(cast("Mapping[str, str]", record.get("other_config", {})))
        if restore:
            for old in db.where("VM", uuid=str(record["uuid"])):
                vm.remove(ctx, old)
            fields["uuid"] = str(record["uuid"])
        else:
            other_config["mac_seed"] = str(uuid4())
        fields |= {"other_config": other_config, "current_operations": {}, "is_a_snapshot": False, "domid": -1}
        fields["affinity"] = self._host(str(record.get("affinity")))
        stale = self._all("VM_guest_metrics").get(str(record.get("guest_metrics")), {})
        # Also ``live``, as it was when the archive was made (xen-api, import.ml).
        guest_metrics = self._part("VM_guest_metrics", stale) if stale else NULL
        new = self._make("VM", **fields, metrics=self._make("VM_metrics"), guest_metrics=guest_metrics)
        for vbd in self._of("VBD", key).values():
            self._vbd(new, vbd)
        for one in self._of("VIF", key).values():
            mac = str(one["MAC"]) if restore else vif.random_mac()
            self._part("VIF", one, VM=new, network=self._network(str(one["network"])), MAC=mac)
        for one in self._of("VTPM", key).values():
            vtpm = self._make("VTPM", VM=new, is_unique=bool(one["vTPM'_is_unique"]))
            ctx.world.vtpm_contents[vtpm] = str(one["vTPM'_content"])
        vm.update(ctx, new)
        return new

    def _vbd(self, new: Ref, record: Record) -> None:
        vdi = self._disk(record)
        if vdi is None:
            return  # forced: the disk is left out
        if vdi == NULL:
            self._part("VBD", record, VM=new, VDI=NULL, empty=True)
        else:
            self._part("VBD", record, VM=new, VDI=vdi)

    def _disk(self, record: Record) -> Ref | None:
        """The VDI for an archived VBD; null for a CD that is gone, None for a missing disk under ``force``."""
        db, options = self.ctx.db, self.options
        if record.get("empty"):
            return NULL
        disk = self._all("VDI").get(str(record.get("VDI")), {})
        link: Record | None = disk
        while link:
            wanted = options.vdi_map.get(str(link.get("uuid")))
            if wanted:
                return db.by_uuid("VDI", wanted)
            link = self._all("VDI").get(str(link.get("snapshot_of")))
        same = [
            vdi for vdi in db.all("VDI") if db.text(vdi, "location") == disk.get("location") and disk.get("location")
        ]
        if same:
            return same[0]
        if record.get("type") == "CD":
            return NULL
        if options.force:
            return None
        sr = str(self._all("SR").get(str(disk.get("SR")), {}).get("uuid", ""))
        raise Failure("VDI_LOCATION_MISSING", sr, str(disk.get("location", "")))

    def _network(self, key: str) -> Ref:
        """By name, then by bridge, else a new one."""
        record = self._all("network").get(key, {})
        db = self.ctx.db
        named = db.where("network", name_label=str(record.get("name_label", "")))
        bridged = db.where("network", bridge=str(record.get("bridge", "")))
        found = named or bridged
        if found:
            return found[0]
        name, bridge = str(record.get("name_label", "")), f"xapi{len(db.all('network'))}"
        return self._make("network", name_label=name, bridge=bridge)  # the next one finds it by its name

    def _host(self, key: str) -> Ref:
        uuid = str(self._all("host").get(key, {}).get("uuid", ""))
        return next(iter(self.ctx.db.where("host", uuid=uuid)), NULL)

    def _part(self, cls: str, record: Record, **fields: Value) -> Ref:
        known = schema.classes()[cls].fields
        plain: Record = {
            name: wire.convert(known[name].type, value, name)
            for name, value in record.items()
            if name in known and "ref" not in known[name].type and name not in _TRANSIENT
        }
        return self._make(cls, **(plain | fields | ({"device": str(record["device"])} if cls == "VIF" else {})))

    def _make(self, cls: str, /, **fields: Value) -> Ref:
        ref = self.ctx.db.create(cls, **fields)
        self.made.append(ref)
        return ref


def _collect(ctx: Context, ref: Ref, excluded: Collection[str], found: dict[Ref, str]) -> None:
    """A VM and everything an archive has of it, in ``found``."""
    db = ctx.db
    found[ref] = "VM"
    for name in ("metrics", "guest_metrics", "affinity"):
        _add(ctx, db.text(ref, name), found)
    for kind, name in _PARTS.items():
        if kind not in excluded:
            for part in db.refs(ref, name):
                found[part] = db.cls(part)
    for vbd in db.refs(ref, "VBDs") if "vbd" not in excluded else ():
        vdi = db.text(vbd, "VDI")
        if db.exists(vdi):
            _add(ctx, vdi, found)
            _add(ctx, db.text(vdi, "SR"), found)
    for one in db.refs(ref, "VIFs") if "vif" not in excluded else ():
        _add(ctx, db.text(one, "network"), found)


def _add(ctx: Context, ref: Ref, found: dict[Ref, str]) -> None:
    if ctx.db.exists(ref):
        found[ref] = ctx.db.cls(ref)


def _archived(ctx: Context, cls: str, ref: Ref, ids: Mapping[Ref, str]) -> Value:
    """A record with references to what is in the archive, null for everything else."""
    record = ctx.db.get(ref)
    if cls == "VTPM":
        return {
            "vTPM'_VM": ids[str(record["VM"])],
            "vTPM'_uuid": record["uuid"],
            "vTPM'_is_unique": record["is_unique"],
            "vTPM'_is_protected": record["is_protected"],
            "vTPM'_content": ctx.world.vtpm_contents.get(ref, ""),
        }
    return {name: _relative(value, ids) for name, value in record.items()}


def _relative(value: Value, ids: Mapping[Ref, str]) -> Value:
    if isinstance(value, str):
        return ids.get(value, NULL) if value.startswith("OpaqueRef:") else value
    if isinstance(value, Mapping):
        return {key: _relative(item, ids) for key, item in value.items()}
    if isinstance(value, Sequence):
        return [ids.get(str(item), item) for item in value if not _outside(item, ids)]
    return value


def _outside(item: Value, ids: Mapping[Ref, str]) -> bool:
    return isinstance(item, str) and item.startswith("OpaqueRef:") and item not in ids


def _tar(document: bytes) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        member = tarfile.TarInfo(MEMBER)
        member.size = len(document)
        archive.addfile(member, io.BytesIO(document))
    return buffer.getvalue()


def _read(archive: bytes) -> Mapping[str, Value]:
    try:
        with tarfile.open(fileobj=io.BytesIO(archive), mode="r:") as members:
            first = members.next()
            if first is None or first.name != MEMBER:
                raise Failure("IMPORT_ERROR_UNEXPECTED_FILE", MEMBER, first.name if first else "")
            stream = members.extractfile(first)
            assert stream
            document = rpc.decode(stream.read())
    except tarfile.TarError as exc:
        raise Failure("IMPORT_ERROR_PREMATURE_EOF") from exc
    if not isinstance(document, Mapping) or not {"version", "objects"} <= document.keys():
        raise Failure("IMPORT_ERROR", "no export")
    return document
