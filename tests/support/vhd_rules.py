"""An independent VHD reader that insists on every rule XenServer's readers have, and on how we promise to lay out.

Written from the Microsoft specification and from what blktap's libvhd and `vhd-util check` demand; it shares nothing
with the product. A broken rule is an AssertionError that names the rule.
"""

from __future__ import annotations

import struct
from array import array
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

MIB = 1 << 20
BLOCK = 2 * MIB
ONES = (1 << 64) - 1


class RuleReader:
    """Opens a VHD given by ``read(offset, length)`` and ``file_size``; checks it; then answers `disk`."""

    def __init__(self, read: Callable[[int, int], bytes], file_size: int) -> None:
        self._read = read
        self._file_size = file_size
        footer = read(file_size - 512, 512)
        self.fields = check_footer(footer)
        self.virtual_size = int(self.fields["current_size"])
        self.blocks: dict[int, int] = {}
        if self.fields["type"] == 2:
            rule(self.fields["data_offset"] == ONES, "a fixed disk has no header")
            rule(file_size == self.virtual_size + 512, "a fixed file is the disk and its footer")
            return
        rule(self.fields["type"] == 3, "dynamic")
        rule(read(0, 512) == footer, "footer copy at 0 equals the one at the end")
        rule(self.fields["data_offset"] == 512, "header right behind the footer copy")
        entries = check_header(read(512, 1024), file_size)
        rule(entries == self.virtual_size // BLOCK, "one BAT entry per block")
        self._load_table(entries)

    def disk(self, offset: int, length: int) -> bytes:
        """Bytes of the virtual disk, clipped at its end."""
        end = min(offset + length, self.virtual_size)
        if self.fields["type"] == 2:
            return self._read(offset, max(end - offset, 0))
        parts = []
        while offset < end:
            block, skip = divmod(offset, BLOCK)
            take = min(BLOCK - skip, end - offset)
            place = self.blocks.get(block)
            parts.append(bytes(take) if place is None else self._read(place + 512 + skip, take))
            offset += take
        return b"".join(parts)

    def _load_table(self, entries: int) -> None:
        padded = (entries * 4 + 511) // 512 * 512
        raw = self._read(1536, padded)
        rule(not any(raw[entries * 4 :]), "BAT padding is zero, as libvhd writes it")
        table = array("I", raw[: entries * 4])
        table.byteswap()
        self.blocks = {number: sector * 512 for number, sector in enumerate(table) if sector != 0xFFFFFFFF}
        end = self._check_batmap(entries, 1536 + padded)
        for place in self.blocks.values():
            rule((place + 512) % 4096 == 0, "block data is aligned to 4 KiB")
            rule(end <= place < end + 4096, "blocks follow each other in order, without overlap or waste")
            end = place + 512 + BLOCK
        for place in list(self.blocks.values())[:64]:
            rule(self._read(place, 512) == b"\xff" * 512, "every sector of a present block is present")
        rule(self._file_size == end + 512, "the file ends with the footer, right behind the last block")

    def _check_batmap(self, entries: int, at: int) -> int:
        cookie, offset, sectors, version, stored, rest = struct.unpack(">8sQIII484s", self._read(at, 512))
        rule(cookie == b"tdbatmap", "tap 1.2 and later have a batmap right behind the BAT")
        rule(version == 0x00010002, "batmap version 1.2")
        rule(offset == at + 512, "the map follows its header")
        rule(sectors == max((entries + 4095) // 4096, 1), "one bit per BAT entry, whole sectors")
        rule(not any(rest), "marker, key hash and reserved bytes are zero")
        bits = self._read(offset, sectors * 512)
        summed = max((self.virtual_size // (16 * MIB) + 511) // 512, 1) * 512
        rule(stored == ~sum(bits[:summed]) & 0xFFFFFFFF, "batmap checksum as libvhd computes it, rounding down")
        rule(stored == ~sum(bits) & 0xFFFFFFFF, "batmap checksum over the whole map")
        for block in range(min(len(bits) * 8, summed * 8)):
            if bits[block // 8] or block in self.blocks:
                full = bool(bits[block // 8] & (0x80 >> block % 8))
                rule(full == (block in self.blocks), "a batmap bit is set exactly for present blocks")
        return int(offset) + len(bits)


def check_footer(raw: bytes) -> dict[str, int | bytes]:
    """Checks one footer by itself; returns its fields."""
    rule(len(raw) == 512, "a footer is 512 bytes")
    rule(raw[0:8] == b"conectix", "cookie")

    def number(at: int, size: int) -> int:
        return int.from_bytes(raw[at : at + size], "big")

    rule(number(8, 4) == 2, "features: only the reserved bit")
    rule(number(12, 4) == 0x00010000, "file format 1.0")
    rule(raw[28:32] == b"tap\0", "creator tap: qemu takes the exact size")
    rule(number(32, 4) == 0x00010003, "creator version 1.3")
    rule(number(36, 4) == 0, "creator host OS 0")
    size = number(48, 8)
    rule(number(40, 8) == size, "original size equals current size")
    rule(size > 0 and size % BLOCK == 0, "size is in whole 2 MiB: SM would cut the tail")
    rule(size <= 2040 << 30, "at most 2040 GiB")
    rule(number(56, 4) == chs(size // 512), "geometry by the specification's algorithm")
    rule(number(60, 4) in (2, 3), "fixed or dynamic")
    rule(number(64, 4) == ~(sum(raw) - sum(raw[64:68])) & 0xFFFFFFFF, "checksum")
    rule(any(raw[68:84]), "uuid is not null")
    rule(raw[76] >> 6 == 2, "uuid has the RFC 4122 variant")
    rule(1 <= raw[74] >> 4 <= 5, "uuid has a version every library knows")
    rule(not any(raw[84:]), "not saved, not hidden, reserved zero")
    fields: dict[str, int | bytes] = {"type": number(60, 4), "current_size": size, "timestamp": number(24, 4)}
    return fields | {"data_offset": number(16, 8), "uuid": raw[68:84]}


def check_header(raw: bytes, file_size: int) -> int:
    """Checks a dynamic disk's header; returns its number of BAT entries."""
    cookie, data_offset, table_offset, version, entries, block_size, stored = struct.unpack_from(">8sQQIIII", raw)
    rule(cookie == b"cxsparse", "header cookie")
    rule(data_offset == ONES, "header data offset unused")
    rule(table_offset == 1536, "BAT right behind the header")
    rule(table_offset + 4 * entries <= file_size - 512, "BAT inside the file")
    rule(version == 0x00010000, "header version")
    rule(block_size == BLOCK, "blocks of 2 MiB")
    rule(stored == ~(sum(raw) - sum(raw[36:40])) & 0xFFFFFFFF, "header checksum")
    rule(not any(raw[40:]), "no parent: uuid, timestamp, name, locators and reserved bytes are zero")
    return int(entries)


def chs(sectors: int) -> int:
    """The specification's appendix, as written there."""
    if sectors > 65535 * 16 * 255:
        sectors = 65535 * 16 * 255
    if sectors >= 65535 * 16 * 63:
        sectors_per_track = 255
        heads = 16
        cylinder_times_heads = sectors // sectors_per_track
    else:
        sectors_per_track = 17
        cylinder_times_heads = sectors // sectors_per_track
        heads = max((cylinder_times_heads + 1023) // 1024, 4)
        if cylinder_times_heads >= heads * 1024 or heads > 16:
            sectors_per_track = 31
            heads = 16
            cylinder_times_heads = sectors // sectors_per_track
        if cylinder_times_heads >= heads * 1024:
            sectors_per_track = 63
            heads = 16
            cylinder_times_heads = sectors // sectors_per_track
    return (cylinder_times_heads // heads) << 16 | heads << 8 | sectors_per_track


def rule(holds: bool, name: str) -> None:
    """One rule of the format."""
    if not holds:
        raise AssertionError(name)
