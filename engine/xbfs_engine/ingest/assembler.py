"""Puts finished segments back in order and streams them into the block map.

Workers submit from any thread. A leaf can be written once all packs its chunks went into have their names, which is
when they are durable; until then it waits here. ``WINDOW`` bounds how many wait: whoever would go beyond it closes its
own pack first, so that the head of the line can move.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, NamedTuple

from xbfs_engine.catalog.mibmap import MibMap
from xbfs_engine.core.limits import LEAF_FANOUT, MAP_PENDING_ENTRIES_MAX, MIB
from xbfs_engine.store.packer import PackTicket

if TYPE_CHECKING:
    from collections.abc import Sequence

    from xbfs_engine.catalog.mapwriter import Child, MapWriter

WINDOW = MAP_PENDING_ENTRIES_MAX // LEAF_FANOUT


class LeafResult(NamedTuple):
    """A processed segment: all children of its leaf. ``stored``: whether any of them is new."""

    number: int
    leaf: int
    children: Sequence[Child | None]
    stored: bool

    def named(self) -> bool:
        """Whether every pack the children lie in has its name."""
        for child in self.children:
            if child is not None:
                pack = child[1].pack
                if isinstance(pack, PackTicket) and pack.pack is None:
                    return False
        return True


class DataMap:
    """Makes the MibMap of a disk. Not thread-safe."""

    def __init__(self, size_bytes: int, chunk_size: int, base: bytes = b"") -> None:
        mibs = -(-size_bytes // MIB)
        self._bits = bytearray(-(-mibs // 8))
        self._bits[: len(base)] = base
        self._mibs = mibs
        self._chunks_per_mib = max(1, MIB // chunk_size)

    def set_leaf(self, leaf: int, children: Sequence[Child | None]) -> None:
        """Take over a leaf."""
        per_mib = self._chunks_per_mib
        first = leaf * LEAF_FANOUT // per_mib
        for number in range(min(LEAF_FANOUT // per_mib, self._mibs - first)):
            at = first + number
            mask = 0x80 >> (at & 7)
            if any(child is not None for child in children[number * per_mib : (number + 1) * per_mib]):
                self._bits[at >> 3] |= mask
            else:
                self._bits[at >> 3] &= ~mask

    def map(self) -> MibMap:
        """Which MiBs hold data."""
        return MibMap(bytes(self._bits))


class MapAssembler:
    """Orders results and writes the map. Any thread may submit."""

    def __init__(self, writer: MapWriter, data_map: DataMap) -> None:
        self._writer = writer
        self._data_map = data_map
        self._waiting: dict[int, LeafResult] = {}
        self._next = 0
        self._lock = threading.Lock()

    def submit(self, result: LeafResult) -> None:
        """Take a finished segment, and write whatever can be written now."""
        with self._lock:
            self._waiting[result.number] = result
            self._drain()

    def drain(self) -> None:
        """Write whatever can be written, after a pack was closed."""
        with self._lock:
            self._drain()

    @property
    def written(self) -> int:
        """Segments that are in the map; index of the head of the line."""
        return self._next

    def _drain(self) -> None:
        while (result := self._waiting.get(self._next)) is not None and result.named():
            del self._waiting[self._next]
            self._writer.put_leaf(result.leaf, result.children, maybe_known=not result.stored)
            self._data_map.set_leaf(result.leaf, result.children)
            self._next += 1

    def finished(self) -> bool:
        """Whether nothing waits."""
        return not self._waiting
