"""What a partition table says: records and bounds that GPT and MBR share."""

from __future__ import annotations

from typing import Final, NamedTuple

SECTOR_SIZE: Final = 512
SECTOR_SIZE_4KN: Final = 4096

PARTITIONS_MAX: Final = 1024
"""Entries that are looked at in one table; Linux knows 256 partitions of a disk."""


class Partition(NamedTuple):
    """A range of a disk. ``problem`` says why it is not all there; then ``size_bytes`` is what is left of it."""

    number: int
    """As Linux counts: GPT by entry, MBR 1..4 and logical ones from 5."""
    start_bytes: int
    size_bytes: int
    type_id: str
    """GPT: the type's GUID in lower case; MBR: ``0x83``."""
    uuid: str
    """The PARTUUID as Linux shows it."""
    name: str
    """GPT's name, else empty."""
    problem: str = ""


class PartitionTable(NamedTuple):
    """A table that was found. ``notes`` are sentences on what is wrong with it."""

    kind: str
    """``gpt`` or ``dos``, as ``blkid`` names them."""
    uuid: str
    sector_bytes: int
    partitions: tuple[Partition, ...]
    notes: tuple[str, ...] = ()
    is_backup: bool = False
    """It was read from the end of the disk, since there is no valid one at the beginning."""


def within(disk_bytes: int, partition: Partition) -> Partition:
    """The partition cut to the disk, with its problem told if it was not on it."""
    left = disk_bytes - partition.start_bytes
    if partition.size_bytes <= left:
        return partition
    if left <= 0:
        return partition._replace(
            size_bytes=0,
            problem=f"it begins at byte {partition.start_bytes}, beyond the disk's end at {disk_bytes}",
        )
    return partition._replace(
        size_bytes=left,
        problem=f"it ends at byte {partition.start_bytes + partition.size_bytes}, the disk at {disk_bytes}",
    )
