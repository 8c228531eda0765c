"""What a rewind will do or has done, disk by disk. Records only."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from xbfs_engine.catalog.restore_point import RestorePoint
    from xbfs_engine.codec.wire import Value


class Way(StrEnum):
    """How the difference between a disk and the point was found."""

    MAPS = "maps"  # the block maps of two points: nothing of the disk is read
    CHANGED_BLOCKS = "cbt"  # the same, and what changed since the newer point is read and compared
    FULL = "full"  # all of the disk is read and compared


@dataclass(frozen=True, slots=True)
class DiskReport:
    """One disk. ``read_bytes``: what had to be read to know; ``differing_bytes``: what is written.

    ``exact``: False for the dry run of a VM that runs: what it wrote since its newest point is not known.
    ``replaced_by``: uuid of the VDI that took the place of one that could not be written; ``vdi_uuid`` is the old one.
    """

    number: int
    name: str
    vdi_uuid: str
    size_bytes: int
    point_size_bytes: int
    way: Way
    reason: str
    read_bytes: int
    differing_bytes: int
    exact: bool
    replaced_by: str | None = None

    def to_record(self) -> dict[str, Value]:
        """For --json."""
        return {name: getattr(self, name) for name in self.__slots__}


@dataclass(frozen=True, slots=True)
class RewindReport:
    """``point``: where the VM went to. ``safety_point``: as it was before; None if none was wanted or needed.

    ``untouched``: disks of the VM that the point does not have. ``written``: False for a dry run and where nothing
    differs. ``started``: the VM was started afterwards.
    """

    vm_uuid: str
    vm_name: str
    point: RestorePoint
    safety_point: RestorePoint | None
    disks: Sequence[DiskReport]
    untouched: Sequence[str]
    written: bool
    started: bool
