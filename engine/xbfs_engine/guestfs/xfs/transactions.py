"""Transactions in the log: operations of its records put together to items, in the order in which they are replayed.

Layout: "XFS Algorithms & Data Structures", chapter Journaling Log; the kernel's xfs_log_format.h.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final, NamedTuple

from xbfs_engine.core.errors import GuestDamaged

if TYPE_CHECKING:
    from collections.abc import Iterator

    from xbfs_engine.guestfs.xfs.log import Log, Record

ITEM_INODE: Final = 0x123B
ITEM_BUFFER: Final = 0x123C
ITEM_ICREATE: Final = 0x123F

BUFFER_INODES: Final = 1 << 0
BUFFER_CANCELLED: Final = 1 << 1

_OPERATION: Final = struct.Struct(">IIBB2x")
_START: Final = 0x01
_COMMIT: Final = 0x02
_CONTINUED: Final = 0x04
_CONTINUES: Final = 0x08
_ENDS: Final = 0x10
_UNMOUNT: Final = 0x20

_TRANSACTION: Final = struct.Struct("<4I")
_TRANSACTION_MAGIC: Final = 0x5452_414E
_ITEM: Final = struct.Struct("<HH")
_FLAGS_AT: Final = 4


class Item(NamedTuple):
    """A logged change: its format structure, then the regions that it describes."""

    type: int
    regions: list[bytes]
    lsn: int
    """Of the record in which its transaction began."""

    @property
    def flags(self) -> int:
        """Of a buffer."""
        return int.from_bytes(self.regions[0][_FLAGS_AT : _FLAGS_AT + 2], "little")


def committed_items(log: Log) -> Iterator[list[Item]]:
    """Items of each transaction whose commit is in the log, between the tail and the head."""
    open_ones: dict[int, _Transaction] = {}
    for record, content in log.records():
        for number, flags, data in _operations(record, content):
            if flags & _START:
                if number in open_ones or data:
                    raise GuestDamaged(f"log: transaction {number:#x} begins twice")
                open_ones[number] = _Transaction(record.lsn)
            elif number not in open_ones:
                continue  # it began before the tail, so nothing of it is needed
            elif flags & _COMMIT:
                yield open_ones.pop(number).items()
            elif flags & _UNMOUNT:
                del open_ones[number]
            else:
                open_ones[number].add(data, continues=bool(flags & _CONTINUES))


def _operations(record: Record, content: bytes) -> Iterator[tuple[int, int, bytes]]:
    at = 0
    for _ in range(record.operations):
        if at + _OPERATION.size > len(content):
            raise GuestDamaged(f"log: an operation reaches out of the record at sector {record.sector}")
        number, length, _, flags = _OPERATION.unpack_from(content, at)
        at += _OPERATION.size
        if length > len(content) - at:
            raise GuestDamaged(f"log: an operation reaches out of the record at sector {record.sector}")
        yield number, flags, content[at : at + length]
        at += length


class _Transaction:
    """A transaction that is being put together."""

    def __init__(self, lsn: int) -> None:
        self._lsn = lsn
        self._header: bytes | None = None
        self._items: list[tuple[int, list[bytes]]] = []
        """Of each its number of regions, and those that there are."""

    def add(self, data: bytes, *, continues: bool) -> None:
        """The next region, or more of the last; both records and regions may be cut anywhere."""
        if self._header is None or (continues and not self._items):
            self._header = (self._header or b"") + data
            if len(self._header) > _TRANSACTION.size:
                raise GuestDamaged("log: a transaction has no header")
        elif continues:
            regions = self._items[-1][1]
            regions[-1] += data
        elif data:
            if not self._items or len(self._items[-1][1]) == self._items[-1][0]:
                if len(data) < _ITEM.size:
                    raise GuestDamaged("log: an item has no header")
                count = _ITEM.unpack_from(data)[1]
                if not count:
                    raise GuestDamaged("log: an item of no regions")
                self._items.append((count, [data]))
            else:
                self._items[-1][1].append(data)

    def items(self) -> list[Item]:
        """What is replayed: buffers, then everything else, then buffers of inodes, last what was cancelled."""
        if self._header is None:
            return []
        if len(self._header) != _TRANSACTION.size or _TRANSACTION.unpack(self._header)[0] != _TRANSACTION_MAGIC:
            raise GuestDamaged("log: a transaction has no header")
        if any(count != len(regions) for count, regions in self._items):
            raise GuestDamaged("log: an item lacks regions")
        items = [Item(_ITEM.unpack_from(regions[0])[0], regions, self._lsn) for _, regions in self._items]
        return sorted(items, key=_rank)


def _rank(item: Item) -> int:
    if item.type == ITEM_ICREATE:
        return 0
    if item.type != ITEM_BUFFER:
        return 1
    if item.flags & BUFFER_CANCELLED:
        return 3
    return 2 if item.flags & BUFFER_INODES else 0
