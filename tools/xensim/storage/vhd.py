"""VHD streams as vhd-tool of a host writes and reads them (xen-api, ocaml/vhd-tool and ocaml/libs/vhd).

Written: backup footer at 0, header at 512, an empty sector at 1536, BAT at 2048, then the blocks in ascending order,
each a bitmap of 0xFF and 2 MiB, and the footer again; no batmap, creator "caml". Read: in physical order, skipping
forward only; only sectors with their bit set count, and who the parent is does not matter. Pure.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np

from .layers import runs

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray

    Read = Callable[[int], bytes]
    Write = Callable[[int, memoryview], None]
    """A place in the disk and bytes for it."""

SECTOR: Final = 512
BLOCK: Final = 2 << 20
UNUSED: Final = 0xFFFFFFFF
HEADER_AT: Final = 512
BAT_AT: Final = 2048
FIXED: Final = 2
DYNAMIC: Final = 3
DIFFERENCING: Final = 4
_FOOTER: Final = struct.Struct(">8sIIQI4sI4sQQIII16sB427x")
_HEADER: Final = struct.Struct(">8sQQIIII16sII512s192x256x")
assert _FOOTER.size == 512
assert _HEADER.size == 1024
_FOOTER_CHECKSUM: Final = 64
_HEADER_CHECKSUM: Final = 36
_VERSION: Final = 0x00010000
_FULL_BITMAP: Final = b"\xff" * SECTOR
_ENTRIES_MOST: Final = 1 << 21
"""Blocks of 4 TiB, more than any VHD has."""


class Malformed(Exception):
    """The stream is no VHD that vhd-tool would take."""


class Identity(NamedTuple):
    """What is fresh in every export: uuid, and the seconds since 2000."""

    uuid: bytes
    timestamp: int


def length(blocks: NDArray[np.bool_]) -> int:
    """Bytes of the stream."""
    return _data_at(len(blocks)) + int(blocks.sum()) * (SECTOR + BLOCK) + SECTOR


def encode(
    size_bytes: int,
    blocks: NDArray[np.bool_],
    identity: Identity,
    read_into: Callable[[int, memoryview], None],
    parent: Identity | None = None,
) -> Iterator[bytes | memoryview]:
    """The stream of a disk whose ``blocks`` are given; each piece is valid until the next is asked for."""
    kind = DYNAMIC if parent is None else DIFFERENCING
    foot = _footer(size_bytes, kind, identity)
    bat = np.full(-(-len(blocks) // 128) * 128, UNUSED, dtype=">u4")
    present = np.flatnonzero(blocks)
    bat[present] = (_data_at(len(blocks)) + np.arange(len(present)) * (SECTOR + BLOCK)) // SECTOR
    yield foot + _header(len(blocks), parent) + bytes(SECTOR) + bat.tobytes()
    buffer = memoryview(bytearray(SECTOR + BLOCK))
    buffer[:SECTOR] = _FULL_BITMAP
    for index in present.tolist():
        inside = min(BLOCK, size_bytes - index * BLOCK)
        read_into(index * BLOCK, buffer[SECTOR : SECTOR + inside])
        buffer[SECTOR + inside :] = bytes(BLOCK - inside)
        yield buffer
    yield foot


def decode(read: Read, length_bytes: int, write: Write) -> None:
    """Write the sectors of a stream of ``length_bytes`` to a disk; ``read`` gives so many bytes or fewer at the end.

    Raises Malformed.
    """
    source = _Forward(read)
    foot = source.take(SECTOR)
    fields = _checked(_FOOTER, foot, _FOOTER_CHECKSUM, b"conectix")
    header_at, kind = fields[3], fields[11]
    if kind not in (DYNAMIC, DIFFERENCING):
        raise Malformed(f"disk type {kind}")
    source.skip_to(header_at)
    header = _checked(_HEADER, source.take(_HEADER.size), _HEADER_CHECKSUM, b"cxsparse")
    table_at, entries, block_bytes = header[2], header[4], header[5]
    if entries > _ENTRIES_MOST or block_bytes != BLOCK:
        raise Malformed(f"{entries} blocks of {block_bytes} bytes")
    source.skip_to(table_at)
    bat = np.frombuffer(source.take(entries * 4), dtype=">u4")
    # Keyed by sector, as in vhd-tool: of two entries with one place, one is lost.
    places = {int(bat[index]): index for index in np.flatnonzero(bat != UNUSED).tolist()}
    for sector in sorted(places):
        source.skip_to(sector * SECTOR)
        bits = np.unpackbits(np.frombuffer(source.take(SECTOR), dtype=np.uint8)).astype(np.bool_)
        data = memoryview(source.take(BLOCK))
        for first, last, present in runs(bits, 0, len(bits)):
            if present:
                write(places[sector] * BLOCK + first * SECTOR, data[first * SECTOR : last * SECTOR])
    source.skip_to((length_bytes - 1) & ~(SECTOR - 1))
    _checked(_FOOTER, source.take(SECTOR), _FOOTER_CHECKSUM, b"conectix")


class _Forward:
    """A stream that is read from front to back."""

    def __init__(self, read: Read) -> None:
        self._read = read
        self._at = 0

    def take(self, size: int) -> bytes:
        data = bytearray()
        while len(data) < size:
            piece = self._read(size - len(data))
            if not piece:
                raise Malformed("the stream ends too early")
            data += piece
        self._at += size
        return bytes(data)

    def skip_to(self, offset: int) -> None:
        if offset < self._at:
            raise Malformed("cannot go back in a stream")
        while self._at < offset:
            self.take(min(offset - self._at, BLOCK))


def _data_at(entries: int) -> int:
    return BAT_AT + -(-entries // 128) * SECTOR


def _footer(size_bytes: int, kind: int, identity: Identity) -> bytes:
    return summed(
        _FOOTER.pack(
            b"conectix",
            2,
            _VERSION,
            HEADER_AT,
            identity.timestamp,
            b"caml",
            1,
            bytes(4),
            size_bytes,
            size_bytes,
            geometry(size_bytes // SECTOR),
            kind,
            0,
            identity.uuid,
            0,
        ),
        _FOOTER_CHECKSUM,
    )


def _header(entries: int, parent: Identity | None) -> bytes:
    name = "" if parent is None else "base.vhd"
    uuid, timestamp = (bytes(16), 0) if parent is None else parent
    packed = _HEADER.pack(
        b"cxsparse",
        (1 << 64) - 1,
        BAT_AT,
        _VERSION,
        entries,
        BLOCK,
        0,
        uuid,
        timestamp,
        0,
        name.encode("utf-16-be"),
    )
    return summed(packed, _HEADER_CHECKSUM)


def summed(packed: bytes, at: int) -> bytes:
    """A record with its checksum, which stands at ``at``."""
    return packed[:at] + struct.pack(">I", ~sum(packed) & 0xFFFFFFFF) + packed[at + 4 :]


def _checked(layout: struct.Struct, packed: bytes, at: int, cookie: bytes) -> tuple[int, ...]:
    plain = packed[:at] + bytes(4) + packed[at + 4 :]
    if packed[:8] != cookie or summed(plain, at) != packed:
        raise Malformed(f"no {cookie.decode()} record")
    return layout.unpack(packed)


def geometry(sectors: int) -> int:
    """Cylinders, heads, sectors per track (Microsoft, Virtual Hard Disk Image Format Specification, appendix)."""
    sectors = min(sectors, 65535 * 16 * 255)
    if sectors >= 65535 * 16 * 63:
        per_track, heads = 255, 16
        cylinders_times_heads = sectors // per_track
    else:
        per_track = 17
        cylinders_times_heads = sectors // per_track
        heads = max(4, (cylinders_times_heads + 1023) // 1024)
        if cylinders_times_heads >= heads * 1024 or heads > 16:
            per_track, heads = 31, 16
            cylinders_times_heads = sectors // per_track
        if cylinders_times_heads >= heads * 1024:
            per_track, heads = 63, 16
            cylinders_times_heads = sectors // per_track
    return (cylinders_times_heads // heads) << 16 | heads << 8 | per_track
