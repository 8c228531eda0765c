"""Where an ext filesystem keeps its journal: superblock, group descriptor, the journal's inode and its block map.

Owns no more than finding the journal needs; reading files is for others. Facts: the kernel's documentation
``filesystems/ext4`` (super.rst, group_descr.rst, inodes.rst, ifork.rst), whose offsets are repeated here.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final, NamedTuple

from xbfs_engine.core.errors import GuestDamaged, GuestUnsupported
from xbfs_engine.guestfs.crc32c import crc32c

if TYPE_CHECKING:
    from xbfs_engine.formats.source import BlockSource

SUPERBLOCK_OFFSET: Final = 1024
SUPERBLOCK_BYTES: Final = 1024
MAGIC: Final = 0xEF53

COMPAT_HAS_JOURNAL: Final = 0x4
INCOMPAT_RECOVER: Final = 0x4
INCOMPAT_64BIT: Final = 0x80
RO_COMPAT_METADATA_CSUM: Final = 0x400
STATE_VALID: Final = 0x1
STATE_ERROR: Final = 0x2

JOURNAL_BLOCKS_MAX: Final = 10_240_000
"""Longest journal that mke2fs makes (EXT2_MAX_JOURNAL_SIZE in lib/ext2fs)."""

_EXTENTS_FLAG: Final = 0x8_0000
_EXTENT_MAGIC: Final = 0xF30A
_EXTENT_DEPTH_MAX: Final = 5
_UNWRITTEN: Final = 32768
_MAP_BLOCKS_MAX: Final = 1 << 16
"""Blocks of mapping that are read for one journal: a journal in single blocks needs 30,000 of them at most."""


class Superblock(NamedTuple):
    """The fields that lead to the journal."""

    block_bytes: int
    blocks: int
    inode_bytes: int
    inodes_per_group: int
    descriptor_bytes: int
    state: int
    compat: int
    incompat: int
    journal_inode: int
    journal_device: int


class Run(NamedTuple):
    """Consecutive blocks of the journal that lie together on the disk."""

    logical: int
    physical: int
    blocks: int


def read_superblock(source: BlockSource) -> Superblock:
    """The primary superblock; GuestDamaged if there is none, or its numbers or checksum can not be."""
    if source.size_bytes < SUPERBLOCK_OFFSET + SUPERBLOCK_BYTES:
        raise GuestDamaged("ext: the volume ends before its superblock does")
    raw = source.read_at(SUPERBLOCK_OFFSET, SUPERBLOCK_BYTES)
    u16 = struct.Struct("<H").unpack_from
    u32 = struct.Struct("<I").unpack_from
    if u16(raw, 0x38)[0] != MAGIC:
        raise GuestDamaged("ext: the superblock has no magic number")
    compat, incompat, ro_compat = struct.unpack_from("<III", raw, 0x5C) if u32(raw, 0x4C)[0] else (0, 0, 0)
    if ro_compat & RO_COMPAT_METADATA_CSUM and u32(raw, 0x3FC)[0] != crc32c(raw[:0x3FC]) ^ 0xFFFF_FFFF:
        raise GuestDamaged("ext: the superblock's checksum does not match")
    log_block = u32(raw, 0x18)[0]
    if log_block > 6:
        raise GuestDamaged(f"ext: block size 1024 << {log_block}")
    wide = bool(incompat & INCOMPAT_64BIT)
    sb = Superblock(
        block_bytes=1024 << log_block,
        blocks=u32(raw, 0x4)[0] | (u32(raw, 0x150)[0] << 32 if wide else 0),
        inode_bytes=u16(raw, 0x58)[0] if u32(raw, 0x4C)[0] else 128,
        inodes_per_group=u32(raw, 0x28)[0],
        descriptor_bytes=u16(raw, 0xFE)[0] if wide else 32,
        state=u16(raw, 0x3A)[0],
        compat=compat,
        incompat=incompat,
        journal_inode=u32(raw, 0xE0)[0],
        journal_device=u32(raw, 0xE4)[0],
    )
    if not 128 <= sb.inode_bytes <= sb.block_bytes or not 32 <= sb.descriptor_bytes <= sb.block_bytes:
        raise GuestDamaged(f"ext: inodes of {sb.inode_bytes} and descriptors of {sb.descriptor_bytes} bytes")
    if not sb.inodes_per_group:
        raise GuestDamaged("ext: groups without inodes")
    return sb


def journal_runs(source: BlockSource, sb: Superblock) -> list[Run]:
    """Where the journal lies, in order; what the inode does not map is not in it.

    GuestUnsupported: the journal is on another device. GuestDamaged: there is none, or its inode is damaged.
    """
    if sb.journal_device or not sb.journal_inode:
        raise GuestUnsupported("the journal is on another device")
    inode = _inode(source, sb, sb.journal_inode)
    mode, flags = struct.unpack_from("<H", inode, 0)[0], struct.unpack_from("<I", inode, 0x20)[0]
    if mode & 0o170000 != 0o100000:
        raise GuestDamaged(f"ext: the journal's inode {sb.journal_inode} is no file")
    reader = _Blocks(source, sb)
    runs = _extent_runs(reader, inode) if flags & _EXTENTS_FLAG else _indirect_runs(reader, inode)
    previous = 0
    for run in runs:
        if run.logical < previous or run.physical + run.blocks > sb.blocks:
            raise GuestDamaged(f"ext: the journal's blocks {run.logical}+{run.blocks} are mapped to {run.physical}")
        previous = run.logical + run.blocks
    if previous > JOURNAL_BLOCKS_MAX:
        raise GuestDamaged(f"ext: a journal of {previous} blocks")
    return runs


def _inode(source: BlockSource, sb: Superblock, number: int) -> bytes:
    group, index = divmod(number - 1, sb.inodes_per_group)
    per_block = sb.block_bytes // sb.descriptor_bytes
    if group >= per_block:
        raise GuestUnsupported(f"the journal is inode {number}, outside the first groups")
    blocks = _Blocks(source, sb)
    # The first block of descriptors follows the superblock, with meta_bg too; s_first_data_block does not tell with
    # clusters.
    descriptor = blocks.read(SUPERBLOCK_OFFSET // sb.block_bytes + 1)[group * sb.descriptor_bytes :]
    table = struct.unpack_from("<I", descriptor, 8)[0]
    if sb.descriptor_bytes >= 64:
        table |= struct.unpack_from("<I", descriptor, 0x28)[0] << 32
    block, offset = divmod(index * sb.inode_bytes, sb.block_bytes)
    return blocks.read(table + block)[offset : offset + sb.inode_bytes]


class _Blocks:
    """Blocks of the filesystem, and how many were read: a map that names too many is damaged."""

    def __init__(self, source: BlockSource, sb: Superblock) -> None:
        self._source = source
        self._blocks = sb.blocks
        self.block_bytes = sb.block_bytes
        self._left = _MAP_BLOCKS_MAX

    def read(self, block: int) -> bytes:
        self._left -= 1
        if self._left < 0:
            raise GuestDamaged("ext: the map of the journal never ends")
        if not 0 < block < self._blocks or (block + 1) * self.block_bytes > self._source.size_bytes:
            raise GuestDamaged(f"ext: block {block} of {self._blocks} is outside the volume")
        return self._source.read_at(block * self.block_bytes, self.block_bytes)


def _extent_runs(blocks: _Blocks, inode: bytes) -> list[Run]:
    runs: list[Run] = []
    pending = [(inode[0x28:0x64], _EXTENT_DEPTH_MAX + 1)]
    while pending:
        node, above = pending.pop()
        magic, entries, _, depth = struct.unpack_from("<HHHH", node, 0)
        if magic != _EXTENT_MAGIC or 12 * (entries + 1) > len(node) or depth >= above:
            raise GuestDamaged("ext: the extent tree of the journal is damaged")
        if depth:
            below = [struct.unpack_from("<IIH", node, 12 * (index + 1)) for index in range(entries)]
            pending += [(blocks.read(low | high << 32), depth) for _, low, high in reversed(below)]
            continue
        for index in range(entries):
            logical, count, high, low = struct.unpack_from("<IHHI", node, 12 * (index + 1))
            if count <= _UNWRITTEN:
                runs.append(Run(logical, low | high << 32, count))
    return runs


def _indirect_runs(blocks: _Blocks, inode: bytes) -> list[Run]:
    """ext3: twelve blocks, then blocks of pointers, one to three levels deep."""
    pointers = struct.unpack_from("<15I", inode, 0x28)
    size = struct.unpack_from("<I", inode, 0x4)[0] | struct.unpack_from("<I", inode, 0x6C)[0] << 32
    wanted = min(-(-size // blocks.block_bytes), JOURNAL_BLOCKS_MAX + 1)
    per_block = blocks.block_bytes // 4
    runs: list[Run] = []
    pending = [(pointer, 0) for pointer in pointers[:12]] + [(pointers[11 + level], level) for level in (1, 2, 3)]
    pending.reverse()
    logical = 0
    while pending and logical < wanted:
        pointer, level = pending.pop()
        if not pointer:
            logical += per_block**level
        elif level:
            below = struct.unpack(f"<{per_block}I", blocks.read(pointer))
            pending += [(child, level - 1) for child in reversed(below)]
        else:
            last = runs[-1] if runs else Run(0, 0, 0)
            if last.logical + last.blocks == logical and last.physical + last.blocks == pointer:
                runs[-1] = last._replace(blocks=last.blocks + 1)
            else:
                runs.append(Run(logical, pointer, 1))
            logical += 1
    return runs
