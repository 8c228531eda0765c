"""The disks of a VM on their way through a cycle: as the VM has them, and as its snapshot holds them. Records only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from xbfs_engine.source.xapi.markers import slot_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from xbfs_engine.source.xapi.fitness import Backlog
    from xbfs_engine.source.xapi.ledger import Item
    from xbfs_engine.source.xapi.values import Ref


class LeftOut(NamedTuple):
    """A disk that is not backed up. ``harmful``: VM.snapshot fails unless it is told to ignore the disk."""

    number: int
    vdi_ref: Ref
    reason: str
    harmful: bool


@dataclass(frozen=True, slots=True)
class VmDisk:
    """A disk that is backed up. ``number``: userdevice of its VBD.

    ``tracked``: changed-block tracking is on. ``untrackable``: why it never can be, if that is known.
    """

    number: int
    name: str
    vdi_ref: Ref
    vdi_uuid: str
    sr_ref: Ref
    tracked: bool
    untrackable: str | None


@dataclass(frozen=True, slots=True)
class ChosenVm:
    """A VM that is backed up. ``left_out``: disks with a VDI only, not CDs.

    ``backlog``: what its SRs still have to coalesce of its disks. ``obstacles``: why it can not be snapshotted.
    """

    ref: Ref
    uuid: str
    name: str
    disks: Sequence[VmDisk]
    left_out: Sequence[LeftOut]
    backlog: Backlog
    obstacles: Sequence[str]


@dataclass(frozen=True, slots=True)
class TakenDisk:
    """A disk as the snapshot holds it. ``untracked``: why its changes are not tracked; None if they are.

    ``item``: the snapshot's VDI in the ledger.
    """

    disk: VmDisk
    snapshot_ref: Ref
    snapshot_uuid: str
    item: Item
    size_bytes: int
    untracked: str | None

    @property
    def number(self) -> int:
        """Userdevice of the VBD."""
        return self.disk.number

    @property
    def vdi_uuid(self) -> str:
        """Of the VM's VDI, not of the snapshot."""
        return self.disk.vdi_uuid


class Needless(NamedTuple):
    """A snapshot VDI of a disk that is not backed up: old pools can not leave it out."""

    ref: Ref
    item: Item


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A snapshot VM of ours, and its VDIs. ``item``: the VM in the ledger."""

    vm_ref: Ref
    item: Item
    disks: Sequence[TakenDisk]
    needless: Sequence[Needless]


class Bases(NamedTuple):
    """Whose bases they are. ``previous``: by disk number, the base of the point before."""

    repository_id: str
    vm_uuid: str
    previous: Mapping[int, str]

    def slot(self, number: int) -> str:
        """The slot of a disk."""
        return slot_of(self.repository_id, self.vm_uuid, number)
