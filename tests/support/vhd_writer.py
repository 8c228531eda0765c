"""A host's writes to a dynamic VHD, as tapdisk makes them: from the format's specification, nothing of the product's.

The file is a bytearray. Blocks in use are written in place; a new one goes behind the others, its data at a multiple
of 4 KiB; then its bitmap, then its BAT entry. The footer comes back when the file is closed.
"""

from __future__ import annotations

import struct

BLOCK = 2 << 20


class HostWriter:
    """Opens the file; ``touched`` are the units of 4 KiB it has written since; ``absent`` fills absent sectors."""

    def __init__(self, file: bytearray, *, absent: int = 0xEE) -> None:
        self.file = file
        self._absent = bytes([absent])
        self.touched: set[int] = set()
        self._footer = bytes(file[-512:])
        self._end = len(file) - 512
        (self._table_at,) = struct.unpack_from(">Q", file, 512 + 16)

    def write(self, offset: int, data: bytes) -> None:
        """Whole sectors of the guest's disk."""
        for sector in range(len(data) // 512):
            block, within = divmod(offset // 512 + sector, BLOCK // 512)
            place = self._place(block) or self._append(block)
            self._put(place + 512 + within * 512, data[sector * 512 : sector * 512 + 512])
            self._put(place + within // 8, bytes([self.file[place + within // 8] | 0x80 >> within % 8]))

    def close(self, size: int | None = None) -> None:
        """Footers back, of another size if the disk was resized within its BAT."""
        if size is not None:
            self._footer = with_footer(self._footer, 48, size.to_bytes(8, "big"))
            self._put(0, self._footer)
        self._put(self._end, self._footer)
        del self.file[self._end + 512 :]

    def _place(self, block: int) -> int | None:
        (entry,) = struct.unpack_from(">I", self.file, self._table_at + block * 4)
        return None if entry == 0xFFFFFFFF else entry * 512

    def _append(self, block: int) -> int:
        data_at = (self._end + 512 + 4095) // 4096 * 4096
        place, self._end = data_at - 512, data_at + BLOCK
        # What lies in an absent sector is anything, but never the guest's.
        self._put(place, bytes(512) + self._absent * BLOCK)
        self._put(self._table_at + block * 4, struct.pack(">I", place // 512))
        return place

    def _put(self, offset: int, data: bytes) -> None:
        if len(self.file) < offset + len(data):
            self.file.extend(bytes(offset + len(data) - len(self.file)))
        self.file[offset : offset + len(data)] = data
        self.touched.update(range(offset // 4096, (offset + len(data) + 4095) // 4096))


def with_footer(footer: bytes, at: int, value: bytes) -> bytes:
    """The footer with other bytes and the checksum that goes with them."""
    return resummed(footer, at, value, 64)


def resummed(record: bytes, at: int, value: bytes, checksum_at: int) -> bytes:
    """The record with other bytes and the checksum that goes with them."""
    out = bytearray(record)
    out[at : at + len(value)] = value
    out[checksum_at : checksum_at + 4] = bytes(4)
    out[checksum_at : checksum_at + 4] = (~sum(out) & 0xFFFFFFFF).to_bytes(4, "big")
    return bytes(out)
