"""The VHD's on-disk records: footer, dynamic header, batmap header; their checksum and disk geometry.

Owns the bytes of each record, writing and strict parsing; where the records lie in a file is `formats.vhd`. Pure
functions, callable from any thread. All integers are big-endian.

Sources: Microsoft "Virtual Hard Disk Image Format Specification" 1.0 (2006), chapters "Hard Disk Footer Format" and
"Dynamic Disk Header Format"; blktap ``include/vhd.h`` for ``hidden`` and the batmap, which are XenServer's own.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum
from typing import Final, NamedTuple

from xbfs_engine.core.errors import SourceUnreadable
from xbfs_engine.core.limits import GIB, KIB, MIB

SECTOR_SIZE: Final = 512
BLOCK_SIZE: Final = 2 * MIB
"""Disk bytes of one VHD block; blktap knows no larger one."""

VHD_SIZE_MAX: Final = 2040 * GIB
"""Largest virtual size: beyond it 32-bit sector numbers run out (specification; SM's MAX_VHD_SIZE)."""

FOOTER_SIZE: Final = 512
HEADER_SIZE: Final = 1024
BATMAP_HEADER_SIZE: Final = 512
NO_OFFSET: Final = 0xFFFFFFFFFFFFFFFF
"""data_offset of a record that no other record follows."""

_FOOTER: Final = struct.Struct(">8sIIQI4sIIQQIII16sBB426s")
_HEADER: Final = struct.Struct(">8sQQIIII16sII512s192s256s")
_BATMAP_HEADER: Final = struct.Struct(">8sQIII484x")
assert _FOOTER.size == FOOTER_SIZE
assert _HEADER.size == HEADER_SIZE
assert _BATMAP_HEADER.size == BATMAP_HEADER_SIZE

_FOOTER_COOKIE: Final = b"conectix"
_POISON_COOKIE: Final = b"v_poison"
_HEADER_COOKIE: Final = b"cxsparse"
_BATMAP_COOKIE: Final = b"tdbatmap"
_FEATURE_TEMPORARY: Final = 1
_FEATURE_RESERVED: Final = 2
_VERSION_1_0: Final = 0x00010000
_BATMAP_VERSION: Final = 0x00010002
_CREATOR: Final = b"tap\0"
_CREATOR_VERSION: Final = 0x00010003
"""tap 1.3: qemu takes the size of a creator it does not know from the geometry and cuts the disk's tail off; blktap
demands a batmap of tap 1.2 and later."""

_FOOTER_CHECKSUM_AT: Final = 64
_HEADER_CHECKSUM_AT: Final = 36
_NULL_UUID: Final = bytes(16)
_BLOCK_SIZE_MIN: Final = 4 * KIB
"""A sector bitmap describes at least one byte of whole sectors; smaller blocks are nobody's."""

_BAT_ENTRIES_MAX: Final = 1 << 22
"""A BAT of 16 MiB: 2040 GiB in blocks of 512 KiB, the smallest a known program writes."""

_TABLE_OFFSET_MAX: Final = SECTOR_SIZE << 32
"""Block addresses are 32-bit sector numbers, so a table beyond could describe nothing."""

_HINT: Final = "the VHD is damaged or not one that XenServer reads: export the disk again"


class _FooterFields(NamedTuple):
    """The footer as it lies on disk, in order; the defaults are what blktap writes."""

    cookie: bytes = _FOOTER_COOKIE
    features: int = _FEATURE_RESERVED
    version: int = _VERSION_1_0
    data_offset: int = NO_OFFSET
    timestamp_s: int = 0
    creator: bytes = _CREATOR
    creator_version: int = _CREATOR_VERSION
    creator_os: int = 0
    original_size: int = 0
    current_size: int = 0
    geometry: int = 0
    disk_type: int = 0
    checksum: int = 0
    uuid16: bytes = _NULL_UUID
    saved: int = 0
    hidden: int = 0
    reserved: bytes = b""


class _HeaderFields(NamedTuple):
    """The dynamic header as it lies on disk, in order; the defaults are what blktap writes."""

    cookie: bytes = _HEADER_COOKIE
    data_offset: int = NO_OFFSET
    table_offset: int = 0
    version: int = _VERSION_1_0
    entries: int = 0
    block_size: int = BLOCK_SIZE
    checksum: int = 0
    parent_uuid16: bytes = _NULL_UUID
    parent_timestamp_s: int = 0
    reserved: int = 0
    parent_name: bytes = b""
    locators: bytes = b""
    tail: bytes = b""


class VhdType(IntEnum):
    """Kinds of VHD that exist in practice."""

    FIXED = 2
    DYNAMIC = 3
    DIFFERENCING = 4


@dataclass(frozen=True, slots=True)
class VhdFooter:
    """The 512 bytes that make a file a VHD.

    ``size_bytes`` is the virtual size, a multiple of 512. ``timestamp_s`` counts seconds from 2000-01-01 UTC.
    ``hidden`` marks what XenServer's SM treats as no disk of its own. The geometry is not kept: the size says more.
    """

    disk_type: VhdType
    size_bytes: int
    uuid16: bytes
    timestamp_s: int
    data_offset: int
    creator: bytes = _CREATOR
    creator_version: int = _CREATOR_VERSION
    hidden: bool = False

    def pack(self) -> bytes:
        """The record with its checksum."""
        fields = _FooterFields(
            data_offset=self.data_offset,
            timestamp_s=self.timestamp_s,
            creator=self.creator,
            creator_version=self.creator_version,
            original_size=self.size_bytes,
            current_size=self.size_bytes,
            geometry=geometry(self.size_bytes),
            disk_type=self.disk_type,
            uuid16=self.uuid16,
            hidden=self.hidden,
        )
        return _with_checksum(_FOOTER.pack(*fields), _FOOTER_CHECKSUM_AT)


@dataclass(frozen=True, slots=True)
class VhdHeader:
    """The header of a dynamic or differencing VHD.

    ``table_offset`` is where the BAT lies in the file, ``entries`` how many it has. ``parent_uuid16`` is null unless
    the VHD is differencing; the parent's path is not kept, since only the uuid says truly which disk it is.
    """

    table_offset: int
    entries: int
    block_size: int = BLOCK_SIZE
    parent_uuid16: bytes = _NULL_UUID

    def pack(self) -> bytes:
        """The record with its checksum; without a parent."""
        assert self.parent_uuid16 == _NULL_UUID
        fields = _HeaderFields(table_offset=self.table_offset, entries=self.entries, block_size=self.block_size)
        return _with_checksum(_HEADER.pack(*fields), _HEADER_CHECKSUM_AT)


def pack_batmap_header(*, map_offset: int, batmap: bytes) -> bytes:
    """The header of a batmap of whole sectors that lies at ``map_offset`` of the file."""
    sectors = len(batmap) // SECTOR_SIZE
    return _BATMAP_HEADER.pack(_BATMAP_COOKIE, map_offset, sectors, _BATMAP_VERSION, checksum(batmap))


def checksum(data: bytes) -> int:
    """One's complement of the sum of all bytes, 32 bits (specification, "Checksum")."""
    return ~sum(data) & 0xFFFFFFFF


def geometry(size_bytes: int) -> int:
    """Cylinders << 16 | heads << 8 | sectors per track (specification, appendix "CHS Calculation").

    blktap refuses a footer whose number is greater than this one.
    """
    sectors = min(-(-size_bytes // SECTOR_SIZE), 65535 * 16 * 255)
    if sectors >= 65535 * 16 * 63:
        per_track, heads = 255, 16
    else:
        per_track = 17
        heads = max(-(-(sectors // per_track) // 1024), 4)
        if sectors // per_track >= heads * 1024 or heads > 16:
            per_track, heads = 31, 16
        if sectors // per_track >= heads * 1024:
            per_track, heads = 63, 16
    return (sectors // per_track // heads) << 16 | heads << 8 | per_track


def parse_vhd_footer(data: bytes) -> VhdFooter:
    """The footer in ``data``, exactly 512 bytes. Raises SourceUnreadable on anything blktap would not have written.

    The geometry is not judged: qemu writes one that blktap refuses, and nobody needs it.
    """
    _demand(len(data) == FOOTER_SIZE, f"footer: {len(data)} bytes instead of {FOOTER_SIZE}")
    raw = _FooterFields._make(_FOOTER.unpack(data))
    _demand(raw.cookie != _POISON_COOKIE, "footer: cookie v_poison, XenServer disabled this disk")
    _demand(raw.cookie == _FOOTER_COOKIE, f"footer: cookie {raw.cookie!r} instead of {_FOOTER_COOKIE!r}")
    _demand_checksum("footer", data, _FOOTER_CHECKSUM_AT, raw.checksum)
    _demand(raw.features & ~_FEATURE_TEMPORARY == _FEATURE_RESERVED, f"footer: features {raw.features:#x}")
    _demand(raw.version == _VERSION_1_0, f"footer: format version {raw.version:#010x}")
    _demand(raw.disk_type in tuple(VhdType), f"footer: disk type {raw.disk_type}")
    disk_type = VhdType(raw.disk_type)
    if disk_type == VhdType.FIXED:
        placed = raw.data_offset == NO_OFFSET
    else:
        placed = raw.data_offset % SECTOR_SIZE == 0 and FOOTER_SIZE <= raw.data_offset < _TABLE_OFFSET_MAX
    _demand(placed, f"footer: data offset {raw.data_offset:#x}")
    for size in (raw.current_size, raw.original_size):
        _demand(0 < size <= VHD_SIZE_MAX and size % SECTOR_SIZE == 0, f"footer: disk size {size}")
    _demand(raw.saved <= 1, f"footer: saved state {raw.saved}")
    _demand(raw.hidden <= 1, f"footer: hidden state {raw.hidden}")
    _demand(not any(raw.reserved), "footer: reserved bytes are not zero")
    _demand(raw.uuid16 != _NULL_UUID, "footer: null uuid")
    return VhdFooter(
        disk_type=disk_type,
        size_bytes=raw.current_size,
        uuid16=raw.uuid16,
        timestamp_s=raw.timestamp_s,
        data_offset=raw.data_offset,
        creator=raw.creator,
        creator_version=raw.creator_version,
        hidden=raw.hidden == 1,
    )


def parse_vhd_header(data: bytes, footer: VhdFooter) -> VhdHeader:
    """The header in ``data``, exactly 1024 bytes, of the VHD with that footer. Raises SourceUnreadable.

    Bounds hold afterwards: entries cover the disk and need at most 16 MiB, the BAT lies behind header and footer.
    """
    _demand(footer.disk_type != VhdType.FIXED, "header: a fixed disk has none")
    _demand(len(data) == HEADER_SIZE, f"header: {len(data)} bytes instead of {HEADER_SIZE}")
    raw = _HeaderFields._make(_HEADER.unpack(data))
    _demand(raw.cookie == _HEADER_COOKIE, f"header: cookie {raw.cookie!r} instead of {_HEADER_COOKIE!r}")
    _demand_checksum("header", data, _HEADER_CHECKSUM_AT, raw.checksum)
    _demand(raw.version == _VERSION_1_0, f"header: version {raw.version:#010x}")
    _demand(raw.data_offset == NO_OFFSET, f"header: data offset {raw.data_offset:#x}")
    power_of_two = raw.block_size & (raw.block_size - 1) == 0
    _demand(_BLOCK_SIZE_MIN <= raw.block_size <= BLOCK_SIZE and power_of_two, f"header: block size {raw.block_size}")
    needed = -(-footer.size_bytes // raw.block_size)
    _demand(needed <= raw.entries <= _BAT_ENTRIES_MAX, f"header: {raw.entries} BAT entries for {needed} blocks")
    behind = footer.data_offset + HEADER_SIZE
    placed = raw.table_offset % SECTOR_SIZE == 0 and behind <= raw.table_offset < _TABLE_OFFSET_MAX
    _demand(placed, f"header: BAT at {raw.table_offset:#x}")
    _demand(raw.reserved == 0 and not any(raw.tail), "header: reserved bytes are not zero")
    if footer.disk_type == VhdType.DIFFERENCING:
        _demand(raw.parent_uuid16 != _NULL_UUID, "header: a differencing disk without parent")
    else:
        parent = any(raw.parent_uuid16) or raw.parent_timestamp_s or any(raw.parent_name) or any(raw.locators)
        _demand(not parent, "header: a dynamic disk with a parent")
    return VhdHeader(raw.table_offset, raw.entries, raw.block_size, raw.parent_uuid16)


def _with_checksum(record: bytes, at: int) -> bytes:
    """The record, whose checksum field is still 0, with the field filled."""
    return record[:at] + checksum(record).to_bytes(4, "big") + record[at + 4 :]


def _demand_checksum(record: str, data: bytes, at: int, stored: int) -> None:
    computed = checksum(data[:at] + data[at + 4 :])
    _demand(stored == computed, f"{record}: checksum {stored:#010x} instead of {computed:#010x}")


def _demand(condition: bool, fact: str) -> None:
    if not condition:
        raise SourceUnreadable(f"VHD {fact}", hint=_HINT)
