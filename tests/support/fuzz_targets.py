"""What is fuzzed of the readers of guests: one function of bytes for each, which raises only what is a finding.

The bytes are changes to a sound image whose checksums are made right again, so that what is found lies behind them; or
the input itself, where that is text. ``tools/fuzz_guestfs`` runs them with coverage, tests run them without.
"""

from __future__ import annotations

import hashlib
import json
import struct
from contextlib import suppress
from functools import cache
from typing import TYPE_CHECKING

from tests.support import guest_golden, guest_walk, volume_seal, xfs_golden, xfs_log, xfs_seal
from tests.support.volume_images import BytesSource, golden_disks, scan
from xbfs_engine.core.errors import XbfsError
from xbfs_engine.formats.partitions import read_partitions
from xbfs_engine.guestfs.base import NodeId
from xbfs_engine.guestfs.crc32c import crc32c
from xbfs_engine.guestfs.explorer.ext import open_ext
from xbfs_engine.guestfs.ext.layout import journal_runs, read_superblock
from xbfs_engine.guestfs.volumes.luks.header import find_luks
from xbfs_engine.guestfs.volumes.lvm.group import VolumeGroup
from xbfs_engine.guestfs.volumes.lvm.metadata import parse_metadata
from xbfs_engine.guestfs.volumes.lvm.thin import ThinPool
from xbfs_engine.guestfs.xfs.geometry import parse_superblock
from xbfs_engine.guestfs.xfs.log import Log
from xbfs_engine.guestfs.xfs.reader import open_xfs

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from tests.support.guest_sources import SparseSource

NODES, ENTRIES = 40, 200
READ_BYTES_MAX = 256 << 20
CHANGES_MAX = 24
ONES = 0xFFFF_FFFF


def changes(data: bytes) -> Iterator[tuple[int, int, bytes]]:
    """The input as changes: which place, where in it, and one to eight bytes."""
    at = 0
    for _ in range(CHANGES_MAX):
        if at + 6 > len(data):
            return
        place, where, count = struct.unpack_from("<HHB", data, at)
        value = data[at + 5 : at + 6 + count % 8]
        yield place, where, value
        at += 6 + count % 8


def walk(open_: Callable, source: SparseSource, nodes: int = NODES, first: Sequence[NodeId] = ()) -> None:
    guest_walk.walk(open_, source, nodes=nodes, first=first, entries=ENTRIES, read_bytes_max=READ_BYTES_MAX)


@cache
def _xfs_places() -> list[tuple[int, int, int]]:
    return [(0, 512, xfs_seal.SUPERBLOCK_CRC), *xfs_seal.metadata(xfs_golden.image("v5"), 1024, 512)]


def xfs(data: bytes) -> None:
    """Version 5, checksums made right."""
    source = xfs_golden.image("v5")
    places = _xfs_places()
    touched = []
    for place, at, value in changes(data):
        offset, length, crc_at = places[place % len(places)]
        block = source.read_at(offset, length)
        touched.append(_owner(block))
        block = (block[: at % length] + value + block[at % length + len(value) :])[:length]
        source.write_at(offset, xfs_seal.sealed(block, crc_at))
    walk(open_xfs, source, nodes=2 + len(touched), first=touched)


def _owner(block: bytes) -> NodeId:
    """The inode that a block of metadata is, or belongs to."""
    at = {b"IN": 152, b"XD": 40, b"BM": 56, b"XS": 32, b"XA": 32}.get(block[:2], 48)
    return NodeId(block[at : at + 8])


def xfs4(data: bytes) -> None:
    """Version 4, which has none."""
    source = xfs_golden.image("v4")
    _scatter(source, data)
    walk(open_xfs, source)


def _scatter(source: SparseSource, data: bytes) -> list[int]:
    """Changes blocks of 4 KiB that hold anything; returns their numbers."""
    numbers = sorted(source.chunks)
    changed = []
    for place, at, value in changes(data):
        number = numbers[place % len(numbers)]
        source.write_at(number * 4096 + min(at % 4096, 4096 - len(value)), value)
        changed.append(number)
    return changed


def xfs_log_items(data: bytes) -> None:
    """Operations of a log record: each is a length, flags, and its bytes."""
    source = xfs_golden.image("v5")
    operations = []
    at = 0
    while at + 3 <= len(data) and len(operations) < 40 and at < 16_000:
        length, flags = struct.unpack_from("<HB", data, at)
        operations.append((flags, data[at + 3 : at + 3 + length % 512]))
        at += 3 + length % 512
    xfs_log.append(source, [(xfs_log.START, b""), (0, xfs_log.TRANSACTION), *operations, (xfs_log.COMMIT, b"")])
    walk(open_xfs, source, nodes=4)


@cache
def _xfs_records() -> tuple[int, list[tuple[int, int]]]:
    source = xfs_golden.image("dirty")
    log = Log(source, parse_superblock(source.read_at(0, 512)))
    return xfs_log.log_place(source), [(record.sector, record.sectors) for record, _ in log.records()]


def xfs_log_records(data: bytes) -> None:
    """Records of a real log, whose checksums stay wrong only where the header itself is not: both are tried."""
    source = xfs_golden.image("dirty")
    start, records = _xfs_records()
    for place, at, value in changes(data):
        sector, sectors = records[place % len(records)]
        source.write_at(start + sector * 512 + at % (sectors * 512), value)
        if place & 0x8000:
            _seal_record(source, start + sector * 512)
    walk(open_xfs, source, nodes=4)


def _seal_record(source: SparseSource, at: int) -> None:
    """The checksum of a record of one header: over the header up to its 328 bytes, and its data as packed."""
    head = source.read_at(at, 512)
    length = min(int.from_bytes(head[12:16], "big"), 32 << 10)
    bare = head[:32] + bytes(4) + head[36:328]
    value = crc32c(source.read_at(at + 512, length), crc32c(bare))
    source.write_at(at + 32, struct.pack("<I", value))


@cache
def _journal(name: str) -> list[int]:
    """Places of the journal's blocks, in bytes, up to its last used one."""
    source = guest_golden.image(name)
    sb = read_superblock(source)
    runs = journal_runs(source, sb)
    blocks = [block * sb.block_bytes for run in runs for block in range(run.physical, run.physical + run.blocks)]
    return [at for at in blocks if any(source.read_at(at, 16))]


def jbd2(data: bytes) -> None:
    """The first byte tells which journal: of ext3 without checksums, or of ext4 with."""
    name = "ext3-dirty" if data[:1] < b"\x80" else "ext4-dirty"
    source = guest_golden.image(name)
    places = _journal(name)
    for place, at, value in changes(data[1:]):
        offset = places[place % len(places)]
        source.write_at(offset + at % (1024 - len(value)), value)
        if name == "ext4-dirty":
            _seal_journal(source, places[0], offset)
    walk(open_ext, source, nodes=6)


def _seal_journal(source: SparseSource, superblock: int, at: int) -> None:
    """Checksums of the journal's own blocks; those of its data stand in the blocks before."""
    block = source.read_at(at, 1024)
    kind = int.from_bytes(block[4:8], "big")
    if at == superblock:
        source.write_at(at + 0xFC, struct.pack(">I", crc32c(block[:0xFC] + bytes(4) + block[0x100:]) ^ ONES))
        return
    place = {1: 1020, 5: 1020, 2: 16}.get(kind)
    if place is not None:
        seed = crc32c(source.read_at(superblock + 0x30, 16)) ^ ONES
        bare = block[:place] + bytes(4) + block[place + 4 :]
        source.write_at(at + place, struct.pack(">I", crc32c(bare, seed ^ ONES) ^ ONES))


def partitions(data: bytes) -> None:
    """A disk that begins with the input; or a GPT or logical drives that are changed."""
    kind, rest = data[:1], data[1:]
    if kind < b"\x40":
        disk = bytearray(1 << 17)
        disk[: len(rest)] = rest[: 1 << 17]
        disk[510:512] = b"\x55\xaa"
    elif kind < b"\xa0":
        disk = volume_seal.gpt_disk()
        for place, at, value in changes(rest):
            start = (440, 512, 1024)[place % 3] + at % 512
            disk[start : start + len(value)] = value
        volume_seal.seal_gpt(disk, 1)
    else:
        disk = volume_seal.ebr_disk()
        for place, at, value in changes(rest):
            start = (0, 100, 200, 300)[place % 4] * 512 + 440 + at % 70
            disk[start : start + len(value)] = value
    for sector_bytes in (512, 4096):
        table = read_partitions(BytesSource(disk), sector_bytes)
        for part in table.partitions if table else ():
            assert part.size_bytes >= 0
            assert not part.size_bytes or part.start_bytes + part.size_bytes <= len(disk)


def lvm_text(data: bytes) -> None:
    """The metadata text itself."""
    with suppress(XbfsError):
        for volume in VolumeGroup(parse_metadata(data), volume_seal.PHYSICAL).volumes():
            assert volume.source is not None or volume.reason
            if volume.source is not None and volume.size_bytes >= 4096:
                with suppress(XbfsError):
                    volume.source.read_at(volume.size_bytes - 4096, 4096)


def thin(data: bytes) -> None:
    """Metadata of a thin pool."""
    metadata = bytearray(volume_seal.THIN)
    touched = set()
    for place, at, value in changes(data):
        block = place % 48
        start = 4096 * block + 4 + at % (4092 - len(value))
        metadata[start : start + len(value)] = value
        touched.add(block)
    for block in touched:
        volume_seal.seal_thin(metadata, block)
    with suppress(XbfsError):
        volume = ThinPool(BytesSource(metadata), BytesSource(bytes(1 << 20))).volume(1, 1 << 40, None)
        for at in (0, 1 << 20, (1 << 40) - 4096):
            with suppress(XbfsError):
                assert len(volume.read_at(at, 4096)) == 4096


def md(data: bytes) -> None:
    """Superblocks of members of an array, and all volumes that come of it."""
    cases = sorted(volume_seal.MD_CASES)
    name, numbers, at = volume_seal.MD_CASES[cases[(data[0] if data else 0) % len(cases)]]
    disks = {number: bytearray(golden_disks(name)[number]) for number in numbers}
    for place, where, value in changes(data[1:]):
        number = numbers[place % len(numbers)]
        start = at + where % 512
        disks[number][start : start + len(value)] = value
        volume_seal.seal_md1(disks[number], at)
    found = scan({number: bytes(disk) for number, disk in disks.items()})
    for volume in found.volumes:
        if volume.source is not None and volume.size_bytes >= 4096:
            with suppress(XbfsError):
                assert len(volume.source.read_at(volume.size_bytes - 4096, 4096)) == 4096


def luks(data: bytes) -> None:
    """The JSON text of a version 2 header, or a version 1 header; only parsed, since a key may take a minute."""
    if data[:1] < b"\xc0":
        disk = volume_seal.luks2_disk(data[1:12_000])
    else:
        header = volume_seal.luks1_disk()
        for _, at, value in changes(data[1:]):
            header[8 + at % 584 : 8 + at % 584 + len(value)] = value
        disk = bytes(header)
    found = find_luks(BytesSource(disk))
    assert found is None or found.problem is not None


def _explorer(name: str) -> Callable[[bytes], None]:
    def target(data: bytes) -> None:
        source = guest_golden.image(name)
        for number in _scatter(source, data):
            guest_golden.seal(name, source, number)
        walk(guest_golden.NAMES[name], source)

    return target


OWN: dict[str, Callable[[bytes], None]] = {
    "xfs": xfs,
    "xfs4": xfs4,
    "xfs_log_items": xfs_log_items,
    "xfs_log_records": xfs_log_records,
    "jbd2": jbd2,
    "partitions": partitions,
    "lvm_text": lvm_text,
    "thin": thin,
    "md": md,
    "luks": luks,
}
"""Readers that are ours."""

ADAPTED: dict[str, Callable[[bytes], None]] = {
    name: _explorer(name) for name in ("ext4", "btrfs", "ntfs", "fat", "exfat")
}
"""Filesystems read by fs_explorer, through our adapter."""

TARGETS = OWN | ADAPTED


def seeds(name: str) -> list[bytes]:
    """Inputs to begin with."""
    if name == "lvm_text":
        return [volume_seal.TEXT]
    if name == "luks":
        return [b"\0" + json.dumps(volume_seal.LUKS2).encode(), b"\xff" + bytes(12)]
    if name == "partitions":
        return [b"\0" + bytes(volume_seal.gpt_disk()[:1200]), b"\x50" + bytes(12), b"\xf0" + bytes(12)]
    if name == "xfs_log_items":
        inode = struct.pack("<HHIHHH2xQ16sqii", 0x123B, 2, 1, 0, 0, 0, 67, bytes(16), 32, 1, 0)
        return [struct.pack("<HB", len(inode), 0) + inode + struct.pack("<HB", 176, 0) + b"NI" + bytes(174)]
    return [hashlib.sha512(b"%d" % number).digest() for number in range(12)]
