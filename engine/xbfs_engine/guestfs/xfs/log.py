"""The log as a ring of records: where it ends, where replay begins, whether the volume was unmounted, and its records.

Found as the kernel finds it (xfs_log_recover.c): every sector starts with the number of the cycle that wrote it, so
the head is where the number falls; writes that were under way when the guest stopped may have left holes and torn
records before it, so the last two MiB are looked through, and the last eight records checked.
Layout: "XFS Algorithms & Data Structures", chapter Journaling Log; the kernel's xfs_log_format.h. A *sector* here is
one of 512 bytes counted from the start of the log.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np

from xbfs_engine.core.errors import GuestDamaged, GuestUnsupported
from xbfs_engine.guestfs.crc32c import crc32c
from xbfs_engine.guestfs.xfs.geometry import SECTOR

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from xbfs_engine.formats.source import BlockSource
    from xbfs_engine.guestfs.xfs.geometry import Geometry

_MAGIC: Final = 0xFEED_BABE
_HEADER: Final = struct.Struct(">4I2Q4x2I256xI16sI")
_CRC_AT: Final = 32
_CYCLES_AT: Final = 44
_CYCLES: Final = 64
"""Sectors whose first words one header holds; further ones are in extended headers, after four bytes of each."""
_EXTENDED_BYTES: Final = 4 + 4 * _CYCLES
_HEADER_SIZES: Final = (328, 324)
"""What the checksum covers of the header, as 64-bit and as 32-bit kernels pad it."""
_HEADER_COVERS_BYTES: Final = _CYCLES * SECTOR

_RECORD_BYTES_MAX: Final = 256 << 10
_RECORDS_IN_FLIGHT: Final = 8
_WINDOW: Final = _RECORDS_IN_FLIGHT * _RECORD_BYTES_MAX // SECTOR
"""Sectors before the head that may have been under way."""

_FORMAT_LITTLE_ENDIAN: Final = 1
_OPERATION_FLAGS_AT: Final = 9
_UNMOUNT: Final = 0x20


class Record(NamedTuple):
    """A record's header. ``data_sectors`` of content follow ``header_sectors`` from ``sector``."""

    sector: int
    lsn: int
    tail_lsn: int
    length: int
    operations: int
    header_sectors: int

    @property
    def sectors(self) -> int:
        """All of it."""
        return self.header_sectors + -(-self.length // SECTOR)


class Log:
    """The log of one volume."""

    def __init__(self, source: BlockSource, geometry: Geometry) -> None:
        if not geometry.log_block:
            raise GuestUnsupported("the log is on another device")
        if not geometry.log_blocks:
            raise GuestDamaged("log: the superblock gives it no blocks")
        self._source = source
        self._start = geometry.offset_of(geometry.log_block, geometry.log_blocks)
        self._uuid = geometry.uuid.bytes
        self._has_checksums = geometry.has_checksums
        self.sectors = (geometry.log_blocks << geometry.block_log) // SECTOR
        self.last: Record | None = None
        """The last sound record; None if nothing was ever logged."""
        if self._cycle(0):
            self.last = self._find_last()

    @property
    def is_clean(self) -> bool:
        """The last record says that the volume was unmounted, or there is none."""
        last = self.last
        if last is None:
            return True
        first_operation = self._read(last.sector + last.header_sectors, 1)
        return last.operations == 1 and bool(first_operation[_OPERATION_FLAGS_AT] & _UNMOUNT)

    @property
    def pending_bytes(self) -> int:
        """From the tail to the head: what replay has to read."""
        assert self.last is not None
        tail = self.last.tail_lsn & 0xFFFF_FFFF
        return ((self.last.sector - tail) % self.sectors + self.last.sectors) * SECTOR

    def records(self) -> Iterator[tuple[Record, bytes]]:
        """Records from the tail to the last, with their content; GuestDamaged if one is not sound."""
        assert self.last is not None
        sector = self.last.tail_lsn & 0xFFFF_FFFF
        if sector >= self.sectors:
            raise GuestDamaged(f"log: the tail is at sector {sector} of {self.sectors}")
        expected = self.last.tail_lsn
        while True:
            record = self._record(sector)
            if record is None or record.lsn < expected or record.lsn > self.last.lsn:
                raise GuestDamaged(f"log: there is no record at sector {sector}")
            yield record, self._content(record)
            if record.sector == self.last.sector:
                return
            expected = record.lsn + 1
            sector = (sector + record.sectors) % self.sectors

    def _read(self, sector: int, count: int) -> bytes:
        """Sectors of the ring: it goes on at its start."""
        sector %= self.sectors
        here = min(count, self.sectors - sector)
        data = self._source.read_at(self._start + sector * SECTOR, here * SECTOR)
        return data if here == count else data + self._source.read_at(self._start, (count - here) * SECTOR)

    def _cycle(self, sector: int) -> int:
        return int(_cycles(self._read(sector, 1))[0])

    def _find_last(self) -> Record | None:
        head, old = self._find_fall()
        window = min(self.sectors, _WINDOW) if old else min(head, _WINDOW)
        data = self._read(head - window, window)
        cycles = _cycles(data)
        # Before the start of the ring is the cycle before, in which a hole is one older again.
        holes = cycles == old
        wrapped = max(0, window - head)
        holes[:wrapped] = cycles[:wrapped] == old - 1
        end = int(np.argmax(holes)) if holes.any() else window
        starts = [int(at) for at in np.flatnonzero(_words(data)[:end] == _MAGIC)]
        records = [self._record(head - window + at) for at in starts]
        return self._last_sound(records, (head - window + end) % self.sectors)

    def _find_fall(self) -> tuple[int, int]:
        """The first sector of the older cycle, or the log's end, and that cycle's number."""
        first, last = self._cycle(0), self._cycle(self.sectors - 1)
        if first == last:
            return self.sectors, last - 1
        low, high = 0, self.sectors - 1
        while high - low > 1:
            middle = (low + high) // 2
            if self._cycle(middle) == last:
                high = middle
            else:
                low = middle
        return high, last

    def _last_sound(self, records: list[Record | None], head: int) -> Record | None:
        """The last record before the head that is whole, if those before it are; none if nothing is sound."""
        last: Record | None = None
        starts = [record.sector if record else None for record in records]
        candidates = list(zip(records, [*starts[1:], head], strict=False))[-_RECORDS_IN_FLIGHT - 1 :]
        for record, end in candidates:
            if record is None or (record.sector + record.sectors) % self.sectors != end:
                break
            try:
                self._content(record)
            except GuestDamaged:
                break
            last = record
        if last is None:
            raise GuestDamaged("log: there is no sound record at its head")
        return last

    def _record(self, sector: int) -> Record | None:
        sector %= self.sectors
        data = self._read(sector, 1)
        magic, cycle, version, length, lsn, tail_lsn, _, operations, form, uuid, size = _HEADER.unpack_from(data)
        if magic != _MAGIC or lsn != cycle << 32 | sector or version not in (1, 2) or uuid != self._uuid:
            return None
        if form != _FORMAT_LITTLE_ENDIAN:
            raise GuestUnsupported("the log was written by a big-endian machine")
        if not 0 < length <= _RECORD_BYTES_MAX or size > _RECORD_BYTES_MAX:
            return None
        header_sectors = max(1, -(-size // _HEADER_COVERS_BYTES)) if version == 2 else 1
        return Record(sector, lsn, tail_lsn, length, operations, header_sectors)

    def _content(self, record: Record) -> bytes:
        """A record's content, checked, with the words that cycle numbers took the place of put back."""
        data = self._read(record.sector, record.sectors)
        start = record.header_sectors * SECTOR
        self._check(record, data)
        content = bytearray(data[start : start + record.length])
        for index in range(-(-record.length // SECTOR)):
            header, slot = divmod(index, _CYCLES)
            at = header * SECTOR + 4 * slot + (4 if header else _CYCLES_AT)
            content[index * SECTOR : index * SECTOR + 4] = data[at : at + 4]
        return bytes(content)

    def _check(self, record: Record, data: bytes) -> None:
        if -(-record.length // _HEADER_COVERS_BYTES) > record.header_sectors:
            raise GuestDamaged(f"log: the record at sector {record.sector} has too few headers")
        stored = int.from_bytes(data[_CRC_AT : _CRC_AT + 4], "little")
        # Older kernels wrote none; nor does mkfs.xfs in the record that says the new filesystem is not mounted.
        if not stored and (not self._has_checksums or record.operations == 1):
            return
        for header_bytes in _HEADER_SIZES:
            found = crc32c(data[:_CRC_AT] + bytes(4) + data[_CRC_AT + 4 : header_bytes])
            for index in range(1, -(-record.length // _HEADER_COVERS_BYTES)):
                found = crc32c(data[index * SECTOR : index * SECTOR + _EXTENDED_BYTES], found)
            found = crc32c(data[record.header_sectors * SECTOR :][: record.length], found)
            if found == stored:
                return
        raise GuestDamaged(f"log: the checksum of the record at sector {record.sector} is wrong")


def _words(data: bytes) -> NDArray[np.uint32]:
    """The first word of each sector."""
    return np.frombuffer(data, ">u4").reshape(-1, SECTOR // 4)[:, 0].astype(np.uint32)


def _cycles(data: bytes) -> NDArray[np.uint32]:
    """The cycle that wrote each sector; headers hold it after their magic number."""
    table = np.frombuffer(data, ">u4").reshape(-1, SECTOR // 4)
    cycles: NDArray[np.uint32] = np.where(table[:, 0] == _MAGIC, table[:, 1], table[:, 0]).astype(np.uint32)
    return cycles
