"""The tables of a dynamic VHD that somebody else wrote: its BAT, and the sector bitmaps of its blocks.

Owns what their bytes mean and which of them can not be; reading them from the file is the caller's. Pure: the values
are immutable, so any thread may call.

Sources: Microsoft "Virtual Hard Disk Image Format Specification" 1.0 (2006), chapters "Block Allocation Table" and
"Data Block": a bit is set when the sector is present, the most significant bit first.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Final

import numpy as np

from xbfs_engine.core.errors import SourceUnreadable
from xbfs_engine.formats.vhd_records import BLOCK_SIZE, SECTOR_SIZE

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

ENTRY_SIZE: Final = 4
UNUSED: Final = 0xFFFFFFFF
"""The entry of a block that has no place in the file; it is all zeros."""
BITMAP_UNIT: Final = 8 * SECTOR_SIZE
"""Disk bytes that one byte of a bitmap tells of."""
_ROOM_SECTORS: Final = (SECTOR_SIZE + BLOCK_SIZE) // SECTOR_SIZE
_HINT: Final = "the VHD is damaged: look at it with `vhd-util check` on the host"


def parse_vhd_table(data: bytes, *, first_byte: int, end_byte: int) -> NDArray[np.uint32]:
    """The entries of a BAT of blocks of 2 MiB: sectors of the file, or ``UNUSED``.

    Every block in use lies with its bitmap in [first_byte, end_byte) of the file, and over no other. Raises
    SourceUnreadable. Takes 16 bytes of memory for each entry.
    """
    table = np.frombuffer(data, ">u4").astype(np.uint32)
    places = np.sort(table[table != UNUSED]).astype(np.int64)
    if places.size:
        last = int(places[-1]) + _ROOM_SECTORS
        if int(places[0]) * SECTOR_SIZE < first_byte or last * SECTOR_SIZE > end_byte:
            raise SourceUnreadable("VHD BAT: a block lies outside of the file's blocks", hint=_HINT)
        if bool((np.diff(places) < _ROOM_SECTORS).any()):
            raise SourceUnreadable("VHD BAT: blocks lie over each other", hint=_HINT)
    return table


def present_runs(bitmap: bytes, start: int, stop: int) -> Iterator[tuple[int, int, bool]]:
    """Runs (start, stop, is present) in bytes of a block that cover [start, stop) of it, by its bitmap."""
    first, last = start // SECTOR_SIZE, -(-stop // SECTOR_SIZE)
    bits = np.unpackbits(np.frombuffer(bitmap, np.uint8), count=last)[first:]
    for low, high, is_set in _runs(bits):
        from_byte, to_byte = (first + low) * SECTOR_SIZE, (first + high) * SECTOR_SIZE
        yield max(from_byte, start), min(to_byte, stop), is_set


def present_units(bitmap: bytes) -> Iterator[tuple[int, int]]:
    """Runs [start, stop) in bytes of a block, whole units of 4 KiB, of which any sector is present."""
    for low, high, is_set in _runs(np.frombuffer(bitmap, np.uint8) != 0):
        if is_set:
            yield low * BITMAP_UNIT, high * BITMAP_UNIT


def _runs(flags: NDArray[np.uint8] | NDArray[np.bool_]) -> Iterator[tuple[int, int, bool]]:
    edges = [0, *(np.flatnonzero(np.diff(flags)) + 1).tolist(), len(flags)]
    for low, high in pairwise(edges):
        if low < high:
            yield low, high, bool(flags[low])
