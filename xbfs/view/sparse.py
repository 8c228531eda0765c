"""Where an image holds data and where holes are, as SEEK_DATA and SEEK_HOLE ask, from the manifest alone. Immutable."""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

import numpy as np

from xbfs_engine.core.limits import MIB

if TYPE_CHECKING:
    from numpy.typing import NDArray


class SparseMap:
    """Runs of data of an image of ``size_bytes``: ``starts`` and ``ends`` in bytes, ascending, disjoint."""

    __slots__ = ("_ends", "_size", "_starts")

    def __init__(self, starts: NDArray[np.int64], ends: NDArray[np.int64], size_bytes: int) -> None:
        self._starts = starts
        self._ends = ends
        self._size = size_bytes

    @classmethod
    def of_disk(cls, data_map: bytes, size_bytes: int) -> Self:
        """The runs of a disk by its data map: a bit for every MiB, from the most significant."""
        bits = np.unpackbits(np.frombuffer(data_map, np.uint8))[: -(-size_bytes // MIB)].astype(np.int8)
        edges = np.diff(bits, prepend=0, append=0)
        starts = np.flatnonzero(edges == 1).astype(np.int64) * MIB
        ends = np.flatnonzero(edges == -1).astype(np.int64) * MIB
        return cls(starts, np.minimum(ends, size_bytes), size_bytes)

    @classmethod
    def solid(cls, size_bytes: int) -> Self:
        """All data."""
        return cls(np.zeros(1, np.int64), np.full(1, size_bytes, np.int64), size_bytes)

    def data_from(self, offset: int) -> int | None:
        """The first byte of data at or behind ``offset``, or None."""
        run = int(np.searchsorted(self._ends, offset, "right"))
        return None if offset >= self._size or run == len(self._ends) else max(offset, int(self._starts[run]))

    def hole_from(self, offset: int) -> int | None:
        """The first byte of a hole at or behind ``offset``: the end of the image is one. None at or behind the end."""
        if offset >= self._size:
            return None
        run = int(np.searchsorted(self._ends, offset, "right"))
        inside = run < len(self._ends) and self._starts[run] <= offset
        return int(self._ends[run]) if inside else offset
