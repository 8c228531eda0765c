"""First sight of Windows' filesystems: NTFS, FAT12/16/32, exFAT.

Each function takes the device and its head, HEAD_BYTES long and filled up with zeros, and gives a Signature or None.
Labels lie in directories; one that can not be read is empty. Pure; any bytes will do.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final

from xbfs_engine.guestfs.volumes.signature import Signature

if TYPE_CHECKING:
    from xbfs_engine.formats.source import BlockSource

_BOOT: Final = b"\x55\xaa"
_NTFS_RECORD_MAX: Final = 64 << 10
_NTFS_VOLUME_RECORD: Final = 3
_NTFS_VOLUME_NAME: Final = 0x60
_NTFS_ATTRIBUTES_MAX: Final = 64
_NTFS_SECTOR: Final = 512
_DIRECTORY_BYTES_MAX: Final = 64 << 10
_FAT_ENTRY: Final = 32
_EXFAT_LABEL: Final = 0x83


def _read(source: BlockSource, offset: int, length: int) -> bytes:
    """What of a range is on the device."""
    length = min(length, source.size_bytes - offset)
    return source.read_at(offset, length) if offset >= 0 and length > 0 else b""


def ntfs(source: BlockSource, head: bytes) -> Signature | None:
    """The boot sector, and the volume's name in record 3 of the MFT."""
    if head[3:11] != b"NTFS    ":
        return None
    sector, per_cluster = struct.unpack_from("<HB", head, 11)
    sectors, mft = struct.unpack_from("<QQ", head, 40)
    (per_record,) = struct.unpack_from("<b", head, 64)
    (serial,) = struct.unpack_from("<Q", head, 72)
    # From 0x80 on both counts are negative powers of two.
    cluster = sector * per_cluster if per_cluster <= 0x80 else sector << min(256 - per_cluster, 20)
    record = per_record * cluster if per_record > 0 else 1 << min(-per_record, 20)
    label = ""
    if cluster > 0 and _NTFS_SECTOR <= record <= _NTFS_RECORD_MAX:
        label = _ntfs_name(_read(source, mft * cluster + _NTFS_VOLUME_RECORD * record, record))
    return Signature("ntfs", label, f"{serial:016X}", (sectors + 1) * sector)


def _ntfs_name(record: bytes) -> str:
    if record[:4] != b"FILE" or len(record) < _NTFS_SECTOR:
        return ""
    data = bytearray(record)
    fixups, count, at = *struct.unpack_from("<HH", record, 4), struct.unpack_from("<H", record, 20)[0]
    for index in range(1, min(count, len(record) // _NTFS_SECTOR + 1)):
        original = record[fixups + 2 * index : fixups + 2 * index + 2]
        data[index * _NTFS_SECTOR - 2 : index * _NTFS_SECTOR] = original.ljust(2, b"\0")
    for _ in range(_NTFS_ATTRIBUTES_MAX):
        if at + 24 > len(data):
            break
        kind, length = struct.unpack_from("<II", data, at)
        if kind == _NTFS_VOLUME_NAME:
            size, start = struct.unpack_from("<IH", data, at + 16)
            return bytes(data[at + start : at + start + min(size, 256)]).decode("utf-16-le", "replace")
        if kind > _NTFS_VOLUME_NAME or length < 16:
            break
        at += length
    return ""


def exfat(source: BlockSource, head: bytes) -> Signature | None:
    """Microsoft's "exFAT file system specification", 3.1 and 7.3."""
    if head[3:11] != b"EXFAT   " or head[510:512] != _BOOT:
        return None
    (sectors,) = struct.unpack_from("<Q", head, 72)
    heap, _, root, serial = struct.unpack_from("<IIII", head, 88)
    sector_shift, cluster_shift = head[108], head[109]
    if not 9 <= sector_shift <= 12 or sector_shift + cluster_shift > 25:
        return None
    cluster = 1 << sector_shift + cluster_shift
    directory = _read(source, (heap << sector_shift) + (root - 2) * cluster, min(cluster, _DIRECTORY_BYTES_MAX))
    label = ""
    for at in range(0, len(directory) - _FAT_ENTRY + 1, _FAT_ENTRY):
        if directory[at] == _EXFAT_LABEL:
            label = directory[at + 2 : at + 2 + 2 * min(directory[at + 1], 11)].decode("utf-16-le", "replace")
        if directory[at] in (0, _EXFAT_LABEL):
            break
    return Signature("exfat", label, _serial(serial), sectors << sector_shift)


def fat(source: BlockSource, head: bytes) -> Signature | None:
    """Microsoft's "FAT: General overview of on-disk format" 1.03; all of the parameters have to make sense."""
    sector, per_cluster, reserved, fats, entries, small, media, fat_small = struct.unpack_from("<HBHBHHBH", head, 11)
    large, fat_large = struct.unpack_from("<I", head, 32)[0], struct.unpack_from("<I", head, 36)[0]
    if (
        head[0] not in (0xEB, 0xE9)
        or head[510:512] != _BOOT
        or sector not in (512, 1024, 2048, 4096)
        or not per_cluster
        or per_cluster & (per_cluster - 1)
        or not reserved
        or not 1 <= fats <= 2
        or not (media == 0xF0 or media >= 0xF8)
        or not (small or large)
        or not (fat_small or fat_large)
    ):
        return None
    total = small or large
    tables = reserved + fats * (fat_small or fat_large)
    root_sectors = -(-entries * _FAT_ENTRY // sector)
    is_fat32 = not fat_small
    if is_fat32:
        (first,) = struct.unpack_from("<I", head, 44)
        start, length = (tables + (first - 2) * per_cluster) * sector, per_cluster * sector
        serial_at = 67
    else:
        start, length = tables * sector, root_sectors * sector
        serial_at = 39
    (serial,) = struct.unpack_from("<I", head, serial_at)
    label = _fat_label(_read(source, start, min(length, _DIRECTORY_BYTES_MAX)))
    if not label and head[serial_at - 1] == 0x29:
        label = _oem(head[serial_at + 4 : serial_at + 15])
    return Signature("vfat", label, _serial(serial), total * sector)


def _fat_label(directory: bytes) -> str:
    """The entry of the root directory that is neither a file nor a part of a long name."""
    for at in range(0, len(directory) - _FAT_ENTRY + 1, _FAT_ENTRY):
        first, attributes = directory[at], directory[at + 11]
        if not first:
            break
        if first != 0xE5 and attributes & 0x18 == 0x08 and attributes & 0x3F != 0x0F:
            return _oem(directory[at : at + 11])
    return ""


def _oem(raw: bytes) -> str:
    label = raw.decode("cp437").rstrip(" \0")
    return "" if label == "NO NAME" else label


def _serial(number: int) -> str:
    return f"{number >> 16:04X}-{number & 0xFFFF:04X}"
