"""Metadata blocks of one volume: read, checked and kept in a bounded cache.

One thread at a time. What is cached has been checked; what fails its check raises GuestDamaged each time.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, Final, Generic, NamedTuple, TypeVar

from xbfs_engine.core.errors import GuestDamaged
from xbfs_engine.guestfs.crc32c import crc32c
from xbfs_engine.guestfs.xfs.geometry import SECTOR

if TYPE_CHECKING:
    from collections.abc import Hashable, Sequence

    from xbfs_engine.formats.source import BlockSource
    from xbfs_engine.guestfs.xfs.geometry import Geometry
    from xbfs_engine.guestfs.xfs.overlay import Overlay

CACHE_BYTES: Final = 8 << 20
"""Metadata blocks kept by one volume; a directory block is at most 64 KiB."""

Run = tuple[int, int]
"""Block number and count of blocks that follow each other on the disk."""


class Header(NamedTuple):
    """Where the header of a version 5 metadata block keeps what tells whose block it is."""

    crc_at: int
    sector_at: int
    uuid_at: int
    owner_at: int


TREE_HEADER: Final = Header(crc_at=12, sector_at=16, uuid_at=32, owner_at=48)
"""Nodes and leaves of directory and attribute trees (xfs_da3_blkinfo)."""
DIRECTORY_HEADER: Final = Header(crc_at=4, sector_at=8, uuid_at=24, owner_at=40)
"""Directory data (xfs_dir3_blk_hdr)."""
EXTENT_HEADER: Final = Header(crc_at=64, sector_at=24, uuid_at=40, owner_at=56)
"""Extent trees (xfs_btree_block_lhdr)."""
REMOTE_HEADER: Final = Header(crc_at=12, sector_at=40, uuid_at=16, owner_at=32)
"""Targets of symlinks and values of attributes (xfs_dsymlink_hdr, xfs_attr3_rmt_hdr)."""

_V = TypeVar("_V")


class Lru(Generic[_V]):
    """A cache that forgets what was used longest ago once the costs of all it holds exceed ``budget``."""

    def __init__(self, budget: int) -> None:
        self._budget = budget
        self._spent = 0
        self._held: OrderedDict[Hashable, tuple[_V, int]] = OrderedDict()

    def get(self, key: Hashable) -> _V | None:
        """What is held under the key, which is now the youngest."""
        found = self._held.get(key)
        if found is None:
            return None
        self._held.move_to_end(key)
        return found[0]

    def put(self, key: Hashable, value: _V, cost: int) -> None:
        """Hold a value; the key is not held yet."""
        self._held[key] = value, cost
        self._spent += cost
        while self._spent > self._budget:
            self._spent -= self._held.popitem(last=False)[1][1]


class Volume:
    """A source with its geometry."""

    def __init__(self, source: BlockSource, geometry: Geometry, overlay: Overlay | None = None) -> None:
        """``overlay`` is the source if the log was replayed: what comes from the log has no checksum of its own."""
        self.source = source
        self.geometry = geometry
        self._overlay = overlay
        self._blocks: Lru[bytes] = Lru(CACHE_BYTES)

    def read_blocks(self, block: int, count: int) -> bytes:
        """Blocks of content or metadata, unchecked and not cached."""
        return self.source.read_at(self.geometry.offset_of(block, count), count << self.geometry.block_log)

    def metadata(self, runs: Sequence[Run], header: Header, owner: int, what: str) -> bytes:
        """One metadata block, which may lie in several runs; with version 5 it is what it says, where and whose."""
        key = (*runs, header, owner)
        data = self._blocks.get(key)
        if data is None:
            data = b"".join(self.read_blocks(*run) for run in runs)
            if self.geometry.has_checksums:
                self._check_crc(data, runs, header, owner, what)
                self._check_place(data, runs[0], header, owner, what)
            self._blocks.put(key, data, len(data))
        return data

    def is_replayed(self, offset: int, length: int) -> bool:
        """Whether any of these bytes come from the log."""
        return self._overlay is not None and self._overlay.is_replaced(offset, length)

    def _check_crc(self, data: bytes, runs: Sequence[Run], header: Header, owner: int, what: str) -> None:
        offsets = [(self.geometry.offset_of(*run), run[1] << self.geometry.block_log) for run in runs]
        if any(self.is_replayed(*place) for place in offsets):
            return
        stored = int.from_bytes(data[header.crc_at : header.crc_at + 4], "little")
        found = crc32c(data[: header.crc_at] + bytes(4) + data[header.crc_at + 4 :])
        if found != stored:
            where = f"{what} of inode {owner} at sector {offsets[0][0] // SECTOR}"
            raise GuestDamaged(f"{where}: checksum is {found:08x}, recorded is {stored:08x}")

    def _check_place(self, data: bytes, first: Run, header: Header, owner: int, what: str) -> None:
        sector = self.geometry.offset_of(*first) // SECTOR
        where = f"{what} of inode {owner} at sector {sector}"
        if data[header.uuid_at : header.uuid_at + 16] != self.geometry.meta_uuid:
            raise GuestDamaged(f"{where}: the block belongs to another filesystem")
        recorded_sector = int.from_bytes(data[header.sector_at : header.sector_at + 8], "big")
        if recorded_sector != sector:
            raise GuestDamaged(f"{where}: the block says it belongs at sector {recorded_sector}")
        recorded_owner = int.from_bytes(data[header.owner_at : header.owner_at + 8], "big")
        if recorded_owner != owner:
            raise GuestDamaged(f"{where}: the block says it belongs to inode {recorded_owner}")
