"""MBR partition tables with the chain of logical drives in extended partitions.

Layout: sector 0 holds four entries of 16 bytes at 446 and 0x55AA at 510. A logical drive is described by a sector of
the same shape (EBR): its entry for data is relative to that sector, its link relative to the extended partition. LBAs
and counts are 32-bit little-endian sector numbers (Microsoft's description; Linux ``block/partitions/msdos.c`` for
what counts as valid). Pure functions, callable from any thread.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final, NamedTuple

from xbfs_engine.formats.partitions.records import Partition, PartitionTable, within

if TYPE_CHECKING:
    from collections.abc import Iterator

    from xbfs_engine.formats.source import BlockSource

_SIGNATURE: Final = b"\x55\xaa"
_ENTRY: Final = struct.Struct("<BxxxBxxxII")
_ENTRIES_AT: Final = 446
_EXTENDED: Final = frozenset({0x05, 0x0F, 0x85})
_PROTECTIVE: Final = 0xEE
_LOGICAL_FIRST: Final = 5
_LOGICAL_MAX: Final = 252
"""Linux stops at partition 255 or 256, depending on its version."""


class MbrEntry(NamedTuple):
    """One of four entries, in sectors."""

    number: int
    type_id: int
    start: int
    sectors: int


class MbrSector(NamedTuple):
    """A sector of an MBR's shape."""

    disk_id: int
    entries: tuple[MbrEntry, ...]
    """Only those in use."""

    @classmethod
    def parse(cls, sector: bytes) -> MbrSector | None:
        """The sector's entries, or None if it is none: no 0x55AA, or a boot flag that is neither 0 nor 0x80."""
        if sector[510:512] != _SIGNATURE:
            return None
        entries = []
        for index in range(4):
            flag, type_id, start, count = _ENTRY.unpack_from(sector, _ENTRIES_AT + index * _ENTRY.size)
            if flag & 0x7F:
                return None
            if type_id and count:
                entries.append(MbrEntry(index + 1, type_id, start, count))
        return cls(int.from_bytes(sector[440:444], "little"), tuple(entries))

    @property
    def is_for_gpt(self) -> bool:
        """A GPT is to be expected, alone (protective) or beside other entries (hybrid)."""
        return any(entry.type_id == _PROTECTIVE for entry in self.entries)

    @property
    def is_empty(self) -> bool:
        """No entry is in use."""
        return not self.entries


def read_logical_drives(source: BlockSource, mbr: MbrSector, sector_bytes: int) -> PartitionTable:
    """The table with all its logical drives; extended partitions themselves hold nothing and are not listed."""
    notes: list[str] = []
    partitions: list[Partition] = []
    number = _LOGICAL_FIRST
    for entry in mbr.entries:
        if entry.type_id == _PROTECTIVE:
            notes.append("the MBR announces a GPT, but neither it nor its backup is valid")
        elif entry.type_id in _EXTENDED:
            for start, count, type_id in _chain(source, entry, sector_bytes, notes):
                partitions.append(_partition(source, mbr, MbrEntry(number, type_id, start, count), sector_bytes))
                number += 1
        else:
            partitions.append(_partition(source, mbr, entry, sector_bytes))
    partitions.sort()
    return PartitionTable("dos", f"{mbr.disk_id:08x}", sector_bytes, tuple(partitions), tuple(notes))


def _partition(source: BlockSource, mbr: MbrSector, entry: MbrEntry, sector_bytes: int) -> Partition:
    return within(
        source.size_bytes,
        Partition(
            entry.number,
            entry.start * sector_bytes,
            entry.sectors * sector_bytes,
            f"{entry.type_id:#04x}",
            f"{mbr.disk_id:08x}-{entry.number:02x}",
            "",
        ),
    )


def _chain(
    source: BlockSource, extended: MbrEntry, sector_bytes: int, notes: list[str]
) -> Iterator[tuple[int, int, int]]:
    """(start, count, type) of each logical drive; the chain may only go to sectors it has not been at."""
    at = extended.start
    seen: set[int] = set()
    for _ in range(_LOGICAL_MAX):
        if at in seen:
            notes.append(f"the chain of logical drives comes back to sector {at}")
            return
        seen.add(at)
        if at * sector_bytes + 512 > source.size_bytes:
            notes.append(f"the chain of logical drives leaves the disk at sector {at}")
            return
        ebr = MbrSector.parse(source.read_at(at * sector_bytes, 512))
        if ebr is None:
            notes.append(f"sector {at} of the chain of logical drives is damaged")
            return
        link = None
        for entry in ebr.entries:
            if entry.type_id not in _EXTENDED:
                yield at + entry.start, entry.sectors, entry.type_id
            elif link is None:
                link = extended.start + entry.start
        if link is None:
            return
        at = link
    notes.append(f"the chain of logical drives goes on after {_LOGICAL_MAX} of them")
