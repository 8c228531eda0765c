"""The superblock: what an XFS is made of and where its parts lie. Owns all arithmetic between the kinds of address.

Addresses: a *block number* (fsblock) packs allocation group and block within it; a *sector* counts 512 bytes from the
start of the volume, whatever the disk's own sectors are; an *inode number* packs group, block and slot.
Numbers: "XFS Algorithms & Data Structures", chapter Superblocks; the kernel's xfs_format.h for newer feature bits.
"""

from __future__ import annotations

import struct
from typing import Final, NamedTuple
from uuid import UUID

from xbfs_engine.core.errors import GuestDamaged, GuestUnsupported
from xbfs_engine.guestfs.crc32c import crc32c

SECTOR: Final = 512
SUPERBLOCK_BYTES: Final = 264
"""Up to sb_meta_uuid; what newer features add behind it is not needed to read files."""

MAGIC: Final = b"XFSB"

_SUPERBLOCK: Final = struct.Struct(">4sI3Q16s4Q5I4H12s8B6QH2B3I2BHI2I4I")
_CRC_AT: Final = 224
assert _SUPERBLOCK.size == _CRC_AT
_SPINO_TO_END: Final = struct.Struct(">I2Q16s")

_VERSION_MASK: Final = 0x000F
_VERSION_LOGV2: Final = 0x0400
_VERSION_DIRV2: Final = 0x2000
_VERSION_BORG: Final = 0x4000
_VERSION_MOREBITS: Final = 0x8000
_VERSION2_FTYPE: Final = 0x0200

_INCOMPAT_FTYPE: Final = 1 << 0
_INCOMPAT_META_UUID: Final = 1 << 2
_INCOMPAT_NEEDSREPAIR: Final = 1 << 4
_INCOMPAT_KNOWN: Final = (1 << 11) - 1
"""ftype, sparse inodes, meta uuid, bigtime, needs repair, nrext64, exchange range, parent pointers, metadata directory,
zoned, zone gaps. None but the realtime ones changes how a file on the data section is read."""


class Geometry(NamedTuple):
    """A checked superblock: every derived address stays within ``blocks``."""

    version: int
    block_bytes: int
    block_log: int
    blocks: int
    group_blocks: int
    group_log: int
    groups: int
    inode_bytes: int
    inodes_per_block_log: int
    directory_bytes: int
    root_inode: int
    internal_inodes: frozenset[int]
    uuid: UUID
    meta_uuid: bytes
    """What v5 metadata blocks carry."""
    label: str
    has_file_types: bool
    is_case_insensitive: bool
    needs_repair: bool
    log_block: int
    """Block number of the log; 0 if it is on another device."""
    log_blocks: int
    log_is_v2: bool
    log_unit_bytes: int

    @property
    def size_bytes(self) -> int:
        """Size of the data section."""
        return self.blocks << self.block_log

    @property
    def has_checksums(self) -> bool:
        """Version 5: every metadata block names itself and has a CRC."""
        return self.version == 5

    def offset_of(self, block: int, count: int) -> int:
        """Byte offset of ``count`` blocks from a block number; GuestDamaged if they leave their allocation group."""
        group = block >> self.group_log
        within = block & ((1 << self.group_log) - 1)
        if group < self.groups and within < (room := self._group_size(group)) and count <= room - within:
            return (group * self.group_blocks + within) << self.block_log
        raise GuestDamaged(f"block {block} with {count} blocks is outside of the filesystem")

    def inode_place(self, number: int) -> tuple[int, int]:
        """Block number and slot in it of an inode; GuestDamaged if there can be none of that number."""
        block = number >> self.inodes_per_block_log
        group = block >> self.group_log
        if group < self.groups and 0 < block & ((1 << self.group_log) - 1) < self._group_size(group):
            return block, number & ((1 << self.inodes_per_block_log) - 1)
        raise GuestDamaged(f"inode number {number} is outside of the filesystem")

    def _group_size(self, group: int) -> int:
        return min(self.group_blocks, self.blocks - group * self.group_blocks)


def parse_superblock(data: bytes, *, is_replayed: bool = False) -> Geometry:
    """Geometry from the first sector(s) of a volume, at least 32 KiB or all there is.

    If the sector comes from the log its checksum means nothing.
    Raises GuestUnsupported for what no reader of today knows, GuestDamaged for contradictions.
    """
    if len(data) < SUPERBLOCK_BYTES or not data.startswith(MAGIC):
        raise GuestUnsupported("there is no XFS superblock")
    fields = _Fields(data)
    version = fields.versionnum & _VERSION_MASK
    if version not in (4, 5):
        raise GuestUnsupported(f"XFS version {version} is not known")
    if version == 5:
        if not is_replayed:
            _check_crc(data, fields.sector_bytes)
        if unknown := fields.incompat & ~_INCOMPAT_KNOWN:
            raise GuestUnsupported(f"the filesystem uses XFS features that are not known: {unknown:#x}")
    elif not fields.versionnum & _VERSION_DIRV2:
        raise GuestUnsupported("directories of XFS version 1 are not read")
    _check(fields, version)
    more = bool(fields.versionnum & _VERSION_MOREBITS)
    return Geometry(
        version=version,
        block_bytes=fields.block_bytes,
        block_log=fields.block_log,
        blocks=fields.blocks,
        group_blocks=fields.group_blocks,
        group_log=fields.group_log,
        groups=fields.groups,
        inode_bytes=fields.inode_bytes,
        inodes_per_block_log=fields.inodes_per_block_log,
        directory_bytes=1 << (fields.block_log + fields.directory_log),
        root_inode=fields.root_inode,
        internal_inodes=frozenset(fields.internal_inodes),
        uuid=UUID(bytes=fields.uuid),
        meta_uuid=fields.meta_uuid if version == 5 and fields.incompat & _INCOMPAT_META_UUID else fields.uuid,
        label=fields.label.rstrip(b"\0").decode("utf-8", "replace"),
        has_file_types=bool(
            fields.incompat & _INCOMPAT_FTYPE if version == 5 else more and fields.features2 & _VERSION2_FTYPE
        ),
        is_case_insensitive=bool(fields.versionnum & _VERSION_BORG),
        needs_repair=version == 5 and bool(fields.incompat & _INCOMPAT_NEEDSREPAIR),
        log_block=fields.log_block,
        log_blocks=fields.log_blocks,
        log_is_v2=version == 5 or bool(fields.versionnum & _VERSION_LOGV2),
        log_unit_bytes=fields.log_unit_bytes,
    )


class _Fields:
    """The superblock's fields by name, nothing checked."""

    def __init__(self, data: bytes) -> None:
        raw = _SUPERBLOCK.unpack_from(data)
        self.block_bytes, self.blocks, self.uuid, self.log_block = raw[1], raw[2], raw[5], raw[6]
        self.root_inode, bitmap_inode, summary_inode = raw[7:10]
        self.group_blocks, self.groups, self.log_blocks = raw[11], raw[12], raw[14]
        self.versionnum, self.sector_bytes, self.inode_bytes, _, self.label = raw[15:20]
        self.block_log, self.sector_log, self.inode_log, self.inodes_per_block_log, self.group_log = raw[20:25]
        self.in_progress = raw[26]
        user_quota, group_quota = raw[32:34]
        self.directory_log, self.log_unit_bytes, self.features2 = raw[40], raw[43], raw[44]
        self.incompat = raw[48]
        _, project_quota, _, self.meta_uuid = _SPINO_TO_END.unpack_from(data, _CRC_AT + 4)
        quotas = (user_quota, group_quota, project_quota)
        self.internal_inodes = {bitmap_inode, summary_inode, *quotas} - {0, 0xFFFF_FFFF_FFFF_FFFF}


def _check_crc(data: bytes, sector_bytes: int) -> None:
    if not SECTOR <= sector_bytes <= 32768 or sector_bytes > len(data):
        raise GuestDamaged(f"superblock: sector size {sector_bytes} is not possible")
    stored = int.from_bytes(data[_CRC_AT : _CRC_AT + 4], "little")
    found = crc32c(data[:_CRC_AT] + bytes(4) + data[_CRC_AT + 4 : sector_bytes])
    if found != stored:
        raise GuestDamaged(f"superblock: checksum is {found:08x}, recorded is {stored:08x}")


def _check(fields: _Fields, version: int) -> None:
    """What the kernel demands before it mounts, as far as reading depends on it (xfs_validate_sb_common)."""
    for ok, what in (
        (9 <= fields.block_log <= 16 and fields.block_bytes == 1 << fields.block_log, "block size"),
        (9 <= fields.sector_log <= 15 and fields.sector_bytes == 1 << fields.sector_log, "sector size"),
        (fields.sector_log <= fields.block_log, "sector size"),
        (8 + (version == 5) <= fields.inode_log <= 11 and fields.inode_bytes == 1 << fields.inode_log, "inode size"),
        (fields.block_log - fields.inode_log == fields.inodes_per_block_log, "inodes per block"),
        (fields.block_log + fields.directory_log <= 16, "directory block size"),
        (0 < fields.group_blocks < 1 << 31, "size of the allocation groups"),
        (fields.group_log == (fields.group_blocks - 1).bit_length(), "size of the allocation groups"),
        (0 < fields.groups < 1 << 31, "number of allocation groups"),
        ((fields.groups - 1) * fields.group_blocks < fields.blocks, "number of blocks"),
        (fields.blocks <= fields.groups * fields.group_blocks, "number of blocks"),
        (fields.blocks << fields.block_log < 1 << 63, "number of blocks"),
        (fields.log_blocks << fields.block_log <= 1 << 31, "size of the log"),
    ):
        if not ok:
            raise GuestDamaged(f"superblock: {what} contradicts the rest")
    if fields.in_progress:
        raise GuestDamaged("superblock: making the filesystem was interrupted")
