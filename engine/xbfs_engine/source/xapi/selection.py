"""Which VMs and which of their disks are backed up, and why not the others. Pure, on an inventory.

Patterns: a name, a uuid, ``tag:NAME``, or a name with ``*`` and ``?``. Templates, snapshots and control domains are
never meant. Honours what Xen Orchestra's users know: the tag ``xo:no-bak`` on a VM, ``[NOBAK]`` in a disk's name.
"""

from __future__ import annotations

import fnmatch
import re
from typing import TYPE_CHECKING, Final, NamedTuple, NoReturn

from xbfs_engine.core.errors import ObjectNotFound

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence

    from xbfs_engine.source.xapi.inventory import Inventory, Vbd, Vdi, Vm

TAG: Final = "tag:"
NO_BACKUP_NAME: Final = "[NOBAK]"
_NO_BACKUP_TAG: Final = re.compile(r"xo:no-bak(=.*)?", re.DOTALL)
"""With or without a reason (Xen Orchestra, "Exclude VMs")."""

_SHOWN_MAX: Final = 5


class Skipped(NamedTuple):
    """A VM that a pattern means but that is not backed up."""

    vm: Vm
    reason: str


class Selection(NamedTuple):
    """VMs in the order of the patterns, each once."""

    vms: tuple[Vm, ...]
    skipped: tuple[Skipped, ...]


class Disk(NamedTuple):
    """A disk of a VM. ``left_out``: why it is not backed up; None if it is. ``vdi`` is there if it is.

    ``fails_snapshot``: VM.snapshot fails unless told to ignore it (ignore_vdis).
    """

    vbd: Vbd
    vdi: Vdi | None
    left_out: str | None
    fails_snapshot: bool


def select_vms(inventory: Inventory, patterns: Sequence[str]) -> Selection:
    """The VMs that ``patterns`` mean. Raises ObjectNotFound for one that means none, or a name of several VMs."""
    vms: dict[str, Vm] = {}
    skipped: dict[str, Skipped] = {}
    candidates = sorted(filter(is_backed_up, inventory.vms.values()), key=lambda vm: (vm.name, vm.uuid))
    for pattern in patterns:
        for vm in _matching(candidates, pattern):
            tag = next(filter(_NO_BACKUP_TAG.fullmatch, vm.tags), None)
            if tag is None:
                vms[vm.uuid] = vm
            else:
                skipped[vm.uuid] = Skipped(vm, f"tagged {tag}")
    return Selection(tuple(vms.values()), tuple(skipped.values()))


def one_vm(inventory: Inventory, text: str) -> Vm:
    """The VM with this name or uuid. Raises ObjectNotFound."""
    return _exact(list(filter(is_backed_up, inventory.vms.values())), text) or _nothing(text)


def is_backed_up(vm: Vm) -> bool:
    """Whether it is a VM that somebody works with."""
    return not (vm.is_a_template or vm.is_a_snapshot or vm.is_control_domain)


def disks_of(inventory: Inventory, vm: Vm, exclude: Collection[int] = ()) -> list[Disk]:
    """All disks of a VM with a decision each. ``exclude``: numbers (userdevice) that are not wanted.

    Raises ObjectNotFound for a number in ``exclude`` that the VM has not.
    """
    vbds = inventory.disks(vm)
    unknown = set(exclude) - {vbd.number for vbd in vbds}
    if unknown:
        have = ", ".join(vbd.position for vbd in vbds) or "none"
        raise ObjectNotFound(f"VM {vm.name} has no disk {min(unknown)}", hint=f"its disks: {have}")
    return [_decide(inventory, vbd, exclude) for vbd in vbds]


def _decide(inventory: Inventory, vbd: Vbd, exclude: Collection[int]) -> Disk:
    vdi = inventory.vdi_of(vbd)
    if vbd.type == "CD":
        return Disk(vbd, vdi, "a CD drive", fails_snapshot=False)
    if vdi is None:
        return Disk(vbd, None, "no disk in the drive", fails_snapshot=False)
    reason = _against_snapshot(inventory, vdi)
    if reason is not None:
        return Disk(vbd, vdi, reason, fails_snapshot=True)
    if vbd.number is None:
        reason = f"its position {vbd.position} is no number"
    elif vbd.number in exclude:
        reason = "excluded on request"
    elif NO_BACKUP_NAME in vdi.name:
        reason = f"{NO_BACKUP_NAME} in its name"
    return Disk(vbd, vdi, reason, fails_snapshot=False)


def _against_snapshot(inventory: Inventory, vdi: Vdi) -> str | None:
    """Why VM.snapshot would fail as a whole (VDI_IS_SHARABLE, VDI_ON_BOOT_MODE_…, UNIMPLEMENTED_IN_SM_BACKEND)."""
    sr = inventory.srs.get(vdi.sr)
    if vdi.sharable:
        return "shared between VMs: it can not be snapshotted"
    if vdi.reset_on_boot:
        return "reset at every boot: it can not be snapshotted"
    if vdi.is_raw:
        return "raw: the SR can not snapshot it"
    if sr is None or not sr.takes_snapshots:
        return f"SR {sr.name if sr else vdi.sr} takes no snapshots"
    return None


def _matching(candidates: Sequence[Vm], pattern: str) -> Sequence[Vm]:
    exact = _exact(candidates, pattern)
    if exact is not None:
        return [exact]
    if pattern.startswith(TAG):
        return _those(candidates, pattern, lambda vm: pattern.removeprefix(TAG) in vm.tags)
    if "*" in pattern or "?" in pattern:
        # Only these two: brackets are common in names.
        expression = re.compile(fnmatch.translate(pattern.replace("[", "[[]")))
        return _those(candidates, pattern, lambda vm: expression.fullmatch(vm.name) is not None)
    return _nothing(pattern)


def _those(candidates: Sequence[Vm], pattern: str, meant: Callable[[Vm], bool]) -> Sequence[Vm]:
    return list(filter(meant, candidates)) or _nothing(pattern)


def _exact(candidates: Sequence[Vm], text: str) -> Vm | None:
    found = [vm for vm in candidates if vm.uuid == text] or [vm for vm in candidates if vm.name == text]
    if len(found) > 1:
        uuids = ", ".join(sorted(vm.uuid for vm in found)[:_SHOWN_MAX])
        raise ObjectNotFound(f"{len(found)} VMs are called {text!r}", hint=f"give a uuid: {uuids}")
    return found[0] if found else None


def _nothing(pattern: str) -> NoReturn:
    raise ObjectNotFound(f"no VM of the pool matches {pattern!r}", hint="list them with `xe vm-list`")
