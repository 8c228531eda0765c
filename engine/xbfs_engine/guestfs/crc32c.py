"""CRC-32C (Castagnoli), which XFS, ext4 and btrfs check their metadata with, at numpy's speed.

A CRC is linear: the remainder of a block is the sum of what each byte adds at its place. So a table of what a byte
adds at each of 512 places answers a block with one gather and one reduction, and many blocks at once.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Final

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

_POLYNOMIAL: Final = 0x82F6_3B78
"""0x1EDC6F41 with its bits reversed (RFC 3720, B.4)."""

_STRIDE: Final = 512
_SHORT: Final = 16
"""Below this a plain loop is faster."""


def crc32c(data: bytes | bytearray | memoryview, start: int = 0) -> int:
    """The checksum, 32 bit; ``start`` is that of the bytes before, as in ``zlib.crc32``."""
    return _update(np.frombuffer(data, np.uint8), start ^ 0xFFFF_FFFF) ^ 0xFFFF_FFFF


def crc32c_rows(rows: NDArray[np.uint8]) -> NDArray[np.uint32]:
    """The checksum of each row of a matrix of bytes, of any width above 3."""
    count, width = rows.shape
    head = width % _STRIDE or min(width, _STRIDE)
    assert head > 3 or width > _STRIDE
    if head <= 3:
        return np.array([_update(row, 0xFFFF_FFFF) ^ 0xFFFF_FFFF for row in rows], np.uint32)
    # A state before the first byte is the same as its bytes added to the first four.
    first = rows[:, :head].copy()
    first[:, :4] ^= 0xFF
    state = _blocks(first)
    for start in range(head, width, _STRIDE):
        block = rows[:, start : start + _STRIDE].copy()
        block[:, :4] ^= state.astype("<u4").view(np.uint8).reshape(count, 4)
        state = _blocks(block)
    return state ^ np.uint32(0xFFFF_FFFF)


def _update(data: NDArray[np.uint8], state: int) -> int:
    tail = len(data) % _STRIDE
    if len(data) > tail:
        far = _far()
        for block in _blocks(data[: len(data) - tail].reshape(-1, _STRIDE)).tolist():
            state = (
                far[0][state & 0xFF]
                ^ far[1][state >> 8 & 0xFF]
                ^ far[2][state >> 16 & 0xFF]
                ^ far[3][state >> 24]
                ^ block
            )
    rest = data[len(data) - tail :]
    if tail < _SHORT:
        near = _near()
        for byte in rest.tolist():
            state = near[(state ^ byte) & 0xFF] ^ state >> 8
        return state
    block = rest.copy()
    block[:4] ^= np.frombuffer(state.to_bytes(4, "little"), np.uint8)
    return int(_blocks(block.reshape(1, -1))[0])


def _blocks(rows: NDArray[np.uint8]) -> NDArray[np.uint32]:
    """What each row of up to 512 bytes adds to a CRC that was zero."""
    width = rows.shape[1]
    places = _tables()[_STRIDE - width :]
    gathered = places[np.arange(width), rows]
    result: NDArray[np.uint32] = np.bitwise_xor.reduce(gathered, axis=1)
    return result


@cache
def _tables() -> NDArray[np.uint32]:
    """[place in a block of 512][byte] -> what it adds at the block's end."""
    step = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        step = np.where(step & 1, step >> 1 ^ np.uint32(_POLYNOMIAL), step >> 1)
    tables = np.empty((_STRIDE, 256), np.uint32)
    tables[-1] = step
    for place in range(_STRIDE - 2, -1, -1):
        tables[place] = step[tables[place + 1] & 0xFF] ^ tables[place + 1] >> 8
    return tables


@cache
def _near() -> list[int]:
    return [int(value) for value in _tables()[-1]]


@cache
def _far() -> list[list[int]]:
    return [[int(value) for value in _tables()[place]] for place in range(4)]
