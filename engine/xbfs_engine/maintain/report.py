"""What `check` and `verify` hand back: findings, and which restore points each damage hits. Records only, no logic.

Every list is bounded (constants below); what did not fit is counted, and ``points_hit`` is complete whatever was left
out.
"""

from __future__ import annotations

import datetime
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from xbfs_engine.codec.wire import Value
    from xbfs_engine.core.ids import PointId

FINDINGS_MAX: Final = 1000
"""Damages, and as many notes, that are listed one by one."""
HITS_MAX: Final = 128
"""Disks of points listed under one damage."""
RANGES_MAX: Final = 16
"""Byte ranges listed for one disk under one damage."""


class Severity(StrEnum):
    """Damage makes the command fail; a note is worth knowing and asks for nothing."""

    DAMAGE = "damage"
    NOTE = "note"


class Kind(StrEnum):
    """What a finding is about."""

    CONFIG = "config"
    KEY_SLOT = "key slot"
    POINT = "restore point"
    INDEX = "index"
    DATA_PACK = "data pack"
    METADATA_PACK = "metadata pack"
    FILE_INDEX = "file index"
    BOOT_TEST = "boot test"
    BLOB = "blob"
    ROLE = "role"


class ByteRange(NamedTuple):
    """Bytes of a disk."""

    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class DiskHit:
    """What of one disk can not be read. ``ranges`` ascend and are the first RANGES_MAX; ``lost_bytes`` counts all."""

    number: int
    lost_bytes: int
    ranges: tuple[ByteRange, ...]

    def to_record(self) -> dict[str, Value]:
        """For --json."""
        listed = sum(length for _, length in self.ranges)
        return {
            "number": self.number,
            "lost_bytes": self.lost_bytes,
            "ranges": [list(item) for item in self.ranges],
            "ranges_complete": listed == self.lost_bytes,
        }


@dataclass(frozen=True, slots=True)
class PointHit:
    """A restore point that damage hits. Name and time are None where its manifest can not be read."""

    point: PointId
    vm_name: str | None
    time_ns: int | None
    disks: tuple[DiskHit, ...]

    def to_record(self) -> dict[str, Value]:
        """For --json; ``time`` is ISO 8601 in UTC."""
        return {
            "point": self.point,
            "vm": self.vm_name,
            "time": _iso(self.time_ns),
            "disks": [disk.to_record() for disk in self.disks],
        }


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing found. ``blob`` is the name of the blob it is about, or a folder; ``detail`` may be empty."""

    severity: Severity
    kind: Kind
    blob: str
    message: str
    detail: str
    points: tuple[PointHit, ...] = ()
    points_omitted: int = 0
    """Disks of points that are hit too, beyond HITS_MAX."""

    def to_record(self) -> dict[str, Value]:
        """For --json."""
        return {
            "severity": self.severity.value,
            "kind": self.kind.value,
            "blob": self.blob,
            "message": self.message,
            "detail": self.detail,
            "points": [point.to_record() for point in self.points],
            "points_omitted": self.points_omitted,
        }


@dataclass(frozen=True, slots=True)
class Examined:
    """How much was looked at. ``nodes`` and ``references`` count what all points share once."""

    points: int
    index_blobs: int
    packs: int
    nodes: int
    references: int
    chunks: int
    read_bytes: int


@dataclass(frozen=True, slots=True)
class Report:
    """The outcome of a check (``deep`` False) or a verify (True).

    ``points_hit``: every restore point that any damage hits, by time, with all hit disks; ranges are under the
    findings. ``damages`` and ``notes`` count all, listed in ``findings`` or not.
    """

    deep: bool
    findings: tuple[Finding, ...]
    damages: int
    notes: int
    points_hit: tuple[PointHit, ...]
    examined: Examined

    @property
    def healthy(self) -> bool:
        """Whether there is no damage."""
        return not self.damages

    def to_record(self) -> dict[str, Value]:
        """For --json."""
        return {
            "command": "verify" if self.deep else "check",
            "healthy": self.healthy,
            "damages": self.damages,
            "notes": self.notes,
            "findings": [finding.to_record() for finding in self.findings],
            "points_hit": [
                {
                    "point": point.point,
                    "vm": point.vm_name,
                    "time": _iso(point.time_ns),
                    "disks": [{"number": disk.number, "lost_bytes": disk.lost_bytes} for disk in point.disks],
                }
                for point in self.points_hit
            ],
            "examined": {name: getattr(self.examined, name) for name in Examined.__slots__},
        }


def _iso(time_ns: int | None) -> str | None:
    if time_ns is None:
        return None
    return datetime.datetime.fromtimestamp(time_ns // 1_000_000_000, datetime.UTC).isoformat().replace("+00:00", "Z")
