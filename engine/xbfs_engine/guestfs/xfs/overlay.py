"""A source with some sectors replaced in memory; the source itself is never written. One thread at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from xbfs_engine.core.errors import GuestUnsupported
from xbfs_engine.guestfs.xfs.geometry import SECTOR

if TYPE_CHECKING:
    from xbfs_engine.formats.source import BlockSource

_GROUP: Final = 128
"""Sectors looked up at once: 64 KiB."""
_BYTES_MAX: Final = 128 << 20


class Overlay:
    """BlockSource over another, at least as large as what is written."""

    def __init__(self, source: BlockSource) -> None:
        self._source = source
        self._groups: dict[int, dict[int, bytes]] = {}
        self._count = 0

    @property
    def size_bytes(self) -> int:
        """That of the source."""
        return self._source.size_bytes

    def read_at(self, offset: int, length: int) -> bytes:
        """The source's bytes, with what was written in place of them."""
        data = self._source.read_at(offset, length)
        changed = self._sectors(offset, length)
        if not changed:
            return data
        mixed = bytearray(data)
        for sector, new in changed:
            at = sector * SECTOR - offset
            inside = new[max(0, -at) : length - at]
            mixed[max(0, at) : max(0, at) + len(inside)] = inside
        return bytes(mixed)

    def write_at(self, offset: int, data: bytes) -> None:
        """Replaces bytes; GuestUnsupported when that would take more memory than is allowed."""
        first, last = offset // SECTOR, -(-(offset + len(data)) // SECTOR)
        whole = data
        if offset % SECTOR or len(data) % SECTOR:
            before = self.read_at(first * SECTOR, (last - first) * SECTOR)
            inside = offset - first * SECTOR
            whole = before[:inside] + data + before[inside + len(data) :]
        for sector in range(first, last):
            group = self._groups.setdefault(sector // _GROUP, {})
            self._count += sector not in group
            group[sector] = whole[(sector - first) * SECTOR : (sector - first + 1) * SECTOR]
        if self._count * SECTOR > _BYTES_MAX:
            raise GuestUnsupported(f"the log changes more than {_BYTES_MAX >> 20} MiB")

    def is_replaced(self, offset: int, length: int) -> bool:
        """Whether any of these bytes were written."""
        return bool(self._sectors(offset, length))

    def _sectors(self, offset: int, length: int) -> list[tuple[int, bytes]]:
        first, last = offset // SECTOR, -(-(offset + length) // SECTOR)
        found: list[tuple[int, bytes]] = []
        for group in range(first // _GROUP, -(-last // _GROUP)):
            held = self._groups.get(group)
            if held:
                inside = range(max(first, group * _GROUP), min(last, (group + 1) * _GROUP))
                found += [(sector, held[sector]) for sector in inside if sector in held]
        return found
