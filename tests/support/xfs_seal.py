"""Puts right checksums into XFS metadata that a test has changed, so that what is behind the checksum is tested."""

from __future__ import annotations

from typing import TYPE_CHECKING

from xbfs_engine.guestfs.crc32c import crc32c

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.support.guest_sources import SparseSource

SUPERBLOCK_CRC, INODE_CRC = 224, 100
DIRECTORY_BYTES = 4096
AT_START = {b"XDB3": 4, b"XDD3": 4, b"XSLM": 12, b"XARM": 12, b"BMA3": 64}
AT_EIGHT = {b"\x3e\xbe": 12, b"\x3b\xee": 12, b"\x3d\xf1": 12, b"\x3d\xff": 12}


def crc_place(block: bytes) -> int | None:
    """Where the checksum of a metadata block (not of inodes) is, told by its magic number; None if it is none."""
    return AT_START.get(block[:4]) or AT_EIGHT.get(block[8:10])


def sealed(data: bytes, place: int) -> bytes:
    value = crc32c(data[:place] + bytes(4) + data[place + 4 :])
    return data[:place] + value.to_bytes(4, "little") + data[place + 4 :]


def metadata(source: SparseSource, block_bytes: int, inode_bytes: int) -> Iterator[tuple[int, int, int]]:
    """Offset, length and place of the checksum of each metadata block and inode in use of an image."""
    for number in sorted(source.chunks):
        for offset in range(number * 4096, (number + 1) * 4096, block_bytes):
            block = source.read_at(offset, block_bytes)
            if block[:2] == b"IN":
                for at in range(0, block_bytes, inode_bytes):
                    if block[at : at + 2] == b"IN" and block[at + 2 : at + 4] != b"\0\0":
                        yield offset + at, inode_bytes, INODE_CRC
            elif (place := crc_place(block)) is not None:
                # Blocks of directories may be several of the filesystem's.
                for length in (block_bytes, DIRECTORY_BYTES):
                    if sealed(whole := source.read_at(offset, length), place) == whole:
                        yield offset, length, place
                        break


def inode_offset(source: SparseSource, node: bytes) -> int:
    """Where an inode of the version 5 image lies, found by its own number."""
    for offset, length, place in metadata(source, 1024, 512):
        if place == INODE_CRC and source.read_at(offset, length)[152:160] == node:
            return offset
    raise AssertionError(node)


def change_inode(source: SparseSource, node: bytes, at: int, new: bytes) -> None:
    """Changes bytes of an inode of the version 5 image."""
    offset = inode_offset(source, node)
    data = source.read_at(offset, 512)
    source.write_at(offset, sealed(data[:at] + new + data[at + len(new) :], INODE_CRC))
