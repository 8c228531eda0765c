"""First sight of Unix filesystems and swap: ext2/3/4, XFS, btrfs, swap, ISO 9660.

Each function takes the head of a device, HEAD_BYTES long and filled up with zeros, and gives a Signature or None.
Pure; any bytes will do.
"""

from __future__ import annotations

import struct
from itertools import pairwise
from typing import Final

from xbfs_engine.guestfs.volumes.signature import Signature, plain_uuid, text_of

_EXT_AT: Final = 1024
_EXT_MAGIC: Final = b"\x53\xef"
_EXT_HAS_JOURNAL: Final = 0x4
_EXT_JOURNAL_DEVICE: Final = 0x8
_EXT_64BIT: Final = 0x80
_EXT2_INCOMPAT: Final = 0x2 | 0x10
_EXT3_INCOMPAT: Final = _EXT2_INCOMPAT | 0x4
_EXT3_RO_COMPAT: Final = 0x7
_BTRFS_AT: Final = 64 << 10
_SWAP_PAGES: Final = (4096, 8192, 16384, 32768, 65536)
_HIBERNATED: Final = (b"S1SUSPEND", b"S2SUSPEND", b"ULSUSPEND", b"LINHIB0001")
_ISO_AT: Final = 32 << 10
_ISO_SECTOR: Final = 2048


def ext(head: bytes) -> Signature | None:
    """Linux ``fs/ext4/ext4.h``, struct ext4_super_block; which of the three it is by its features, as blkid does."""
    block = head[_EXT_AT : _EXT_AT + 1024]
    if block[56:58] != _EXT_MAGIC:
        return None
    compat, incompat, ro_compat = struct.unpack_from("<III", block, 92)
    if incompat & _EXT_JOURNAL_DEVICE:
        kind = "jbd"
    elif incompat & ~_EXT3_INCOMPAT or ro_compat & ~_EXT3_RO_COMPAT:
        kind = "ext4"
    else:
        kind = "ext3" if compat & _EXT_HAS_JOURNAL else "ext2"
    blocks = int.from_bytes(block[4:8], "little")
    if incompat & _EXT_64BIT:
        blocks |= int.from_bytes(block[0x150:0x154], "little") << 32
    shift = int.from_bytes(block[24:28], "little")
    size = blocks << 10 + shift if shift <= 6 else 0
    return Signature(kind, text_of(block[120:136]), plain_uuid(block[104:120]), size)


def xfs(head: bytes) -> Signature | None:
    """Linux ``fs/xfs/libxfs/xfs_format.h``, struct xfs_dsb; big-endian."""
    if head[:4] != b"XFSB":
        return None
    block_bytes, blocks = struct.unpack_from(">IQ", head, 4)
    return Signature("xfs", text_of(head[108:120]), plain_uuid(head[32:48]), block_bytes * blocks)


def btrfs(head: bytes) -> Signature | None:
    """Linux ``include/uapi/linux/btrfs_tree.h``, struct btrfs_super_block."""
    block = head[_BTRFS_AT : _BTRFS_AT + 4096]
    if block[64:72] != b"_BHRfS_M":
        return None
    (devices,) = struct.unpack_from("<Q", block, 136)
    own, own_bytes = struct.unpack_from("<QQ", block, 201)
    note = f"device {own} of {devices} of one btrfs" if devices > 1 else ""
    return Signature("btrfs", text_of(block[299:555]), plain_uuid(block[32:48]), own_bytes, note)


def swap(head: bytes) -> Signature | None:
    """Linux ``include/linux/swap.h``, union swap_header: a magic at the end of the first page of any size."""
    for page in _SWAP_PAGES:
        end = head[page - 10 : page]
        (last,) = struct.unpack_from("<I", head, 1028)
        label, identity = text_of(head[1052:1068]), plain_uuid(head[1036:1052])
        if end == b"SWAPSPACE2":
            return Signature("swap", label, identity, (last + 1) * page)
        if end == b"SWAP-SPACE":
            return Signature("swap")
        if any(end.startswith(magic) for magic in _HIBERNATED):
            return Signature("swsuspend", label, identity, 0, "it holds the memory of a hibernated system")
    return None


def iso9660(head: bytes) -> Signature | None:
    """ECMA-119, 8.4: the primary volume descriptor in sector 16; ECMA-167 (UDF) has its own in the same place."""
    block = head[_ISO_AT : _ISO_AT + _ISO_SECTOR]
    if block[1:6] in (b"BEA01", b"NSR02", b"NSR03"):
        return Signature("udf")
    if block[:6] != b"\1CD001":
        return None
    (sectors,) = struct.unpack_from("<I", block, 80)
    # The times of creation and modification are 16 digits and a zone; blkid takes the later one as UUID.
    times = [block[at : at + 16] for at in (830, 813)]
    identity = next((t.decode() for t in times if t.isdigit() and t != b"0" * 16), "")
    cuts = (0, 4, 6, 8, 10, 12, 14, 16)
    spelled = "-".join(identity[a:b] for a, b in pairwise(cuts)) if identity else ""
    return Signature("iso9660", text_of(block[40:72]), spelled, sectors * _ISO_SECTOR)
