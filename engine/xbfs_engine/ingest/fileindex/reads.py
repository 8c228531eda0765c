"""Which chunks of a restore point's disks a guest was read from, and whether another point has the same ones.

What a reader says follows from the bytes it has read. So whatever was found by reading some chunks is what would be
found in every point that has the same chunks there, whatever lies between: partition table, volume manager, encryption.
"""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING, Final

import numpy as np

from xbfs_engine.catalog.blockmap import BlockMap, differing_chunks
from xbfs_engine.catalog.fileindex.records import DiskReads
from xbfs_engine.catalog.fileindex.root import RANGES_MAX
from xbfs_engine.guestfs.volumes import Disk

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from numpy.typing import NDArray

    from xbfs_engine.catalog.blockmap import NodeStore
    from xbfs_engine.catalog.restore_point import DiskRecord, RestorePoint
    from xbfs_engine.formats.source import BlockSource

CHANGED_MAX: Final = 4 << 20
"""Changed chunks of a disk that are remembered, 32 MiB of them; a disk with more counts as changed all over."""


class RecordedReads:
    """The disks of a point, remembering what is read of them. Any thread may read; ``reads`` once all have ended."""

    def __init__(self, point: RestorePoint, disks: Sequence[Disk]) -> None:
        self._records = {str(disk.number): disk for disk in point.disks}
        self._positions: dict[str, set[int]] = {disk.name: set() for disk in disks}
        self.disks = tuple(
            Disk(disk.name, _Recorded(disk.source, self._records[disk.name].chunk_size, self._positions[disk.name]))
            for disk in disks
        )

    def reads(self) -> tuple[DiskReads, ...]:
        """What was read of every disk, also of those of which nothing was."""
        found = []
        for name, positions in self._positions.items():
            record = self._records[name]
            found.append(DiskReads(record.number, record.size_bytes, record.chunk_size, ranges_of(positions)))
        return tuple(found)


class _Recorded:
    """A disk that adds the chunks it is read from to ``positions``."""

    def __init__(self, source: BlockSource, chunk_size: int, positions: set[int]) -> None:
        self._source = source
        self._chunk_size = chunk_size
        self._positions = positions

    @property
    def size_bytes(self) -> int:
        return self._source.size_bytes

    def read_at(self, offset: int, length: int) -> bytes:
        if length > 0:
            self._positions.update(range(offset // self._chunk_size, (offset + length - 1) // self._chunk_size + 1))
        return self._source.read_at(offset, length)


def ranges_of(positions: Iterable[int]) -> tuple[tuple[int, int], ...]:
    """Positions as at most RANGES_MAX ranges (first, count); where there were more, they take in what lies between."""
    numbers = np.unique(np.fromiter(positions, dtype=np.int64))
    step = 1
    while True:
        wide = np.unique(numbers // step)
        breaks = np.flatnonzero(np.diff(wide) > 1)
        if len(breaks) < RANGES_MAX:
            break
        step *= 2
    if not len(wide):
        return ()
    firsts = wide[np.concatenate([[0], breaks + 1])] * step
    lasts = wide[np.concatenate([breaks, [len(wide) - 1]])] * step + step
    return tuple(zip(firsts.tolist(), (lasts - firsts).tolist(), strict=True))


class Changes:
    """What differs between the disks of two points of a VM. One thread."""

    def __init__(self, old: RestorePoint, new: RestorePoint, nodes: NodeStore) -> None:
        self._old = old
        self._new = new
        self._nodes = nodes
        self._changed: dict[int, NDArray[np.int64] | None] = {}

    def hit(self, reads: Sequence[DiskReads]) -> bool:
        """Whether what was read of the old point may differ in the new one. Raises IntegrityError, StorageError."""
        if {read.disk for read in reads} != {disk.number for disk in self._new.disks}:
            return True
        return any(self._disk_hit(read) for read in reads)

    def _disk_hit(self, read: DiskReads) -> bool:
        old, new = self._old.disk(read.disk), self._new.disk(read.disk)
        if old is None or new is None:
            return True
        shape = (read.size_bytes, read.chunk_size)
        if (old.size_bytes, old.chunk_size) != shape or (new.size_bytes, new.chunk_size) != shape:
            return True
        if not read.ranges:
            return False
        if read.disk not in self._changed:
            self._changed[read.disk] = self._differing(old, new)
        changed = self._changed[read.disk]
        if changed is None:
            return True
        ranges = np.array(read.ranges, dtype=np.int64)
        before, within = np.searchsorted(changed, ranges[:, 0]), np.searchsorted(changed, ranges.sum(axis=1))
        return bool((before != within).any())

    def _differing(self, old: DiskRecord, new: DiskRecord) -> NDArray[np.int64] | None:
        """Positions that differ, ascending; None if there are too many."""
        before, after = (BlockMap(self._nodes, disk.root, disk.chunks) for disk in (old, new))
        found = array("q")
        for position, _ in differing_chunks(before, after, self._nodes):
            found.append(position)
            if len(found) > CHANGED_MAX:
                return None
        return np.frombuffer(found, dtype=np.int64) if found else np.zeros(0, dtype=np.int64)
