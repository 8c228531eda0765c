"""Builds the pool that a world document describes: hosts, users, networks, SRs, VMs with disks, templates.

The document is JSON; every part may be left out. README.md lists its keys.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from . import calls, certificates
from .context import Context, HostNode, Release, World
from .schema import NULL, ROLES
from .sessions import Sessions, User
from .storage.kinds import KINDS
from .storage.manager import StorageManager
from .tasks import Tasks

if TYPE_CHECKING:
    from collections.abc import Mapping

    from .schema import Record, Ref

    Document = Mapping[str, Any]

GIB: Final = 1 << 30
ROOT_PASSWORD: Final = "xensim"
# Licence switches: "false" means allowed.
_RESTRICTIONS: Final = {"restrict_cbt": "false", "restrict_vtpm": "false", "restrict_checkpoint": "false"}
_CD_SR: Final = "iso"


def build(document: Document, state_dir: Path, release: Release, time_scale: float) -> World:
    """A world with everything in the document but running servers and VMs; call ``power_on`` when servers run."""
    calls.load()
    state_dir.mkdir(parents=True, exist_ok=True)
    world = World(state_dir, release, time_scale)
    world.tasks = Tasks(world)
    _roles(world, document)
    _pool(world, document)
    world.storage = StorageManager(world, state_dir)
    ctx = world.internal()
    _drivers(ctx)
    for network in document.get("networks", [{"name": "Pool-wide network associated with eth0", "bridge": "xenbr0"}]):
        _network(ctx, network)
    for sr in document.get("srs", []):
        _sr(ctx, sr)
    for template in document.get("templates", []):
        ctx.db.set(_vm(ctx, template), is_a_template=True, is_default_template=bool(template.get("default")))
    for vm in document.get("vms", []):
        _vm(ctx, vm)
    return world


def power_on(world: World, document: Document) -> None:
    """Start the VMs that the document calls Running."""
    ctx = world.internal()
    for vm in document.get("vms", []):
        if vm.get("power_state") == "Running":
            (ref,) = ctx.db.where("VM", name_label=vm["name"], is_a_template=False)
            ctx.invoke("VM.start", ref, False, False)


def load(path: Path) -> Document:
    """Read a world document; paths of images in it are relative to it."""
    document = json.loads(path.read_text(encoding="utf-8"))
    for vm in (*document.get("vms", []), *document.get("templates", [])):
        for disk in vm.get("disks", []):
            if "image" in disk:
                disk["image"] = str((path.parent / disk["image"]).resolve())
    assert isinstance(document, dict)
    return document


def _roles(world: World, document: Document) -> None:
    db = world.db
    roles = {name: db.create("role", name_label=name) for name in ROLES if name != "root"}
    users = {"root": User("root", str(document.get("root_password", ROOT_PASSWORD)), "root")}
    subjects: dict[str, Ref] = {}
    for entry in document.get("users", []):
        user = User(entry["name"], entry["password"], entry.get("role"))
        users[user.name] = user
        held = [roles[user.role]] if user.role else []
        subject = {"subject-name": user.name}
        subjects[user.name] = db.create(
            "subject", subject_identifier=f"S-1-5-21-{len(subjects) + 1}", other_config=subject, roles=held
        )
    world.sessions = Sessions(world, users, subjects)


def _pool(world: World, document: Document) -> None:
    db = world.db
    settings = document.get("pool", {})
    for number, host in enumerate(document.get("hosts", [{"name": "host1"}]), start=1):
        name, address = host["name"], host.get("address", f"127.0.0.{number}")
        key_file = world.state_dir / f"{name}.pem"
        certificate = certificates.make(f"{name}.xensim.invalid", address, key_file)
        ref = _host(world, name, address)
        db.create(
            "Certificate",
            name="",
            type="host",
            host=ref,
            fingerprint=certificate.sha256,
            fingerprint_sha256=certificate.sha256,
            fingerprint_sha1=certificate.sha1,
            not_before=certificate.not_before,
            not_after=certificate.not_after,
        )
        subject = f"{name}.xensim.invalid"
        world.nodes[ref] = HostNode(ref, name, address, certificate.pem, key_file, certificate.sha256, subject)
    world.pool = db.create(
        "pool",
        name_label=settings.get("name", "simulated pool"),
        master=next(iter(world.nodes)),
        restrictions=_RESTRICTIONS | settings.get("restrictions", {}),
        other_config=settings.get("other_config", {}),
        tls_verification_enabled=True,
        recommendations={},
    )


def _drivers(ctx: Context) -> None:
    """An SM object for every kind of SR, with the features that clients look for."""
    for name, kind in KINDS.items():
        features = {operation.upper(): 1 for operation in kind.operations if operation.startswith("vdi_")}
        if kind.cbt:
            features["VDI_CONFIG_CBT"] = 1
        ctx.db.create(
            "SM", name_label=name, type=name, vendor="simulated", features=features, capabilities=list(features)
        )


def _host(world: World, name: str, address: str) -> Ref:
    db, release = world.db, world.release
    metrics = db.create("host_metrics", live=True, memory_total=64 * GIB, last_updated=world.clock.now())
    host = db.create(
        "host",
        name_label=name,
        hostname=name,
        address=address,
        enabled=True,
        metrics=metrics,
        API_version_major=2,
        API_version_minor=release.api_minor,
        API_version_vendor="XenSource",
        software_version={
            "product_brand": release.brand,
            "product_version": release.product_version,
            "product_version_text": release.product_version,
            "xapi": release.xapi_version,
            "xapi_build": release.xapi_version,
            "build_number": "xensim",
            "hostname": name,
            "date": "2026-01-01",
        },
        cpu_info={"cpu_count": "8", "vendor": "GenuineIntel", "modelname": "simulated"},
        license_params={"restrict_cbt": "false"},
        edition="xcp-ng" if release.brand == "XCP-ng" else "premium",
    )
    dom0 = db.create(
        "VM",
        name_label=f"Control domain on host: {name}",
        is_control_domain=True,
        power_state="Running",
        resident_on=host,
        affinity=host,
        metrics=db.create("VM_metrics"),
        memory_static_max=2 * GIB,
        VCPUs_max=4,
        VCPUs_at_startup=4,
    )
    db.set(host, control_domain=dom0)
    return host


def _network(ctx: Context, entry: Document) -> None:
    db = ctx.db
    network = db.create(
        "network",
        name_label=entry["name"],
        name_description=entry.get("description", ""),
        bridge=entry.get("bridge", f"xapi{len(db.all('network'))}"),
        purpose=entry.get("purpose", []),
        MTU=entry.get("mtu", 1500),
    )
    if entry.get("internal"):
        return
    first = not db.all("PIF")
    for number, (host, node) in enumerate(ctx.world.nodes.items()):
        db.create(
            "PIF",
            device=entry.get("device", "eth0"),
            network=network,
            host=host,
            MAC=f"02:00:00:00:{len(db.all('network')):02x}:{number:02x}",
            MTU=entry.get("mtu", 1500),
            VLAN=entry.get("vlan", -1),
            physical="vlan" not in entry,
            currently_attached=True,
            management=first,
            ip_configuration_mode="Static",
            IP=node.address,
            netmask="255.0.0.0",
        )


def _sr(ctx: Context, entry: Document) -> None:
    """An SR through SR.create, so that storage decides what it can."""
    name, kind = entry["name"], entry["type"]
    hosts = [ref for ref, node in ctx.world.nodes.items() if node.name in entry.get("hosts", [node.name])]
    sr = ctx.ref(
        "SR.create",
        hosts[0],
        dict(entry.get("device_config", {"server": "storage.invalid", "serverpath": f"/{name}"})),
        int(entry.get("size", 1024 * GIB)),
        name,
        entry.get("description", ""),
        kind,
        "iso" if kind == _CD_SR else "user",
        bool(entry.get("shared", True)),
        dict(entry.get("sm_config", {})),
    )
    ctx.db.set(sr, other_config=dict(entry.get("other_config", {})))
    if entry.get("default"):
        ctx.db.set(ctx.world.pool, default_SR=sr)


def _vm(ctx: Context, entry: Document) -> Ref:
    db = ctx.db
    memory = int(entry.get("memory", GIB))
    firmware = "uefi" if entry.get("uefi") else "bios"
    record: Record = {
        "name_label": entry["name"],
        "name_description": entry.get("description", ""),
        "user_version": 1,
        "is_a_template": False,
        "affinity": NULL,
        **{f"memory_{bound}": memory for bound in ("static_min", "dynamic_min", "dynamic_max", "static_max")},
        "VCPUs_params": {},
        "VCPUs_max": int(entry.get("vcpus", 1)),
        "VCPUs_at_startup": int(entry.get("vcpus", 1)),
        **{f"actions_after_{event}": action for event, action in _ACTIONS.items()},
        **{f"PV_{name}": "" for name in ("bootloader", "kernel", "ramdisk", "args", "bootloader_args", "legacy_args")},
        "HVM_boot_policy": "BIOS order",
        "HVM_boot_params": {"order": "cdn", "firmware": firmware},
        "platform": {"device-model": "qemu-upstream-uefi" if entry.get("uefi") else "qemu-upstream-compat"},
        "PCI_bus": "",
        "other_config": dict(entry.get("other_config", {})),
        "recommendations": "",
        "domain_type": "hvm",
        "NVRAM": dict(entry.get("NVRAM", {})),
        "tags": list(entry.get("tags", [])),
        "blocked_operations": dict(entry.get("blocked_operations", {})),
        "has_vendor_device": False,
    }
    vm = ctx.ref("VM.create", record)
    db.set(vm, guest_metrics=db.create("VM_guest_metrics", os_version={"name": entry.get("os", "Debian 12")}))
    for position, disk in enumerate(entry.get("disks", [])):
        _disk(ctx, vm, position, disk)
    for device, vif in enumerate(entry.get("vifs", [])):
        _vif(ctx, vm, device, vif)
    if "bios_strings" in entry:
        ctx.invoke("VM.set_bios_strings", vm, dict(entry["bios_strings"]))
    if "vtpm" in entry:
        ctx.invoke("VTPM.set_contents", ctx.ref("VTPM.create", vm, False), str(entry["vtpm"]))
    return vm


_ACTIONS: Final = {"shutdown": "destroy", "reboot": "restart", "crash": "restart"}


def _disk(ctx: Context, vm: Ref, position: int, entry: Document) -> None:
    """A VDI (filled from an image, if there is one) and its VBD; ``cd: true`` without ``sr`` is an empty drive."""
    is_cd = bool(entry.get("cd"))
    vdi = NULL
    if "sr" in entry:
        (sr,) = ctx.db.where("SR", name_label=entry["sr"])
        image = Path(entry["image"]) if "image" in entry else None
        size = int(entry.get("size", image.stat().st_size if image else GIB))
        if ctx.db.text(sr, "content_type") == "iso":
            medium = _vdi_record(ctx, sr, size, entry) | {"managed": True, "location": entry.get("name", "disk.iso")}
            vdi = ctx.db.create("VDI", **medium)
        else:
            vdi = ctx.ref("VDI.create", _vdi_record(ctx, sr, size, entry))
        if image:
            ctx.world.storage.import_file(vdi, image)
        if "on_boot" in entry:
            ctx.db.set(vdi, on_boot=entry["on_boot"])
    ctx.invoke(
        "VBD.create",
        {
            "VM": vm,
            "VDI": vdi,
            "userdevice": str(entry.get("device", position)),
            "bootable": bool(entry.get("bootable", position == 0)),
            "mode": "RO" if is_cd else entry.get("mode", "RW"),
            "type": "CD" if is_cd else "Disk",
            "unpluggable": True,
            "empty": vdi == NULL,
            "other_config": {},
            "qos_algorithm_type": "",
            "qos_algorithm_params": {},
        },
    )


def _vdi_record(ctx: Context, sr: Ref, size: int, entry: Document) -> Record:
    return {
        "name_label": entry.get("name", "disk"),
        "name_description": entry.get("description", ""),
        "SR": sr,
        "virtual_size": size,
        "type": "user",
        "sharable": bool(entry.get("sharable", False)),
        "read_only": bool(entry.get("cd", False)),
        "other_config": dict(entry.get("other_config", {})),
        "xenstore_data": {},
        "sm_config": dict(entry.get("sm_config", {})),
        "tags": list(entry.get("tags", [])),
    }


def _vif(ctx: Context, vm: Ref, device: int, entry: Document) -> None:
    (network,) = ctx.db.where("network", name_label=entry["network"])
    ctx.invoke(
        "VIF.create",
        {
            "VM": vm,
            "network": network,
            "device": str(entry.get("device", device)),
            "MAC": entry.get("mac", ""),
            "MTU": 1500,
            "other_config": {},
            "qos_algorithm_type": "",
            "qos_algorithm_params": {},
        },
    )
