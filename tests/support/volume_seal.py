"""Small disks with tables, superblocks, metadata and headers that are right, and what makes their checksums right
again after a test has changed them."""

from __future__ import annotations

import hashlib
import struct
import uuid
import zlib

from tests.support.volume_images import BytesSource, golden_disks
from xbfs_engine.guestfs.crc32c import crc32c
from xbfs_engine.guestfs.volumes.lvm.group import VolumeGroup
from xbfs_engine.guestfs.volumes.lvm.label import find_lvm_label, read_metadata
from xbfs_engine.guestfs.volumes.lvm.metadata import parse_metadata

LVM = golden_disks("lvm")


def gpt_disk(sector: int = 512) -> bytearray:
    """A disk with a GPT of two partitions, and its backup."""
    disk = bytearray(1 << 20)
    entries = b""
    for number in (1, 2):
        kind, own = uuid.UUID(int=77).bytes_le, uuid.UUID(int=number).bytes_le
        entries += struct.pack("<16s16sQQQ72s", kind, own, 100 * number, 100 * number + 50, 0, b"n\0")
    entries = entries.ljust(128 * 128, b"\0")
    last = len(disk) // sector - 1
    for own, other, at in ((1, last, 2), (last, 1, last - 32)):
        disk[at * sector : at * sector + len(entries)] = entries
        disk[own * sector : own * sector + 92] = struct.pack(
            "<8sIIIIQQQQ16sQIII", b"EFI PART", 0x10000, 92, 0, 0, own, other, 34, last - 34, b"d" * 16, at, 128, 128, 0
        )
    disk[510:512] = b"\x55\xaa"
    disk[446:462] = struct.pack("<BxxxBxxxII", 0, 0xEE, 1, last)
    seal_gpt(disk, 1)
    seal_gpt(disk, last)
    return disk


def seal_gpt(disk: bytearray, lba: int) -> None:
    """Make both checksums right, as far as what the header claims allows."""
    at = lba * 512
    entries, count, size = struct.unpack_from("<QII", disk, at + 72)
    if entries < 1 << 32 and count * size < 1 << 20:
        struct.pack_into("<I", disk, at + 88, zlib.crc32(disk[entries * 512 : entries * 512 + count * size]))
    length = min(struct.unpack_from("<I", disk, at + 12)[0], 512)
    struct.pack_into("<I", disk, at + 16, 0)
    struct.pack_into("<I", disk, at + 16, zlib.crc32(disk[at : at + length]))


def ebr_disk() -> bytearray:
    disk = bytearray(1 << 20)

    def entry(sector: int, index: int, kind: int, start: int, count: int) -> None:
        at = sector * 512 + 446 + index * 16
        disk[at : at + 16] = struct.pack("<BxxxBxxxII", 0, kind, start, count)
        disk[sector * 512 + 510 : sector * 512 + 512] = b"\x55\xaa"

    entry(0, 0, 0x83, 8, 50)
    entry(0, 1, 0x05, 100, 1000)
    for number, sector in enumerate((100, 200, 300)):
        entry(sector, 0, 0x83, 8, 50)
        if number < 2:
            entry(sector, 1, 0x05, 100 * (number + 1), 100)
    return disk


def seal_md1(disk: bytearray, at: int) -> None:
    count = min(struct.unpack_from("<I", disk, at + 220)[0], 1900)
    struct.pack_into("<I", disk, at + 216, 0)
    covered = disk[at : at + 256 + 2 * count]
    words = len(covered) // 4
    total = sum(struct.unpack_from(f"<{words}I", covered)) + int.from_bytes(covered[4 * words :], "little")
    struct.pack_into("<I", disk, at + 216, ((total & 0xFFFFFFFF) + (total >> 32)) & 0xFFFFFFFF)


MD_CASES = {
    "raid0": ("md", (0, 1, 2), 4096),
    "raid10": ("md", (3, 4, 5, 6), 0),
    "linear": ("md", (13, 14), 4096),
    "raid1": ("md_mirrors", (4, 5, 6), 0),
    "rebuilding": ("md_mirrors", (10, 11), 4096),
}


def text_of(disk: bytes) -> bytes:
    source = BytesSource(disk)
    label = find_lvm_label(source)
    assert label is not None
    return read_metadata(source, label)[0].text


TEXT = text_of(LVM[0])
PHYSICAL = {find_lvm_label(BytesSource(data)).uuid: BytesSource(data) for data in LVM.values()}


def thin_metadata() -> bytearray:
    group = VolumeGroup(parse_metadata(TEXT), PHYSICAL)
    source = group._lv("pool_tmeta")
    return bytearray(source.read_at(0, source.size_bytes))


THIN = bytes(thin_metadata())


def seal_thin(data: bytearray, block: int) -> None:
    """The checksum of a metadata block of a thin pool: 4 KiB, the superblock's with another number."""
    xor = 160774 if block == 0 else 121107
    checksum = crc32c(bytes(data[4096 * block + 4 : 4096 * (block + 1)])) ^ 0xFFFFFFFF ^ xor
    struct.pack_into("<I", data, 4096 * block, checksum)


LUKS2 = {
    "keyslots": {
        "0": {
            "type": "luks2", "key_size": 32,
            "af": {"type": "luks1", "stripes": 4, "hash": "sha256"},
            "area": {"type": "raw", "offset": "32768", "size": "4096", "encryption": "aes-xts-plain64", "key_size": 32},
            "kdf": {"type": "pbkdf2", "hash": "sha256", "iterations": 1000, "salt": "c2FsdHNhbHQ="},
        }
    },
    "tokens": {},
    "segments": {
        "0": {
            "type": "crypt", "offset": "40960", "size": "dynamic", "iv_tweak": "0", "encryption": "aes-xts-plain64",
            "sector_size": 512,
        }
    },
    "digests": {
        "0": {
            "type": "pbkdf2", "keyslots": ["0"], "segments": ["0"], "hash": "sha256", "iterations": 1000,
            "salt": "c2FsdHNhbHQ=", "digest": "ZGlnZXN0ZGlnZXN0ZGlnZXN0ZGlnZXN0",
        }
    },
    "config": {"json_size": "12288", "keyslots_size": "4096"},
}  # fmt: skip


def luks2_disk(text: bytes) -> bytes:
    header = bytearray(16384)
    struct.pack_into(
        ">6sHQQ48s32s64s40s48sQ", header, 0, b"LUKS\xba\xbe", 2, 16384, 1, b"l", b"sha256", b"s", b"u", b"", 0
    )
    header[4096 : 4096 + len(text)] = text
    header[448:480] = hashlib.sha256(header).digest()
    return bytes(header) + bytes(65536)


def luks1_disk() -> bytearray:
    disk = bytearray(1 << 16)
    slot = struct.pack(">II32sII", 0x00AC71F3, 1000, b"salt" * 8, 8, 4)
    disk[:256] = struct.pack(
        ">6sH32s32s32sII20s32sI40s", b"LUKS\xba\xbe", 1, b"aes", b"xts-plain64", b"sha256", 64, 32, b"d" * 20,
        b"s" * 32, 1000, b"uuid",
    ) + slot  # fmt: skip
    return disk
