"""Whether a pool is fit for backups: findings with a fact and what to do about it. Changes nothing on the pool.

Facts about roles, licences, network purposes and SRs: xen-api (datamodel), SM; thresholds that are ours say so.
"""

from __future__ import annotations

from collections import defaultdict
from datetime import UTC, datetime
from enum import StrEnum
from typing import TYPE_CHECKING, Final, NamedTuple

from xbfs_engine.core.errors import LoginRefused, XapiFailure
from xbfs_engine.core.limits import GIB
from xbfs_engine.source.xapi.fitness import CHAIN_LONG, CHAIN_REFUSED, backlog_of, obstacles
from xbfs_engine.source.xapi.inventory import Nbd, take_inventory
from xbfs_engine.source.xapi.members import members
from xbfs_engine.source.xapi.selection import disks_of, is_backed_up
from xbfs_engine.source.xapi.sweep import sweep
from xbfs_engine.source.xapi.values import NULL_REF

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from xbfs_engine.source.xapi.inventory import Inventory, Sr, Vm
    from xbfs_engine.source.xapi.ledger import Ledgers
    from xbfs_engine.source.xapi.selection import Disk
    from xbfs_engine.source.xapi.session import Xapi
    from xbfs_engine.source.xapi.sweep import SweepReport

FREE_SHARE_MIN: Final = 0.05
"""Ours: of a thin SR; guests that write during a backup need room beside the snapshot."""

CLOCK_S: Final = 60.0
"""Ours: restore points are named by this machine's clock."""


class Severity(StrEnum):
    """How bad a finding is: only warnings ask for something to be done."""

    OK = "ok"
    NOTE = "note"
    WARNING = "warning"


class Finding(NamedTuple):
    """``topic``: role, licence, nbd, sr, vm, chain, dom0, leftover, certificate or clock. ``fix`` may be empty."""

    severity: Severity
    topic: str
    subject: str
    fact: str
    fix: str = ""


async def check_pool(xapi: Xapi, ledgers: Ledgers, *, node: str, pins: Mapping[str, str]) -> list[Finding]:
    """All that is known of a pool's fitness. ``pins``: pinned fingerprints by host, as in PoolConfig.

    Raises PoolError, StorageError.
    """
    inventory = await take_inventory(xapi)
    report = await sweep(xapi, ledgers, node=node, dry_run=True, inventory=inventory)
    return [
        await _role(xapi),
        *_licence(inventory),
        *_nbd(inventory),
        *await _certificates(xapi, pins),
        *await _clock(xapi, inventory, ledgers.now_ns()),
        *_srs(inventory),
        *_vms(inventory),
        *_dom0(inventory, report),
        *_leftovers(report),
    ]


async def _role(xapi: Xapi) -> Finding:
    """The least call that needs what VM.snapshot needs, on an object that is none: roles are checked first."""
    try:
        await xapi.call("SR.scan", NULL_REF)
    except LoginRefused as exc:
        return Finding(Severity.WARNING, "role", xapi.name, exc.message, "give the user the role vm-power-admin")
    except XapiFailure:
        pass
    return Finding(Severity.OK, "role", xapi.name, "the user's role suffices for backups")


def _licence(inventory: Inventory) -> Iterator[Finding]:
    match inventory.restrictions.get("restrict_cbt"):
        case "false":
            yield Finding(Severity.OK, "licence", inventory.pool_name, "changed-block tracking is licensed")
        case "true":
            yield Finding(
                Severity.WARNING,
                "licence",
                inventory.pool_name,
                "changed-block tracking is not licensed: every backup reads whole disks",
                "license the pool (XenServer 8: Premium), or accept it: what did not change is not stored again",
            )
        case _:
            yield Finding(Severity.NOTE, "licence", inventory.pool_name, "does not tell about changed-block tracking")


def _nbd(inventory: Inventory) -> Iterator[Finding]:
    name = inventory.pool_name
    add = "xe network-param-add param-name=purpose param-key=nbd uuid=NETWORK"
    match inventory.nbd:
        case Nbd.TLS:
            yield Finding(Severity.OK, "nbd", name, "a network serves disks by NBD with TLS")
        case Nbd.NONE:
            fact = "no network serves disks by NBD: they are read by HTTPS, more slowly"
            yield Finding(Severity.WARNING, "nbd", name, fact, add)
        case Nbd.INSECURE:
            fact = "disks are served by NBD without encryption"
            fix = f"remove the purpose insecure_nbd from all networks, then {add}"
            yield Finding(Severity.WARNING, "nbd", name, fact, fix)
        case Nbd.BOTH:
            fact = "networks have the purposes nbd and insecure_nbd: hosts then serve no disks"
            yield Finding(Severity.WARNING, "nbd", name, fact, "remove the purpose insecure_nbd from all networks")
    if inventory.nbd in {Nbd.TLS, Nbd.INSECURE}:
        for host in inventory.hosts.values():
            if host.ref not in inventory.nbd_hosts:
                fact = "has no address on a network that serves disks: another host must read for it"
                yield Finding(Severity.NOTE, "nbd", host.name, fact, "give its interface on that network an address")


async def _certificates(xapi: Xapi, pins: Mapping[str, str]) -> list[Finding]:
    found = []
    for member in await members(xapi):
        pinned = pins.get(member.address)
        subject = f"{member.name} ({member.address})"
        if pinned is None:
            fact, fix = "its certificate is not pinned: disks are not read from it", f"xbfs pool trust {xapi.name}"
            found.append(Finding(Severity.WARNING, "certificate", subject, fact, fix))
        elif not member.fingerprint:
            fact = "the pool can not tell its certificate at present"
            found.append(Finding(Severity.NOTE, "certificate", subject, fact, "is the host up?"))
        elif member.fingerprint != pinned:
            fact = f"has the certificate {member.fingerprint}, pinned is {pinned}"
            fix = f"if it was renewed: xbfs pool trust {xapi.name}"
            found.append(Finding(Severity.WARNING, "certificate", subject, fact, fix))
        else:
            found.append(Finding(Severity.OK, "certificate", subject, "shows the pinned certificate"))
    return found


async def _clock(xapi: Xapi, inventory: Inventory, now_ns: int) -> list[Finding]:
    if inventory.master is None or inventory.master not in inventory.hosts:
        return []
    host = inventory.hosts[inventory.master].name
    time = await xapi.call("host.get_servertime", inventory.master)
    if not isinstance(time, datetime):
        return [Finding(Severity.NOTE, "clock", host, "does not tell its time")]
    ahead_s = (time - datetime.fromtimestamp(now_ns / 1e9, UTC)).total_seconds()
    if abs(ahead_s) <= CLOCK_S:
        return [Finding(Severity.OK, "clock", host, "agrees with this machine's clock")]
    side = "ahead of" if ahead_s > 0 else "behind"
    fact = f"its clock is {abs(ahead_s):.0f} s {side} this machine's"
    return [Finding(Severity.WARNING, "clock", host, fact, "let both follow NTP")]


def _srs(inventory: Inventory) -> Iterator[Finding]:
    used: dict[str, set[str]] = defaultdict(set)
    for vm in filter(is_backed_up, inventory.vms.values()):
        for disk in _wanted(inventory, vm):
            if disk.vdi is not None:
                used[disk.vdi.sr].add(vm.name)
    for sr in sorted((inventory.srs[ref] for ref in used if ref in inventory.srs), key=lambda sr: (sr.name, sr.uuid)):
        yield from _sr(inventory, sr, len(used[sr.ref]))


def _sr(inventory: Inventory, sr: Sr, vms: int) -> Iterator[Finding]:
    free = sr.size_bytes - sr.used_bytes
    kind = "thick" if sr.thick else "thin"
    if not sr.hosts:
        yield Finding(Severity.WARNING, "sr", sr.name, "is connected to no host", f"xe pbd-plug on SR {sr.uuid}")
    if not sr.tracks_changes:
        fact = f"SRs of type {sr.type} do not track changed blocks: every backup reads whole disks"
        yield Finding(Severity.NOTE, "sr", sr.name, fact, "move disks to an SR of type ext, nfs, lvm or lvmoiscsi")
    if not sr.thick and sr.size_bytes > 0 and free < sr.size_bytes * FREE_SHARE_MIN:
        fact = f"{_gib(free)} of {_gib(sr.size_bytes)} free: snapshots that grow may fill it"
        yield Finding(Severity.WARNING, "sr", sr.name, fact, "free space on the SR")
    pending = inventory.pending(sr)
    if pending:
        yield Finding(Severity.NOTE, "chain", sr.name, f"VHDs that wait to be coalesced: {len(pending)}")
    if sr.other_config.get("gc") == "false":
        fact = "its garbage collector is switched off: chains only grow"
        fix = f"xe sr-param-remove param-name=other-config param-key=gc uuid={sr.uuid}"
        yield Finding(Severity.WARNING, "chain", sr.name, fact, fix)
    yield Finding(Severity.OK, "sr", sr.name, f"type {sr.type}, {kind}, {_gib(free)} free, disks of {vms} VMs")


def _vms(inventory: Inventory) -> Iterator[Finding]:
    for vm in sorted(filter(is_backed_up, inventory.vms.values()), key=lambda vm: (vm.name, vm.uuid)):
        disks = disks_of(inventory, vm)
        wanted = [disk for disk in disks if disk.left_out is None]
        for disk in disks:
            if disk.left_out is not None and disk.vbd.type != "CD" and disk.vdi is not None:
                yield Finding(Severity.NOTE, "vm", vm.name, f"disk {disk.vbd.position} is left out: {disk.left_out}")
        if not wanted:
            yield Finding(Severity.NOTE, "vm", vm.name, "has no disk that can be backed up")
        if "snapshot" in vm.blocked_operations:
            fix = f"xe vm-param-remove param-name=blocked-operations param-key=snapshot uuid={vm.uuid}"
            fact = f"its snapshots are blocked: {vm.blocked_operations['snapshot'][:200]}"
            yield Finding(Severity.WARNING, "vm", vm.name, fact, fix)
        yield from _fitness(inventory, vm, wanted)


def _fitness(inventory: Inventory, vm: Vm, disks: list[Disk]) -> Iterator[Finding]:
    """What a run would say of the VM (``fitness``), and what it would soon say."""
    vdis = [(f"disk {disk.vbd.position}", disk.vdi) for disk in disks if disk.vdi is not None]
    for fact in obstacles(inventory, vdis):
        fix = "delete snapshots of the VM and let the SR coalesce, or free space on the SR"
        yield Finding(Severity.WARNING, "vm", vm.name, fact, fix)
    backlog = backlog_of(inventory, vdis)
    if backlog.vhds:
        fact = f"{backlog.told}; runs wait while their number falls"
        yield Finding(Severity.NOTE, "chain", vm.name, fact, "if it does not: see /var/log/SMlog for SMGC")
    for name, vdi in vdis:
        depth = inventory.chain(vdi).depth
        if CHAIN_LONG <= depth < CHAIN_REFUSED:
            fact = f"{name} is a chain of {depth} VHDs; from {CHAIN_REFUSED} on it is not snapshotted"
            fix = "delete snapshots of the VM and let the SR coalesce"
            yield Finding(Severity.WARNING, "chain", vm.name, fact, fix)


def _dom0(inventory: Inventory, report: SweepReport) -> Iterator[Finding]:
    """Disks held by control domains: backups at work, or what is left of broken ones."""
    ours = {step.uuid for step in report.done} | {kept.uuid for kept in report.kept} | {n.uuid for n in report.notes}
    for vm in inventory.vms.values():
        if not vm.is_control_domain:
            continue
        for vbd in inventory.disks(vm):
            vdi = inventory.vdi_of(vbd)
            if vdi is not None and vbd.type == "Disk" and vdi.uuid not in ours:
                fact = f"holds disk {vdi.name} ({vdi.uuid}): a backup reads it, or one broke off"
                fix = f"if nothing reads it: xe vbd-unplug uuid={vbd.uuid}; xe vbd-destroy uuid={vbd.uuid}"
                yield Finding(Severity.WARNING, "dom0", vm.name, fact, fix)


def _leftovers(report: SweepReport) -> Iterator[Finding]:
    for step in report.done:
        fact = f"left by a run that died: {step.deed.value} {step.uuid}"
        yield Finding(Severity.WARNING, "leftover", step.name, fact, "xbfs pool sweep, or the next run does it")
    for note in report.notes:
        yield Finding(Severity.NOTE, "leftover", note.name, f"{note.cls} {note.uuid} {note.reason}")


def _wanted(inventory: Inventory, vm: Vm) -> list[Disk]:
    return [disk for disk in disks_of(inventory, vm) if disk.left_out is None]


def _gib(size_bytes: int) -> str:
    return f"{size_bytes / GIB:.1f} GiB"
