"""Superblocks of Linux software RAID, versions 0.90, 1.0, 1.1 and 1.2.

Owns where a superblock lies on a member and what it says; how members make an array is `raid`. Layouts: md(4) and
Linux ``include/uapi/linux/raid/md_p.h`` (struct mdp_superblock_1 and mdp_super_t). Version 1 is little-endian, 0.90
has the byte order of the machine that wrote it: only little-endian is known here. Pure functions, callable from any
thread.
"""

from __future__ import annotations

import struct
import uuid
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from xbfs_engine.guestfs.volumes.sources import BadRange

if TYPE_CHECKING:
    from xbfs_engine.formats.source import BlockSource

SECTOR: Final = 512

_MAGIC: Final = 0xA92B4EFC
_V1: Final = struct.Struct("<IIII16s32sQiIQIIiIQIIIIQQQQII16sBBHiQQQII32x")
_V1_BYTES: Final = 256
assert _V1.size == _V1_BYTES

_FEATURE_RECOVERY_OFFSET: Final = 0x2
_FEATURE_RESHAPE: Final = 0x4
_FEATURE_BAD_BLOCKS: Final = 0x8
_FEATURE_REPLACEMENT: Final = 0x10
_FEATURES_KNOWN: Final = 0x1FFF
"""Up to MD_FEATURE_RAID0_LAYOUT; the others do not change where data lies."""

ROLE_NONE: Final = 0xFD00
"""Places in an array are below; md_p.h knows a few values above, all without data."""

_MEMBERS_MAX: Final = 1920
"""As many role slots as fit a superblock of 4 KiB (md_p.h, MD_SB_DISKS is smaller)."""

_BAD_BLOCKS_BYTES_MAX: Final = 64 << 10

_V0_BYTES: Final = 4096
_V0_ALIGN: Final = 64 << 10
_V0_MEMBERS_MAX: Final = 27
_V0_SYNC: Final = 1 << 2
_V0_FAULTY: Final = 1 << 0


@dataclass(frozen=True, slots=True)
class MdMember:
    """What one member's superblock says. Sizes and offsets are bytes."""

    version: str
    """``0.90``, ``1.0``, ``1.1`` or ``1.2``."""
    array_uuid: str
    """As ``blkid`` writes it."""
    member_uuid: str
    """Empty in 0.90."""
    name: str
    """``host:name`` as stored, or the minor number in 0.90."""
    level: int
    """-1 is linear."""
    layout: int
    raid_disks: int
    number: int
    """Which of ``roles`` is this member's."""
    roles: tuple[int, ...]
    """Each member's place in the array; ROLE_NONE and above: spare, failed, journal."""
    events: int
    """Grows with each change of the array: a member that is behind has missed writes."""
    data_start: int
    data_bytes: int
    """What the member has for data."""
    used_bytes: int
    """What a mirrored or RAID 10 array uses of each member."""
    chunk_bytes: int
    is_complete: bool
    """False while it is being rebuilt."""
    is_reshaping: bool
    bad: tuple[BadRange, ...]
    """Ranges on the member (not of its data) that it holds no valid copy of."""
    superblock_start: int
    problem: str = ""
    """Why the array can not be assembled from it."""


def find_md(source: BlockSource) -> MdMember | None:
    """The superblock of a member, or None. One whose checksum does not fit, or that was made elsewhere, is none."""
    size_sectors = source.size_bytes // SECTOR
    places = [(0, "1.1"), (4096, "1.2")]
    if size_sectors >= 32:
        places.append((((size_sectors - 16) & ~7) * SECTOR, "1.0"))
    for start, version in places:
        if start + 4096 <= source.size_bytes:
            member = _parse_v1(source, start, version)
            if member is not None:
                return member
    return _parse_v0(source, md_v0_start(source.size_bytes)) if source.size_bytes >= _V0_ALIGN else None


def md_v0_start(size_bytes: int) -> int:
    """Where a superblock of version 0.90 lies on a device of some size: in its last whole 64 KiB."""
    return (size_bytes // _V0_ALIGN - 1) * _V0_ALIGN


def _checksum(block: bytes) -> int:
    """The sum of little-endian words, a last half word too, with the carry added once."""
    words = len(block) // 4
    total: int = sum(struct.unpack_from(f"<{words}I", block))
    if len(block) % 4:
        total += int.from_bytes(block[words * 4 :], "little")
    return ((total & 0xFFFFFFFF) + (total >> 32)) & 0xFFFFFFFF


def _parse_v1(source: BlockSource, start: int, version: str) -> MdMember | None:
    block = source.read_at(start, 4096)
    if block[:8] != struct.pack("<II", _MAGIC, 1):
        return None
    (
        _, _, features, _, set_uuid, set_name, _, level, layout, size, chunk, raid_disks, _, _, _, _, _, _, _,
        data_offset, data_size, super_offset, recovery_offset, number, _, device_uuid, _, bad_shift, bad_sectors,
        bad_offset, _, events, _, stored_sum, max_dev,
    ) = _V1.unpack_from(block)  # fmt: skip
    covered = _V1_BYTES + 2 * max_dev
    if max_dev > _MEMBERS_MAX or super_offset * SECTOR != start:
        return None
    if _checksum(block[:216] + bytes(4) + block[220:covered]) != stored_sum:
        return None
    rebuilding = bool(features & _FEATURE_RECOVERY_OFFSET) and recovery_offset < size
    problem = "it is a replacement that has not taken over yet" if features & _FEATURE_REPLACEMENT else ""
    bad: tuple[BadRange, ...] = ()
    if features & ~_FEATURES_KNOWN:
        problem = f"its superblock has features {features & ~_FEATURES_KNOWN:#x} that are not known here"
    elif features & _FEATURE_BAD_BLOCKS and bad_sectors:
        found = _bad_blocks(source, start + bad_offset * SECTOR, bad_sectors * SECTOR, bad_shift)
        if found is None:
            problem = "its list of bad blocks can not be read"
        else:
            bad = found
    return MdMember(
        version,
        str(uuid.UUID(bytes=set_uuid)),
        str(uuid.UUID(bytes=device_uuid)),
        set_name.partition(b"\0")[0].decode("utf-8", "replace"),
        level,
        layout,
        raid_disks,
        number,
        struct.unpack_from(f"<{max_dev}H", block, _V1_BYTES),
        events,
        data_offset * SECTOR,
        data_size * SECTOR,
        size * SECTOR,
        chunk * SECTOR,
        not rebuilding,
        bool(features & _FEATURE_RESHAPE),
        bad,
        start,
        problem,
    )


def _bad_blocks(source: BlockSource, start: int, length: int, shift: int) -> tuple[BadRange, ...] | None:
    """Entries of 64 bits: sector << 10 | count, all ones when unused (Linux ``drivers/md/md.c``, super_1_load)."""
    if start < 0 or length > _BAD_BLOCKS_BYTES_MAX or start + length > source.size_bytes or shift > 32:
        return None
    table = source.read_at(start, length)
    bad = []
    for (entry,) in struct.iter_unpack("<Q", table):
        if entry == 0xFFFF_FFFF_FFFF_FFFF:
            break
        if entry & 0x3FF:
            bad.append(BadRange((entry >> 10 << shift) * SECTOR, ((entry & 0x3FF) << shift) * SECTOR))
    return tuple(bad)


def _parse_v0(source: BlockSource, start: int) -> MdMember | None:
    block = source.read_at(start, _V0_BYTES)
    word = struct.unpack("<1024I", block)
    if word[0] != _MAGIC or word[1] != 0 or word[2] not in (90, 91):
        return None
    if _checksum(block[: 38 * 4] + bytes(4) + block[39 * 4 :]) != word[38]:
        return None
    raid_disks = word[10]
    roles = []
    for number in range(_V0_MEMBERS_MAX):
        role, state = word[128 + 32 * number + 3 : 128 + 32 * number + 5]
        is_active = state & _V0_SYNC and not state & _V0_FAULTY
        roles.append(role if is_active and role < _V0_MEMBERS_MAX else ROLE_NONE)
    (level,) = struct.unpack_from("<i", block, 7 * 4)
    return MdMember(
        "0.90",
        str(uuid.UUID(bytes=struct.pack(">4I", word[5], *word[13:16]))),
        "",
        str(word[11]),
        level,
        word[64],
        raid_disks if raid_disks <= _V0_MEMBERS_MAX else 0,
        word[992],
        tuple(roles),
        word[40] << 32 | word[39],
        0,
        start,
        word[8] * 1024,
        word[65],
        True,
        word[2] == 91,
        (),
        start,
    )
