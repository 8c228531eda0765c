"""GUID partition tables, from the primary or the backup header, for sectors of 512 and 4096 bytes.

Layout: UEFI specification 2.10, chapter 5.3: a header in sector 1 and its copy in the last sector, each with its own
CRC and one over an array of entries. All integers are little-endian. Pure functions, callable from any thread.
"""

from __future__ import annotations

import struct
import uuid
import zlib
from typing import TYPE_CHECKING, Final, NamedTuple

from xbfs_engine.formats.partitions.records import (
    PARTITIONS_MAX,
    SECTOR_SIZE,
    SECTOR_SIZE_4KN,
    Partition,
    PartitionTable,
    within,
)

if TYPE_CHECKING:
    from xbfs_engine.formats.source import BlockSource

_SIGNATURE: Final = b"EFI PART"
_HEADER: Final = struct.Struct("<8sIIIIQQQQ16sQIII")
_ENTRY: Final = struct.Struct("<16s16sQQQ72s")
_ENTRY_BYTES_MAX: Final = 4096
_ARRAY_BYTES_MAX: Final = 1 << 20
"""Larger arrays of entries are refused; the usual one has 16 KiB."""

assert _HEADER.size == 92
assert _ENTRY.size == 128


class _Header(NamedTuple):
    """The header as it lies on disk, in order."""

    signature: bytes
    revision: int
    header_bytes: int
    checksum: int
    reserved: int
    own_lba: int
    other_lba: int
    first_usable: int
    last_usable: int
    disk_guid: bytes
    entries_lba: int
    entry_count: int
    entry_bytes: int
    entries_checksum: int


def read_gpt(source: BlockSource) -> PartitionTable | None:
    """The GPT of a disk, or None if there is neither a valid primary nor a valid backup."""
    sizes = (SECTOR_SIZE, SECTOR_SIZE_4KN)
    for sector_bytes in sizes:
        table = _read_at(source, sector_bytes, 1)
        if table is not None:
            return table
    for sector_bytes in sizes:
        last = source.size_bytes // sector_bytes - 1
        table = _read_at(source, sector_bytes, last) if last > 1 else None
        if table is not None:
            return table._replace(
                notes=(*table.notes, "the primary GPT is damaged, its backup was used"), is_backup=True
            )
    return None


def _read_at(source: BlockSource, sector_bytes: int, lba: int) -> PartitionTable | None:
    """The table whose header is in sector ``lba``, if header and entries are what their checksums say."""
    if (lba + 1) * sector_bytes > source.size_bytes:
        return None
    sector = source.read_at(lba * sector_bytes, sector_bytes)
    if sector[:8] != _SIGNATURE:
        return None
    header = _Header._make(_HEADER.unpack_from(sector))
    if not _HEADER.size <= header.header_bytes <= sector_bytes or header.own_lba != lba:
        return None
    covered = sector[:16] + bytes(4) + sector[20 : header.header_bytes]
    if zlib.crc32(covered) != header.checksum:
        return None
    array_bytes = header.entry_count * header.entry_bytes
    start = header.entries_lba * sector_bytes
    if (
        not _ENTRY.size <= header.entry_bytes <= _ENTRY_BYTES_MAX
        or array_bytes > _ARRAY_BYTES_MAX
        or start + array_bytes > source.size_bytes
    ):
        return None
    array = source.read_at(start, array_bytes)
    if zlib.crc32(array) != header.entries_checksum:
        return None
    partitions, notes = _entries(source, header, array, sector_bytes)
    return PartitionTable("gpt", _guid(header.disk_guid), sector_bytes, partitions, notes)


def _entries(
    source: BlockSource, header: _Header, array: bytes, sector_bytes: int
) -> tuple[tuple[Partition, ...], tuple[str, ...]]:
    partitions: list[Partition] = []
    for index in range(header.entry_count):
        type_guid, own_guid, first, last, _, name = _ENTRY.unpack_from(array, index * header.entry_bytes)
        if not any(type_guid):
            continue
        if len(partitions) == PARTITIONS_MAX:
            return tuple(partitions), (f"the GPT has more than {PARTITIONS_MAX} partitions",)
        partition = Partition(
            index + 1,
            first * sector_bytes,
            max(last + 1 - first, 0) * sector_bytes,
            _guid(type_guid),
            _guid(own_guid),
            name.decode("utf-16-le", "replace").partition("\0")[0],
        )
        if last < first:
            partition = partition._replace(problem=f"it ends at sector {last}, before its beginning at {first}")
        partitions.append(within(source.size_bytes, partition))
    return tuple(partitions), ()


def _guid(raw: bytes) -> str:
    return str(uuid.UUID(bytes_le=raw))
