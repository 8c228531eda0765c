"""The disks of a VM on their way through a cycle: as the VM has them, and as its snapshot holds them. Records only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from xbfs_engine.source.xapi.values import Ref


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
class TakenDisk:
    """A disk as the snapshot holds it. ``untracked``: why its changes are not tracked; None if they are."""

    disk: VmDisk
    snapshot_ref: Ref
    snapshot_uuid: str
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
