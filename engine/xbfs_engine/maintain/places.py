"""Compact sets for a repository of any size: places (pack, ordinal) as bits, and the table of all packs.

Neither keeps an id of a chunk. A PackTable is filled once and read by any thread; its flags, and Places, belong to one
thread or to whoever holds the lock of ``findings``.
"""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np

from xbfs_engine.codec.envelope import ObjectKind
from xbfs_engine.core.ids import ID_SIZE, BlobHash

if TYPE_CHECKING:
    from collections.abc import Iterable

ALL: Final = -1
"""As a mask: every ordinal of a pack."""

UNLISTED: Final = -1
_CACHE_MAX: Final = 4096


class Places:
    """A set of (pack, ordinal): a bit each, about 200 bytes for every pack that has any."""

    def __init__(self) -> None:
        self._masks: dict[BlobHash, int] = {}

    def __bool__(self) -> bool:
        return bool(self._masks)

    def add(self, pack: BlobHash, ordinal: int) -> bool:
        """Add a place; whether it is new."""
        mask = self._masks.get(pack, 0)
        if mask >> ordinal & 1:
            return False
        self._masks[pack] = mask | 1 << ordinal
        return True

    def add_mask(self, pack: BlobHash, mask: int) -> None:
        """Add every ordinal whose bit is set, or ALL."""
        if mask:
            self._masks[pack] = self._masks.get(pack, 0) | mask

    def mask(self, pack: BlobHash) -> int:
        """The ordinals of a pack that are in the set, as bits; negative if all are."""
        return self._masks.get(pack, 0)


class PackEntry(NamedTuple):
    """A pack as listed by the storage."""

    kind: ObjectKind
    pack: BlobHash
    size_bytes: int


class PackTable:
    """All packs the storage lists: 54 bytes each, sorted by hash; found by number."""

    def __init__(self, packs: Iterable[PackEntry]) -> None:
        hashes, kinds, sizes = bytearray(), bytearray(), array("Q")
        for kind, pack, size in packs:
            hashes += pack
            kinds.append(kind)
            sizes.append(size)
        rows = np.frombuffer(bytes(hashes), dtype=np.uint8).reshape(-1, ID_SIZE)
        keys = np.ascontiguousarray(rows[:, :8]).view(">u8").reshape(-1).astype(np.uint64)
        order = np.argsort(keys, kind="stable")
        self._keys = keys[order]
        self._hashes = rows[order].tobytes()
        self._kinds = np.frombuffer(bytes(kinds), dtype=np.uint8)[order].tobytes()
        self._sizes = np.array(sizes, dtype=np.uint64)[order]
        self._cache: dict[tuple[ObjectKind, BlobHash], int] = {}
        self.source = np.full(len(self._kinds), UNLISTED, dtype=np.int32)
        """By pack: the number of an index blob that lists it, or UNLISTED."""
        self.referenced = np.zeros(len(self._kinds), dtype=np.bool_)
        """By pack: whether a restore point refers to it."""

    def __len__(self) -> int:
        return len(self._kinds)

    def __getitem__(self, number: int) -> PackEntry:
        pack = BlobHash(self._hashes[number * ID_SIZE : (number + 1) * ID_SIZE])
        return PackEntry(ObjectKind(self._kinds[number]), pack, int(self._sizes[number]))

    def find(self, kind: ObjectKind, pack: BlobHash) -> int:
        """The number of a pack, or -1 if the storage does not list it."""
        found = self._cache.get((kind, pack))
        if found is None:
            if len(self._cache) >= _CACHE_MAX:
                self._cache.clear()
            found = self._cache[kind, pack] = self._search(kind, pack)
        return found

    def _search(self, kind: ObjectKind, pack: BlobHash) -> int:
        key = np.uint64(int.from_bytes(pack[:8], "big"))
        number = int(np.searchsorted(self._keys, key))
        while number < len(self) and self._keys[number] == key:
            entry = self[number]
            if entry.kind is kind and entry.pack == pack:
                return number
            number += 1
        return -1
