"""Screens of a guest: read from a pixmap, compared with tolerance, and written as PNG. Pure."""

from __future__ import annotations

import re
import struct
import zlib
from math import isqrt
from typing import TYPE_CHECKING, Final

import numpy as np

from xbfs_engine.core.errors import InstantError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Pixels = NDArray[np.uint8]
    """Rows, columns, red green blue."""

_HEADER: Final = re.compile(rb"P6\s+(\d{1,5})\s+(\d{1,5})\s+255\s")
"""Portable pixmap, as QEMU writes it: without comments."""
_SIDE_MAX: Final = 16384
DIFFERING_MAX: Final = 0.005
"""Share of pixels in which two screens may differ and still be the same: a cursor, a clock."""
COLOURS_COUNTED: Final = 256
_COUNTED_OF: Final = 1 << 19
"""Colours are counted in about so many pixels of a large screen: all of a full one would take seconds."""
_CHANNEL_STEP: Final = 24
PNG_MAX: Final = 2 << 20


def pixels_of(pixmap: bytes) -> Pixels:
    """The pixels of a P6 pixmap. Raises InstantError."""
    match = _HEADER.match(pixmap)
    if match is None:
        raise InstantError("the screen is no pixmap")
    width, height = int(match[1]), int(match[2])
    if not (0 < width <= _SIDE_MAX and 0 < height <= _SIDE_MAX) or len(pixmap) - match.end() != 3 * width * height:
        raise InstantError(f"the screen says it has {width} by {height} pixels and has not")
    return np.frombuffer(pixmap, dtype=np.uint8, offset=match.end()).reshape(height, width, 3)


def colours(pixels: Pixels) -> int:
    """About how many different colours there are, up to COLOURS_COUNTED: 1 is a blank screen, and no other."""
    if (pixels == pixels[0, 0]).all():
        return 1
    step = 1 + isqrt(pixels.size // _COUNTED_OF)
    packed = pixels[::step, ::step].astype(np.uint32) @ np.array([1 << 16, 1 << 8, 1], dtype=np.uint32)
    return min(max(len(np.unique(packed)), 2), COLOURS_COUNTED)


def is_same(one: Pixels | None, other: Pixels) -> bool:
    """Whether two screens differ by no more than a cursor or a clock."""
    if one is None or one.shape != other.shape:
        return False
    differs = (np.abs(one.astype(np.int16) - other.astype(np.int16)) > _CHANNEL_STEP).any(axis=2)
    return float(differs.mean()) <= DIFFERING_MAX


def png(pixels: Pixels) -> bytes:
    """The screen as PNG (RFC 2083), every other pixel of it until it has at most PNG_MAX bytes."""
    while True:
        encoded = _png(pixels)
        if len(encoded) <= PNG_MAX:
            return encoded
        pixels = pixels[::2, ::2]


def _png(pixels: Pixels) -> bytes:
    height, width, _ = pixels.shape
    rows = np.zeros((height, 1 + 3 * width), dtype=np.uint8)
    rows[:, 1:] = pixels.reshape(height, 3 * width)
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows.tobytes(), 6)), (b"IEND", b""))
    body = b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + body
