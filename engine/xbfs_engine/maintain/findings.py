"""Gathers findings while a repository is examined: one per blob, bounded, and the set of places that can not be read.

Any thread may add; ``places`` is read once all threads are done, or for packs whose own examination is over.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from xbfs_engine.codec.envelope import ObjectKind
from xbfs_engine.maintain.places import Places
from xbfs_engine.maintain.report import FINDINGS_MAX, Finding, Kind, PointHit, Severity
from xbfs_engine.store.pack import pack_name

if TYPE_CHECKING:
    from xbfs_engine.core.ids import BlobHash

_DETAIL_MAX = 2000
PACK_KINDS = {ObjectKind.DATA_PACK: Kind.DATA_PACK, ObjectKind.METADATA_PACK: Kind.METADATA_PACK}


@dataclass(slots=True)
class _Draft:
    """A finding that may still grow."""

    severity: Severity
    kind: Kind
    message: str
    details: list[str]
    points: list[PointHit] = field(default_factory=list)
    points_omitted: int = 0


class Findings:
    """All findings of one examination."""

    def __init__(self) -> None:
        self.places = Places()
        """Chunks and nodes that can not be read, by the place that refers to them."""
        self.damages = self.notes = 0
        self._drafts: dict[str, _Draft] = {}
        self._lock = threading.Lock()

    def damage(self, kind: Kind, blob: str, message: str, detail: str = "") -> None:
        """Something is broken. A second damage of a blob becomes a detail of the first."""
        with self._lock:
            known = self._drafts.get(blob)
            if known is not None and known.severity is Severity.DAMAGE:
                text = f"{message}: {detail}" if detail else message
                if sum(map(len, known.details)) < _DETAIL_MAX and text not in known.details:
                    known.details.append(text)
                return
            self.damages += 1
            if known is not None:
                self.notes -= 1
            if self.damages <= FINDINGS_MAX:
                self._drafts[blob] = _Draft(Severity.DAMAGE, kind, message, [detail] if detail else [])

    def damaged_pack(self, kind: ObjectKind, pack: BlobHash, message: str, detail: str = "", *, mask: int) -> None:
        """A pack is broken; of what it holds, the ordinals in ``mask`` can not be read."""
        with self._lock:
            self.places.add_mask(pack, mask)
        self.damage(PACK_KINDS[kind], pack_name(kind, pack), message, detail)

    def note(self, kind: Kind, blob: str, message: str, detail: str = "") -> None:
        """Something worth knowing."""
        with self._lock:
            if blob not in self._drafts:
                self.notes += 1
                if self.notes <= FINDINGS_MAX:
                    self._drafts[blob] = _Draft(Severity.NOTE, kind, message, [detail] if detail else [])

    def listed(self, blob: str) -> bool:
        """Whether there is a damage of this blob to list hits under."""
        draft = self._drafts.get(blob)
        return draft is not None and draft.severity is Severity.DAMAGE

    def hit(self, blob: str, hit: PointHit) -> None:
        """Say that the damage of a blob hits a point; disks of one point are joined if told one after the other."""
        points = self._drafts[blob].points
        if points and points[-1].point == hit.point:
            points[-1] = replace(hit, disks=points[-1].disks + hit.disks)
        else:
            points.append(hit)

    def hits_omitted(self, blob: str, disks: int) -> None:
        """Say that the damage of a blob hits so many disks that are not listed."""
        self._drafts[blob].points_omitted = disks

    def listing(self) -> tuple[Finding, ...]:
        """Damages first, each in order of discovery."""
        found = [
            Finding(
                draft.severity,
                draft.kind,
                blob,
                draft.message,
                "; ".join(draft.details),
                tuple(draft.points),
                draft.points_omitted,
            )
            for blob, draft in self._drafts.items()
        ]
        return tuple(sorted(found, key=lambda finding: finding.severity is not Severity.DAMAGE))


def ordinals_text(mask: int, count: int) -> str:
    """Ordinals as people read them, at most eight runs: "3, 7-9 and more"."""
    runs: list[str] = []
    ordinal = 0
    while ordinal < count and len(runs) < 8:
        if mask >> ordinal & 1:
            first = ordinal
            while ordinal + 1 < count and mask >> (ordinal + 1) & 1:
                ordinal += 1
            runs.append(f"{first}" if first == ordinal else f"{first}-{ordinal}")
        ordinal += 1
    more = " and more" if ordinal < count and mask >> ordinal else ""
    return ", ".join(runs) + more
