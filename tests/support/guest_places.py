"""Where things lie in the kept images of guests' filesystems, so that tests can change them, checksums included.

Only what the published layouts say; nothing of our readers is used.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from xbfs_engine.guestfs.crc32c import crc32c

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.support.guest_sources import SparseSource

MFT_RECORD = 1024
BTRFS_NODE = 4096
BTRFS_HEADER = 101


class ExtPlaces:
    """ext4 with one group of descriptors in one block; its readers do not look at checksums behind the superblock."""

    def __init__(self, source: SparseSource) -> None:
        raw = source.read_at(1024, 1024)
        self.source = source
        self.block = 1024 << struct.unpack_from("<I", raw, 0x18)[0]
        self._first = struct.unpack_from("<I", raw, 0x14)[0]
        self._per_group = struct.unpack_from("<I", raw, 0x28)[0]
        self._inode_bytes = struct.unpack_from("<H", raw, 0x58)[0]
        self._descriptor_bytes = struct.unpack_from("<H", raw, 0xFE)[0] or 32

    def inode(self, number: int) -> int:
        group, index = divmod(number - 1, self._per_group)
        descriptor = (self._first + 1) * self.block + group * self._descriptor_bytes
        table = struct.unpack("<I", self.source.read_at(descriptor + 8, 4))[0]
        return table * self.block + index * self._inode_bytes

    def set_size(self, number: int, size: int) -> None:
        at = self.inode(number)
        self.source.write_at(at + 4, struct.pack("<I", size & 0xFFFF_FFFF))
        self.source.write_at(at + 0x6C, struct.pack("<I", size >> 32))

    def change_entry(self, directory: int, name: bytes, inode: int) -> None:
        """Let a name of a directory of one extent lead elsewhere."""
        at = self.inode(directory) + 0x28
        _, count, high, low = struct.unpack("<IHHI", self.source.read_at(at + 12, 12))
        start = (high << 32 | low) * self.block
        data = self.source.read_at(start, count * self.block)
        wanted = bytes([len(name), 2]) + name
        self.source.write_at(start + data.index(wanted) - 6, struct.pack("<I", inode))


class BtrfsPlaces:
    """btrfs with blocks of 4096 bytes in groups whose logical addresses need not be known: all blocks are looked at."""

    def __init__(self, source: SparseSource) -> None:
        self.source = source
        self._uuid = source.read_at(65_536 + 32, 16)

    def change_item(self, key: tuple[int, int, int], at: int, value: bytes) -> None:
        """Each item of that key, old ones too."""
        found = False
        for block in self._leaves():
            for index in range(struct.unpack("<I", self.source.read_at(block + 96, 4))[0]):
                head = block + BTRFS_HEADER + 25 * index
                *own, offset, _ = struct.unpack("<QBQII", self.source.read_at(head, 25))
                if tuple(own) == key:
                    self.source.write_at(block + BTRFS_HEADER + offset + at, value)
                    found = True
            self._seal(block)
        assert found

    def change_entries(self, directory: int, name: bytes, location: bytes) -> None:
        """Let a name lead elsewhere, in both of its items."""
        found = 0
        for block in self._leaves():
            for index in range(struct.unpack("<I", self.source.read_at(block + 96, 4))[0]):
                head = block + BTRFS_HEADER + 25 * index
                number, kind, _, offset, size = struct.unpack("<QBQII", self.source.read_at(head, 25))
                at = block + BTRFS_HEADER + offset
                if number == directory and kind in (84, 96) and self.source.read_at(at + 30, size - 30) == name:
                    self.source.write_at(at, location)
                    found += 1
            self._seal(block)
        assert found >= 2

    def _leaves(self) -> Iterator[int]:
        for number in sorted(self.source.chunks):
            block = self.source.chunks[number]
            if block[32:48] == self._uuid and number * 4096 != 65_536 and not block[100]:
                yield number * 4096

    def _seal(self, block: int) -> None:
        self.source.write_at(block, crc32c(self.source.read_at(block, BTRFS_NODE)[32:]).to_bytes(4, "little"))


def ntfs_attribute(source: SparseSource, record: int, kind: int) -> int:
    """Where an attribute without a name of an MFT record lies, in a table that is in one piece."""
    cluster = struct.unpack("<H", source.read_at(11, 2))[0] * source.read_at(13, 1)[0]
    at = struct.unpack("<Q", source.read_at(48, 8))[0] * cluster + record * MFT_RECORD
    at += struct.unpack("<H", source.read_at(at + 20, 2))[0]
    while True:
        found, length = struct.unpack("<II", source.read_at(at, 8))
        assert found != 0xFFFF_FFFF
        if found == kind and not source.read_at(at + 9, 1)[0]:
            return at
        at += length


def exfat_sets(source: SparseSource) -> dict[str, int]:
    """Where the entry set of each file of the root directory lies, in its first cluster."""
    heap, _, root = struct.unpack("<III", source.read_at(88, 12))
    sector, cluster = 1 << source.read_at(108, 1)[0], 1 << source.read_at(108, 1)[0] + source.read_at(109, 1)[0]
    start = heap * sector + (root - 2) * cluster
    found = {}
    for at in range(start, start + cluster, 32):
        if source.read_at(at, 1) == b"\x85":
            count, length = source.read_at(at + 1, 1)[0], source.read_at(at + 35, 1)[0]
            raw = b"".join(source.read_at(at + 64 + 32 * part + 2, 30) for part in range(count - 1))
            found[raw[: 2 * length].decode("utf-16-le")] = at
    return found


def seal_exfat(source: SparseSource, at: int) -> None:
    """Makes the checksum of an entry set right (exFAT specification, 6.3.3)."""
    data = source.read_at(at, 32 * (1 + source.read_at(at + 1, 1)[0]))
    value = 0
    for index, byte in enumerate(data):
        if index not in (2, 3):
            value = ((value << 15 | value >> 1) + byte) & 0xFFFF
    source.write_at(at + 2, value.to_bytes(2, "little"))
