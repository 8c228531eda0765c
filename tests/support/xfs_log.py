"""Writes records into the log of a version 5 image, so that tests can put anything there behind right checksums."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from xbfs_engine.guestfs.crc32c import crc32c
from xbfs_engine.guestfs.xfs.geometry import parse_superblock
from xbfs_engine.guestfs.xfs.log import Log

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tests.support.guest_sources import SparseSource

HEADER_BYTES, COVERED = 328, 32 << 10
TRANSACTION = struct.pack("<4I", 0x5452414E, 40, 0, 0)
START, COMMIT = 1, 2
Operation = tuple[int, bytes]
"""Flags and data."""


def transaction(items: Sequence[Sequence[bytes]]) -> list[Operation]:
    """Operations of a whole transaction; the first region of an item gets the number of its regions."""
    regions = [
        region if index else region[:2] + struct.pack("<H", len(item)) + region[4:]
        for item in items
        for index, region in enumerate(item)
    ]
    return [(START, b""), (0, TRANSACTION), *((0, region) for region in regions), (COMMIT, b"")]


def log_place(source: SparseSource) -> int:
    """Where the log starts."""
    geometry = parse_superblock(source.read_at(0, 512))
    return geometry.offset_of(geometry.log_block, geometry.log_blocks)


def append(source: SparseSource, operations: Sequence[Operation]) -> None:
    """One record after the last; replay begins there if the volume was clean, else where it did."""
    log = Log(source, parse_superblock(source.read_at(0, 512)))
    last = log.last
    assert last is not None
    sector = last.sector + last.sectors
    cycle = last.lsn >> 32
    lsn = cycle << 32 | sector
    content = b"".join(struct.pack(">IIBBH", 7, len(data), 0x69, flags, 0) + data for flags, data in operations)
    assert len(content) <= COVERED
    content = content.ljust(-(-len(content) // 512) * 512, b"\0")
    firsts = b"".join(content[at : at + 4] for at in range(0, len(content), 512)).ljust(256, b"\0")
    packed = b"".join(struct.pack(">I", cycle) + content[at + 4 : at + 512] for at in range(0, len(content), 512))
    tail = lsn if log.is_clean else last.tail_lsn
    header = struct.pack(">4I2Q3I", 0xFEEDBABE, cycle, 2, len(content), lsn, tail, 0, last.sector, len(operations))
    uuid = source.read_at(32, 16)
    header += firsts + struct.pack(">I16sI", 1, uuid, COVERED) + bytes(4)
    assert len(header) == HEADER_BYTES
    crc = crc32c(packed, crc32c(header))
    header = header[:32] + struct.pack("<I", crc) + header[36:]
    source.write_at(log_place(source) + sector * 512, header.ljust(512, b"\0") + packed)
