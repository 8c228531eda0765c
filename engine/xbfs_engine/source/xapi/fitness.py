"""Whether a VM's disks can take another snapshot: one rule, for `pool check` and for every run. Pure.

A VHD of the VM's own chains that waits to be coalesced is no sickness: every snapshot that goes leaves one. It is one
when their number does not fall, for a chain that only grows ends the backups of its VM (SM, SR_BACKEND_FAILURE_109).
So a run waits as long as the number falls; a chain that is nearly full is refused at once, as a thick SR without room.
"""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Final, NamedTuple

from xbfs_engine.core.limits import GIB
from xbfs_engine.source.xapi.inventory import CHAIN_MAX

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from xbfs_engine.source.xapi.inventory import Inventory, Vdi

CHAIN_REFUSED: Final = CHAIN_MAX - 2
"""Ours: a snapshot of ours makes one VHD more, and the next may come before it was coalesced."""

CHAIN_LONG: Final = CHAIN_MAX - 5
"""Ours: from here on a few snapshots more end the backups of a VM."""

ROOM_KEY: Final = "xbfs:check-room"
"""In other_config of an SR: "false" lets the SR itself decide whether it has room for a snapshot."""


class Backlog(NamedTuple):
    """VHDs that an SR has yet to coalesce: below one VM's disks. ``told``: by disk, for people."""

    vhds: int
    told: str


def backlog_of(inventory: Inventory, disks: Iterable[tuple[str, Vdi]]) -> Backlog:
    """What is waited for. ``disks``: with what each is called."""
    found: set[str] = set()
    told = []
    for name, vdi in disks:
        pending = inventory.chain(vdi).pending
        found.update(pending)
        if pending:
            told.append(f"{name}: {_vhds(len(pending))} to be coalesced")
    return Backlog(len(found), "; ".join(told))


def obstacles(inventory: Inventory, disks: Sequence[tuple[str, Vdi]]) -> list[str]:
    """What forbids a snapshot of these disks, in words and numbers."""
    long = [
        f"{name}: its chain has {depth} VHDs, and is not snapshotted from {CHAIN_REFUSED} on ({CHAIN_MAX} is the end)"
        for name, vdi in disks
        if (depth := inventory.chain(vdi).depth) >= CHAIN_REFUSED
    ]
    return long + _without_room(inventory, [vdi for _, vdi in disks])


def _without_room(inventory: Inventory, vdis: Sequence[Vdi]) -> list[str]:
    """Thick SRs: a snapshot takes the full size of each disk once more (SM, LVHD)."""
    needed: dict[str, int] = defaultdict(int)
    for vdi in vdis:
        needed[vdi.sr] += vdi.size_bytes
    told = []
    for ref, size in needed.items():
        sr = inventory.srs.get(ref)
        if sr is None or not sr.thick or sr.other_config.get(ROOM_KEY) == "false":
            continue
        free = sr.size_bytes - sr.used_bytes
        if size > free:
            told.append(f"a snapshot needs {_gib(size)} on SR {sr.name}, which is thick and has {_gib(free)} free")
    return told


def _vhds(count: int) -> str:
    return "1 VHD waits" if count == 1 else f"{count} VHDs wait"


def _gib(size_bytes: int) -> str:
    return f"{size_bytes / GIB:.3f} GiB"
