"""Changed-block information: XAPI's bitmap, or JSON extents, as extents. Pure.

The bitmap is what VDI.list_changed_blocks returns: base64 of ceil(blocks/8) bytes, a bit per 64 KiB block, block i at
byte i//8 under mask 0x80 >> (i % 8), the last block may be short, bits beyond it are ignored (xen-api and SM cbtutil).
"""

from __future__ import annotations

import base64
import binascii
import json
from typing import TYPE_CHECKING

import numpy as np

from xbfs_engine.core.errors import BitmapInvalid
from xbfs_engine.core.limits import CBT_BLOCK_SIZE, MIB

if TYPE_CHECKING:
    from xbfs_engine.source.base import Extent

EXTENTS_MAX = 64 * MIB // 16


def parse_changed(text: bytes, disk_size_bytes: int) -> list[Extent]:
    """Extents from the content of a --changed file: a JSON list, or else a base64 bitmap. Raises BitmapInvalid."""
    stripped = text.strip()
    if stripped.startswith((b"[", b"{")):
        return parse_extents(stripped, disk_size_bytes)
    return parse_bitmap(stripped, disk_size_bytes)


def parse_bitmap(text: bytes, disk_size_bytes: int) -> list[Extent]:
    """Extents from a bitmap exactly as XAPI returns it. Raises BitmapInvalid."""
    try:
        raw = base64.b64decode(b"".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as exc:
        raise BitmapInvalid("the changed-block bitmap is not base64") from exc
    blocks = -(-disk_size_bytes // CBT_BLOCK_SIZE)
    if len(raw) != -(-blocks // 8):
        raise BitmapInvalid(
            f"the changed-block bitmap has {len(raw)} bytes; a disk of {disk_size_bytes} bytes needs {-(-blocks // 8)}"
        )
    found: list[Extent] = []
    packed = np.frombuffer(raw, dtype=np.uint8)
    for start, end in _bit_runs(packed, blocks):
        offset = start * CBT_BLOCK_SIZE
        found.append((offset, min(end * CBT_BLOCK_SIZE, disk_size_bytes) - offset))
    return found


def _bit_runs(packed: np.ndarray[tuple[int], np.dtype[np.uint8]], bits: int) -> list[tuple[int, int]]:
    """Runs [start, end) of set bits. Unpacks only bytes that are not zero: sparse maps of many TiB stay cheap."""
    touched = np.flatnonzero(packed)
    if not len(touched):
        return []
    positions = (touched[:, None] * 8 + np.arange(8)).ravel()[np.unpackbits(packed[touched]).astype(bool)]
    positions = positions[positions < bits]
    if not len(positions):
        return []
    breaks = np.flatnonzero(np.diff(positions) != 1)
    starts = positions[np.concatenate([[0], breaks + 1])]
    ends = positions[np.concatenate([breaks, [len(positions) - 1]])] + 1
    return list(zip(starts.tolist(), ends.tolist(), strict=True))


def parse_extents(text: bytes, disk_size_bytes: int) -> list[Extent]:
    """Extents from JSON ``[[offset, length], ...]`` in bytes, in any order, within the disk. Raises BitmapInvalid."""
    try:
        listed = json.loads(text)
    except (ValueError, RecursionError) as exc:
        raise BitmapInvalid("the changed extents are not valid JSON") from exc
    if not isinstance(listed, list) or len(listed) > EXTENTS_MAX:
        raise BitmapInvalid(f"the changed extents are not a list of at most {EXTENTS_MAX} pairs")
    found: list[Extent] = []
    for number, item in enumerate(listed):
        if not (isinstance(item, list) and len(item) == 2 and all(type(part) is int for part in item)):
            raise BitmapInvalid(f"changed extent {number} is not a pair of integers")
        offset, length = item
        if offset < 0 or length < 0 or offset + length > disk_size_bytes:
            raise BitmapInvalid(
                f"changed extent {number} ({offset}, {length}) does not lie within the disk of {disk_size_bytes} bytes"
            )
        if length:
            found.append((offset, length))
    return sorted(found)
