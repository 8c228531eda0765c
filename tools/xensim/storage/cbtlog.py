"""CBT logs in the layout of blktap's cbt-util: header of 48 bytes, then a bit per 64 KiB, lowest bit first.

Header, little-endian: parent uuid[16], child uuid[16], int32 consistent, 4 bytes padding, uint64 size of the disk in
bytes (blktap cbt/include/libcbt.h, struct cbt_log_metadata). One thread at a time per log; the caller sees to it.
"""

from __future__ import annotations

import os
import struct
import uuid as uuids
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from pathlib import Path

BLOCK: Final = 64 * 1024
_HEADER: Final = struct.Struct("<16s16si4xQ")
assert _HEADER.size == 48
NO_UUID: Final = str(uuids.UUID(int=0))
# What SM does to a bitmap before it leaves: the order of the bits in every byte is turned round.
_REVERSED: Final = bytes(int(f"{value:08b}"[::-1], 2) for value in range(256))


class Header(NamedTuple):
    """Links and state of a log; the uuids are those of VDIs, ``NO_UUID`` for none."""

    parent: str
    child: str
    consistent: bool
    size_bytes: int


class CbtLog:
    """The log of one VDI: which blocks were written since its parent was snapshotted."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def create(cls, path: Path, size_bytes: int, parent: str = NO_UUID) -> CbtLog:
        """A new log without any bit set."""
        log = cls(path)
        with path.open("xb") as file:
            file.write(_pack(Header(parent, NO_UUID, True, size_bytes)))
            file.truncate(_HEADER.size + bitmap_bytes(size_bytes))
        return log

    def header(self) -> Header:
        """The header as it is in the file."""
        with self.path.open("rb") as file:
            parent, child, consistent, size_bytes = _HEADER.unpack(file.read(_HEADER.size))
        return Header(str(uuids.UUID(bytes=parent)), str(uuids.UUID(bytes=child)), bool(consistent), size_bytes)

    def bitmap(self) -> bytearray:
        """The bitmap as it is in the file, lowest bit first."""
        return bytearray(self.path.read_bytes()[_HEADER.size :])

    def update(self, *, parent: str | None = None, child: str | None = None, consistent: bool | None = None) -> None:
        """Change what is given."""
        old = self.header()
        new = Header(
            old.parent if parent is None else parent,
            old.child if child is None else child,
            old.consistent if consistent is None else consistent,
            old.size_bytes,
        )
        with self.path.open("r+b") as file:
            file.write(_pack(new))

    def resize(self, size_bytes: int) -> None:
        """The disk grew: more bits, none of them set."""
        header = self.header()._replace(size_bytes=size_bytes)
        with self.path.open("r+b") as file:
            file.write(_pack(header))
            file.truncate(_HEADER.size + bitmap_bytes(size_bytes))

    def mark(self, offset_bytes: int, length_bytes: int) -> None:
        """Set the bits of every block the range touches."""
        if length_bytes == 0:
            return
        first, last = offset_bytes // BLOCK, (offset_bytes + length_bytes - 1) // BLOCK
        start, end = first // 8, last // 8 + 1
        with self.path.open("r+b") as file:
            old = int.from_bytes(os.pread(file.fileno(), end - start, _HEADER.size + start), "little")
            new = old | ((1 << (last - first + 1)) - 1) << (first - start * 8)
            if new != old:
                os.pwrite(file.fileno(), new.to_bytes(end - start, "little"), _HEADER.size + start)

    def merge(self, older: CbtLog) -> None:
        """Take over the bits of ``older``: this log then tells the changes since the parent of that one."""
        merged = combine(self.bitmap(), older.bitmap())
        with self.path.open("r+b") as file:
            os.pwrite(file.fileno(), merged, _HEADER.size)

    def rename(self, path: Path) -> None:
        """The log goes with a snapshot."""
        self.path = self.path.rename(path)

    def remove(self) -> None:
        """Delete the file."""
        self.path.unlink(missing_ok=True)


def bitmap_bytes(size_bytes: int) -> int:
    """Bytes of the bitmap of a disk."""
    blocks = -(-size_bytes // BLOCK)
    return -(-blocks // 8)


def combine(newer: bytes | bytearray, older: bytes | bytearray) -> bytes:
    """OR of two bitmaps; the longer one sets the length."""
    size = max(len(newer), len(older))
    return (int.from_bytes(newer, "little") | int.from_bytes(older, "little")).to_bytes(size, "little")


def highest_bit_first(bitmap: bytes | bytearray) -> bytes:
    """A bitmap as VDI.list_changed_blocks gives it: block i is ``byte[i // 8] & (0x80 >> i % 8)``."""
    return bytes(bitmap).translate(_REVERSED)


def _pack(header: Header) -> bytes:
    return _HEADER.pack(
        uuids.UUID(header.parent).bytes, uuids.UUID(header.child).bytes, int(header.consistent), header.size_bytes
    )
