"""Which restore points damage hits: walks the maps of all points for places that can not be read.

Runs only where there is damage. Subtrees without damage are remembered as such (a bit a node) and not entered again, so
the cost is one walk over all nodes plus, for every point, the way down to its damage. One thread.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from xbfs_engine.catalog.node import node_span, top_level
from xbfs_engine.codec.envelope import ObjectKind
from xbfs_engine.maintain.places import Places
from xbfs_engine.maintain.references import FAILURES
from xbfs_engine.maintain.report import HITS_MAX, RANGES_MAX, ByteRange, DiskHit, PointHit
from xbfs_engine.store.pack import pack_name

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from xbfs_engine.catalog.blockmap import NodeStore
    from xbfs_engine.catalog.restore_point import DiskRecord, RestorePoint
    from xbfs_engine.core.ids import BlobHash, ChunkRef
    from xbfs_engine.maintain.findings import Findings


@dataclass(slots=True)
class _Lost:
    """What one damage takes from one disk; ranges arrive ascending."""

    bytes: int = 0
    ranges: list[ByteRange] = field(default_factory=list)
    _end: int = -1

    def add(self, offset: int, length: int) -> None:
        if self._end == offset and self.bytes == sum(item.length for item in self.ranges):
            last = self.ranges[-1]
            self.ranges[-1] = ByteRange(last.offset, last.length + length)
        elif len(self.ranges) < RANGES_MAX:
            self.ranges.append(ByteRange(offset, length))
        self.bytes += length
        self._end = offset + length


class Impact:
    """Hits of all damage on all points."""

    def __init__(self, nodes: NodeStore, findings: Findings, tick: Callable[[], None]) -> None:
        self._nodes = nodes
        self._findings = findings
        self._tick = tick
        self._clean = Places()
        self._listed: dict[str, int] = {}
        self._disk: DiskRecord | None = None
        self._lost: dict[str, _Lost] = {}
        self._all = _Lost()

    def assess(self, points: Sequence[RestorePoint]) -> list[PointHit]:
        """Add the hits to the findings; returns every point hit, in order, with sums over all damage."""
        hit: list[PointHit] = []
        for point in points:
            disks = [found for disk in point.disks if (found := self._assess_disk(point, disk)) is not None]
            if disks:
                hit.append(PointHit(point.id, point.vm_name, point.time_ns, tuple(disks)))
        for blob, count in self._listed.items():
            if count > HITS_MAX:
                self._findings.hits_omitted(blob, count - HITS_MAX)
        return hit

    def _assess_disk(self, point: RestorePoint, disk: DiskRecord) -> DiskHit | None:
        if disk.root is None:
            return None
        self._disk, self._lost, self._all = disk, {}, _Lost()
        if disk.root.level != top_level(disk.chunks):
            self._hit(f"points/{point.id}", 0, disk.chunks)
        else:
            self._visit(disk.root.ref, disk.root.level, 0)
        for blob, lost in self._lost.items():
            if not self._findings.listed(blob):
                continue
            count = self._listed[blob] = self._listed.get(blob, 0) + 1
            if count <= HITS_MAX:
                found = DiskHit(disk.number, lost.bytes, tuple(lost.ranges))
                self._findings.hit(blob, PointHit(point.id, point.vm_name, point.time_ns, (found,)))
        return DiskHit(disk.number, self._all.bytes, tuple(self._all.ranges)) if self._lost else None

    def _visit(self, ref: ChunkRef, level: int, base: int) -> bool:
        """Walk one node, whose first chunk is ``base``; whether nothing below it is damaged."""
        if self._clean.mask(ref.pack) >> ref.ordinal & 1:
            return True
        places = self._findings.places
        blob = pack_name(ObjectKind.METADATA_PACK, ref.pack)
        try:
            damaged = places.mask(ref.pack) >> ref.ordinal & 1
            node = None if damaged else self._nodes.get(ref, level)
        except FAILURES:
            node = None
        if node is None:
            self._hit(blob, base, node_span(level))
            return False
        self._tick()
        clean = True
        for slot, child in node.children():
            if level:
                clean &= self._visit(child, level - 1, base + slot * node_span(level - 1))
            elif places.mask(child.pack) >> child.ordinal & 1:
                self._hit_chunk(child.pack, base + slot)
                clean = False
        if clean:
            self._clean.add(ref.pack, ref.ordinal)
        return clean

    def _hit_chunk(self, pack: BlobHash, chunk: int) -> None:
        self._hit(pack_name(ObjectKind.DATA_PACK, pack), chunk, 1)

    def _hit(self, blob: str, first_chunk: int, chunks: int) -> None:
        disk = self._disk
        assert disk is not None
        offset = first_chunk * disk.chunk_size
        length = min(chunks * disk.chunk_size, disk.size_bytes - offset)
        if length > 0:
            self._lost.setdefault(blob, _Lost()).add(offset, length)
            self._all.add(offset, length)
