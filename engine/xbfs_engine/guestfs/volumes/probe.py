"""What a device holds, by the marks it bears: containers of other devices first, then filesystems.

Owns the order in which marks count, since old ones are often left behind by what came later. The order is blkid's:
what is found at the end of a device (md) or around others (LUKS, BitLocker, LVM) before filesystems. Pure; hostile
devices give some Signature; only the source's own errors come through.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final, NamedTuple, TypeVar

from xbfs_engine.core.errors import XbfsError
from xbfs_engine.guestfs.volumes.bitlocker import BitLockerHeader, find_bitlocker
from xbfs_engine.guestfs.volumes.luks import LuksHeader, find_luks
from xbfs_engine.guestfs.volumes.lvm.label import PvLabel, find_lvm_label
from xbfs_engine.guestfs.volumes.md import MdMember, find_md
from xbfs_engine.guestfs.volumes.signature import HEAD_BYTES, Signature
from xbfs_engine.guestfs.volumes.unix import btrfs, ext, iso9660, swap, xfs
from xbfs_engine.guestfs.volumes.windows import exfat, fat, ntfs

if TYPE_CHECKING:
    from collections.abc import Callable

    from xbfs_engine.formats.source import BlockSource

_Found = TypeVar("_Found")

UNKNOWN: Final = "unknown"

_MARKS: Final = (
    ("bcache", 4096 + 24, bytes.fromhex("c68573f64e1a45ca8265f57f48ba6d81")),
    ("stratis", 512 + 4, b"!Stra0tis\x86\xff\x02^\x41rh"),
    ("vdo", 0, b"dmvdo001"),
    ("DM_verity_hash", 0, b"verity\0\0"),
    ("storage_spaces", 0, b"SPACEDB "),
)
_OTHERS: Final = (
    ("refs", 3, b"ReFS\0"),
    ("apfs", 32, b"NXSB"),
    ("hfsplus", 1024, b"H+"),
    ("hfsplus", 1024, b"HX"),
    ("hfs", 1024, b"BD"),
    ("f2fs", 1024, b"\x10\x20\xf5\xf2"),
    ("erofs", 1024, b"\xe2\xe1\xf5\xe0"),
    ("squashfs", 0, b"hsqs"),
    ("cramfs", 0, b"\x45\x3d\xcd\x28"),
    ("jfs", 32768, b"JFS1"),
    ("reiserfs", 65536 + 52, b"ReIsEr2Fs"),
    ("reiserfs", 65536 + 52, b"ReIsEr3Fs"),
    ("ufs", 8192 + 1372, b"\x54\x19\x01\x00"),
    ("ufs", 65536 + 1372, b"\x19\x01\x54\x19"),
)
_ZFS_UBERBLOCKS: Final = 128 << 10
_ZFS_MAGIC: Final = struct.pack("<Q", 0x00BAB10C)
_ZFS_STEP: Final = 1024
_VMFS_AT: Final = 1 << 20
_VMFS_MAGIC: Final = b"\x0d\xd0\x01\xc0"
_SECTOR: Final = 512


class Probe(NamedTuple):
    """What a device holds; at most one of the last four, if it is a part or a wrapping of something."""

    signature: Signature
    md: MdMember | None = None
    lvm: PvLabel | None = None
    luks: LuksHeader | None = None
    bitlocker: BitLockerHeader | None = None


def probe(source: BlockSource) -> Probe:
    """Look at a device: at most about 0.5 MiB of it, more only for a header of LUKS or BitLocker."""
    if source.size_bytes < _SECTOR:
        return Probe(Signature(UNKNOWN, note=f"it has {source.size_bytes} bytes only"))
    member = _if_readable(find_md, source)
    if member is not None:
        return Probe(Signature("linux_raid_member", member.name, member.array_uuid), md=member)
    luks = find_luks(source)
    if luks is not None:
        return Probe(Signature("crypto_LUKS", luks.label, luks.uuid, note="; ".join(luks.notes)), luks=luks)
    bitlocker = find_bitlocker(source)
    if bitlocker is not None:
        return Probe(Signature("BitLocker", bitlocker.label, bitlocker.uuid), bitlocker=bitlocker)
    label = find_lvm_label(source)
    if label is not None:
        return Probe(Signature("LVM2_member", "", label.uuid, label.size_bytes), lvm=label)
    return Probe(_content(source))


def _if_readable(find: Callable[[BlockSource], _Found | None], source: BlockSource) -> _Found | None:
    """What is found in places far from the beginning: what can not be read there must not hide what lies before."""
    try:
        return find(source)
    except XbfsError as error:
        if error.retryable:
            raise
        return None


def _content(source: BlockSource) -> Signature:
    head = source.read_at(0, min(HEAD_BYTES, source.size_bytes)).ljust(HEAD_BYTES, b"\0")
    found = (
        _marked(head, _MARKS)
        or swap(head)
        or xfs(head)
        or ext(head)
        or btrfs(head)
        or ntfs(source, head)
        or exfat(source, head)
        or iso9660(head)
        or fat(source, head)
        or _marked(head, _OTHERS)
        or _if_readable(_far, source)
    )
    if found is None:
        note = "" if any(head) else "its beginning is zeros: it may never have been used"
        return Signature(UNKNOWN, note=note)
    return found


def _marked(head: bytes, marks: tuple[tuple[str, int, bytes], ...]) -> Signature | None:
    for kind, at, mark in marks:
        if head.startswith(mark, at):
            return Signature(kind)
    return None


def _far(source: BlockSource) -> Signature | None:
    """Marks that lie too far in to be read each time."""
    if source.size_bytes >= 2 * _ZFS_UBERBLOCKS:
        ring = source.read_at(_ZFS_UBERBLOCKS, _ZFS_UBERBLOCKS)
        if any(ring.startswith(_ZFS_MAGIC, at) for at in range(0, len(ring), _ZFS_STEP)):
            return Signature("zfs_member")
    if source.size_bytes >= _VMFS_AT + _SECTOR and source.read_at(_VMFS_AT, 4) == _VMFS_MAGIC:
        return Signature("VMFS")
    return None
