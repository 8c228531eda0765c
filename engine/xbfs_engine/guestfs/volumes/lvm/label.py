"""LVM2's label on a physical volume, and the metadata text that the physical volume carries.

Layout: LVM2 ``lib/format_text/layout.h`` (label in one of the first four sectors, pv_header, mda_header with its
circular buffer) and ``lib/misc/crc.c``. All integers are little-endian. Pure functions, callable from any thread.
"""

from __future__ import annotations

import struct
import zlib
from itertools import pairwise
from typing import TYPE_CHECKING, Final, NamedTuple

from xbfs_engine.core.limits import MIB

if TYPE_CHECKING:
    from xbfs_engine.formats.source import BlockSource

_SECTOR: Final = 512
_LABEL: Final = struct.Struct("<8sQII8s")
_AREA: Final = struct.Struct("<QQ")
_MDA: Final = struct.Struct("<I16sIQQ")
_LOCATION: Final = struct.Struct("<QQII")
_MDA_MAGIC: Final = b" LVM2 x[5A%r0N*>"
_MDA_BYTES: Final = 512
_CRC_START: Final = 0xF597A6CF
_IGNORED: Final = 1
"""Flag of a location that LVM does not keep up to date."""

METADATA_BYTES_MAX: Final = 16 * MIB
"""Longer metadata is refused: LVM's own areas have 1 MiB unless told otherwise."""

_AREAS_MAX: Final = 8


class PvLabel(NamedTuple):
    """A physical volume as it describes itself."""

    uuid: str
    """In LVM's spelling, with hyphens."""
    size_bytes: int
    metadata_areas: tuple[tuple[int, int], ...]
    """(offset, length) of each, in bytes."""


class PvMetadata(NamedTuple):
    """The metadata text of one area, or why there is none."""

    text: bytes
    problem: str


def find_lvm_label(source: BlockSource) -> PvLabel | None:
    """The label, or None if no sector that may hold one does, or its checksum is wrong."""
    head = source.read_at(0, min(4 * _SECTOR, source.size_bytes))
    for number in range(len(head) // _SECTOR):
        sector = head[number * _SECTOR : (number + 1) * _SECTOR]
        magic, own_sector, checksum, header_at, kind = _LABEL.unpack_from(sector)
        if magic == b"LABELONE" and kind == b"LVM2 001" and own_sector == number:
            if _crc(sector[20:]) != checksum or not _LABEL.size <= header_at <= _SECTOR - 40:
                continue
            return _pv_header(sector, header_at)
    return None


def _pv_header(sector: bytes, at: int) -> PvLabel:
    (size,) = struct.unpack_from("<Q", sector, at + 32)
    lists: list[list[tuple[int, int]]] = [[], []]
    position = at + 40
    for areas in lists:
        while position + _AREA.size <= _SECTOR:
            area = _AREA.unpack_from(sector, position)
            position += _AREA.size
            if not area[0]:
                break
            areas.append(area)
    return PvLabel(spelled(sector[at : at + 32]), size, tuple(lists[1][:_AREAS_MAX]))


def spelled(raw: bytes) -> str:
    """LVM's 32 characters of an id with hyphens, as LVM writes it in metadata."""
    text = raw.decode("ascii", "replace")
    cuts = (0, 6, 10, 14, 18, 22, 26, 32)
    return "-".join(text[a:b] for a, b in pairwise(cuts))


def read_metadata(source: BlockSource, label: PvLabel) -> list[PvMetadata]:
    """What each metadata area holds; areas that LVM ignores or never wrote to are left out."""
    found = []
    for start, length in label.metadata_areas:
        metadata = _read_area(source, start, length)
        if metadata is not None:
            found.append(metadata)
    return found


def _read_area(source: BlockSource, start: int, length: int) -> PvMetadata | None:
    if start + max(length, _MDA_BYTES) > source.size_bytes:
        return PvMetadata(b"", f"the metadata area at byte {start} lies beyond the end of the device")
    header = source.read_at(start, _MDA_BYTES)
    checksum, magic, version, own_start, area_bytes = _MDA.unpack_from(header)
    if magic != _MDA_MAGIC or version != 1 or own_start != start or _crc(header[4:]) != checksum:
        return PvMetadata(b"", f"the header of the metadata area at byte {start} is damaged")
    offset, size, text_checksum, flags = _LOCATION.unpack_from(header, _MDA.size)
    if not offset or flags & _IGNORED:
        return None
    if (
        area_bytes > length
        or size > min(METADATA_BYTES_MAX, area_bytes - _MDA_BYTES)
        or not _MDA_BYTES <= offset < area_bytes
    ):
        return PvMetadata(b"", f"the metadata area at byte {start} claims {size} bytes of text at {offset}")
    first = min(size, area_bytes - offset)
    text = source.read_at(start + offset, first) + source.read_at(start + _MDA_BYTES, size - first)
    if _crc(text) != text_checksum:
        return PvMetadata(b"", f"the metadata text at byte {start + offset} does not match its checksum")
    return PvMetadata(text, "")


def _crc(data: bytes) -> int:
    """CRC-32 with LVM's start value and without the inversions that zlib does at both ends."""
    return zlib.crc32(data, _CRC_START ^ 0xFFFF_FFFF) ^ 0xFFFF_FFFF
