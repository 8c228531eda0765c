"""Partition tables: which ranges of a disk are its partitions, whatever was done to the table.

Owns the choice between GPT and MBR; each is parsed in its own module. Tables are hostile: nothing in them raises,
what is wrong with a table or an entry is said in words beside it. Only the source's own errors come through. Pure
functions, callable from any thread.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from xbfs_engine.formats.partitions.gpt import read_gpt
from xbfs_engine.formats.partitions.mbr import MbrSector, read_logical_drives
from xbfs_engine.formats.partitions.records import SECTOR_SIZE, SECTOR_SIZE_4KN, Partition, PartitionTable

if TYPE_CHECKING:
    from xbfs_engine.formats.source import BlockSource

__all__ = ["SECTOR_SIZE", "SECTOR_SIZE_4KN", "Partition", "PartitionTable", "read_partitions"]


def read_partitions(source: BlockSource, mbr_sector_bytes: int = SECTOR_SIZE) -> PartitionTable | None:
    """The partitions of a disk, or None if it has no partition table.

    A GPT is found for both sector sizes, from its backup too; it counts if the MBR has an entry for it (0xEE, hybrid
    or not) or is no MBR at all. An MBR does not say what its sectors are: ``mbr_sector_bytes`` does.
    """
    if source.size_bytes < SECTOR_SIZE:
        return None
    mbr = MbrSector.parse(source.read_at(0, SECTOR_SIZE))
    if mbr is None or mbr.is_for_gpt or mbr.is_empty:
        table = read_gpt(source)
        if table is not None:
            return table
    if mbr is None:
        return None
    return read_logical_drives(source, mbr, mbr_sector_bytes)
