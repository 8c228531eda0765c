"""What the library's NTFS reader lacks: refusals where it would give zeros, security descriptors, and dirty flags.

Facts: the layouts published by the linux-ntfs project (attributes, $LogFile, $Secure), MS-FSCC for reparse points.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final, NamedTuple

from fs_explorer.errors import CorruptDataError, UnsupportedFormatError
from fs_explorer.filesystems.ntfs import (
    AT_ATTRIBUTE_LIST,
    AT_DATA,
    AT_STANDARD_INFORMATION,
    ATTR_COMPRESSED,
    ATTR_SPARSE,
    MAX_ATTR_LIST,
    TAG_WOF,
    VOLUME_RECNO,
    NTFSTree,
    apply_fixups,
)
from fs_explorer.io.view import BufferRA

if TYPE_CHECKING:
    from fs_explorer.filesystems.ntfs import _Attr, _File, _Record
    from fs_explorer.io.source import RandomAccess

_LOGFILE_RECORD: Final = 2
_SECURE_RECORD: Final = 9
_SECURITY_DESCRIPTOR: Final = 0x50
_VOLUME_INFORMATION: Final = 0x70
_VOLUME_DIRTY: Final = 0x1

_LIST_ENTRY: Final = struct.Struct("<IHBBqQH")
_RECORD_MASK: Final = (1 << 48) - 1

_SDS_ENTRY: Final = struct.Struct("<IIQI")
"""Hash, number, offset, length of the entry with this head."""
_SDS_BYTES_MAX: Final = 64 << 20
_SDS_HALF_BYTES: Final = 256 << 10
"""Each part of this size is followed by a copy of itself."""
_SDS_ALIGNMENT: Final = 16
DESCRIPTOR_BYTES_MAX: Final = 64 << 10

_RESTART_PAGE: Final = struct.Struct("<4sHHQIIH")
"""RSTR, fixups (offset, count), checked LSN, sizes of system and log pages, offset of the restart area."""
_RESTART_AREA: Final = struct.Struct("<QHHHH")
"""Current LSN, number of clients, first free and first used one, flags."""
_NO_CLIENT: Final = 0xFFFF
_LOG_IS_CLEAN: Final = 0x2

_WOF_TABLE_BYTES_MAX: Final = 16 << 20
"""The table of a file of 16 GiB in the smallest chunks."""
_WOF_CHUNK_BYTES_MIN: Final = 4096


class Reparse(NamedTuple):
    """A reparse point: its tag and data (MS-FSCC 2.1.2)."""

    tag: int
    data: bytes


class CheckedTree(NTFSTree):
    """The library's reader, which takes what is missing from a run list for a hole."""

    def _assemble(self, rec: _Record) -> _File:
        file = super()._assemble(rec)
        listing = next((attr for attr in rec.attrs if attr.type == AT_ATTRIBUTE_LIST), None)
        if listing is not None:
            self._check_fragments(rec, file, self._attr_bytes(listing, MAX_ATTR_LIST))
        return file

    def _check_fragments(self, rec: _Record, file: _File, listing: bytes) -> None:
        """No fragment of an attribute may be missing: the library fills the gap with a hole."""
        records, at = {rec.recno}, 0
        while at + _LIST_ENTRY.size <= len(listing):
            _, length, _, _, _, reference, _ = _LIST_ENTRY.unpack_from(listing, at)
            if length < _LIST_ENTRY.size:
                break
            records.add(reference & _RECORD_MASK)
            at += length
        found: dict[tuple[int, str], int] = {}
        for number in records:
            for attr in rec.attrs if number == rec.recno else self._record(number).attrs:
                if not attr.resident:
                    key = attr.type, attr.name
                    found[key] = found.get(key, 0) + sum(count for _, count in attr.runs)
        for attr in file.attrs:
            if not attr.resident and sum(count for _, count in attr.runs) != found.get((attr.type, attr.name)):
                raise CorruptDataError(f"ntfs: a part of attribute {attr.type:#x} of record {file.recno} is missing")

    def _attr_ra(self, a: _Attr) -> RandomAccess:
        if not a.resident:
            needed = -(-min(a.init_size, a.data_size) // self.cluster_size)
            holes = bool(a.flags & (ATTR_SPARSE | ATTR_COMPRESSED))
            covered = 0
            for start, count in a.runs:
                if covered < needed and start is None and not holes:
                    raise CorruptDataError(
                        f"ntfs: attribute {a.type:#x} of record {a.recno} has a hole and is not sparse"
                    )
                covered += count
            if covered < needed:
                raise CorruptDataError(f"ntfs: attribute {a.type:#x} of record {a.recno} is longer than its clusters")
        return super()._attr_ra(a)

    def reparse(self, file: _File) -> Reparse | None:
        """The file's reparse point, if it has one."""
        tag, data = self._reparse(file)
        return None if tag is None else Reparse(tag, data)

    def check_compressed_file(self, file: _File) -> None:
        """Whether a file that the system compressed (WOF) has its content where it is looked for, in sane numbers."""
        stream, data = file.find(AT_DATA, "WofCompressedData"), file.find(AT_DATA)
        if stream is None:
            raise UnsupportedFormatError(
                None, f"record {file.recno} is kept in an image file (reparse tag {TAG_WOF:#x})"
            )
        size = data.size if data is not None else 0
        table = size // _WOF_CHUNK_BYTES_MIN * (8 if size > 0xFFFF_FFFF else 4)
        if table > _WOF_TABLE_BYTES_MAX or stream.size > self.ra.size:
            raise UnsupportedFormatError(None, f"record {file.recno} is a compressed file of {size} bytes")

    def data_ranges(self, attr: _Attr) -> list[tuple[int, int]] | None:
        """Which parts of an attribute's content are stored, None if all of it is."""
        if attr.resident:
            return None
        # Of a compressed attribute a unit is a hole if nothing of it is stored.
        unit = 1 << attr.cu if attr.flags & ATTR_COMPRESSED else 1
        ranges: list[tuple[int, int]] = []
        at = 0
        for start, count in attr.runs:
            if start is not None:
                first, end = at // unit * unit * self.cluster_size, -(-(at + count) // unit) * unit * self.cluster_size
                if ranges and ranges[-1][0] + ranges[-1][1] >= first:
                    ranges[-1] = (ranges[-1][0], end - ranges[-1][0])
                else:
                    ranges.append((first, end - first))
            at += count
        # What lies behind the initialized size was never written.
        return [(first, min(length, attr.init_size - first)) for first, length in ranges if first < attr.init_size]

    def dirty_reason(self) -> str:
        """Why what is shown may not be what Windows would show, or nothing."""
        information = self._file(VOLUME_RECNO).find(_VOLUME_INFORMATION)
        flags = (
            struct.unpack_from("<H", information.value, 10)[0] if information and len(information.value) >= 12 else 0
        )
        if flags & _VOLUME_DIRTY:
            return "it is marked for checking: Windows would check it before using it"
        log = self._file(_LOGFILE_RECORD).find(AT_DATA)
        if log is not None and not log.resident and not self._log_is_clean(self._attr_ra(log)):
            return "it was mounted: changes that only its log holds are missing"
        return ""

    def _log_is_clean(self, log: RandomAccess) -> bool:
        """Of the two restart pages the newer tells; a log that was wiped has none."""
        newest = None
        pages = [0, 4096]
        for offset in pages:
            raw = bytearray(log.read_at(offset, 4096))
            if raw[:4] != b"RSTR":
                continue
            _, _, _, _, system_page, _, area_at = _RESTART_PAGE.unpack_from(raw)
            if offset == 0 and system_page != 4096 and 512 <= system_page <= 65536:
                pages.append(system_page)
            try:
                apply_fixups(raw, "restart page")
            except CorruptDataError:
                continue
            if area_at + _RESTART_AREA.size <= len(raw):
                area = _RESTART_AREA.unpack_from(raw, area_at)
                newest = max(newest, area) if newest else area
        if newest is None:
            return log.read_at(0, 4) in (b"\xff" * 4, b"")
        _, _, _, used, flags = newest
        return used == _NO_CLIENT or bool(flags & _LOG_IS_CLEAN)


class Descriptors:
    """Security descriptors by number, from the stream they are kept in; where each lies is found out once."""

    def __init__(self, tree: CheckedTree) -> None:
        self._tree = tree
        self._places: dict[int, tuple[int, int]] | None = None
        self._stream: RandomAccess = BufferRA(b"")

    def of(self, file: _File) -> bytes:
        """A file's descriptor, self-relative (MS-DTYP 2.4.6); empty if it has none."""
        own = file.find(_SECURITY_DESCRIPTOR)
        if own is not None:
            return self._tree._attr_bytes(own, DESCRIPTOR_BYTES_MAX)
        information = file.find(AT_STANDARD_INFORMATION)
        if information is None or len(information.value) < 56:
            return b""
        if self._places is None:
            self._places = self._find()
        number = struct.unpack_from("<I", information.value, 52)[0]
        place = self._places.get(number)
        return b"" if place is None else self._stream.read_exact(*place)

    def _find(self) -> dict[int, tuple[int, int]]:
        stream = self._tree._file(_SECURE_RECORD).find(AT_DATA, "$SDS")
        if stream is None:
            return {}
        if stream.size > _SDS_BYTES_MAX:
            raise UnsupportedFormatError(None, f"{stream.size} bytes of security descriptors")
        self._stream = self._tree._attr_ra(stream)
        places: dict[int, tuple[int, int]] = {}
        for part in range(0, self._stream.size, 2 * _SDS_HALF_BYTES):
            data = self._stream.read_at(part, _SDS_HALF_BYTES)
            at = 0
            while at + _SDS_ENTRY.size <= len(data):
                _, number, offset, length = _SDS_ENTRY.unpack_from(data, at)
                if length < _SDS_ENTRY.size or offset != part + at or length > DESCRIPTOR_BYTES_MAX:
                    break
                places[number] = (offset + _SDS_ENTRY.size, length - _SDS_ENTRY.size)
                at += length + -length % _SDS_ALIGNMENT
        return places
