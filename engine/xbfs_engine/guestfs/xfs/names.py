"""What directories and attributes share: hashes of names, and the tree that finds a leaf by hash.

Layout: "XFS Algorithms & Data Structures", chapters Directories and Extended Attributes.
"""

from __future__ import annotations

import struct
from bisect import bisect_left
from typing import TYPE_CHECKING, Final

from xbfs_engine.core.errors import GuestDamaged

if TYPE_CHECKING:
    from collections.abc import Callable

NODE_MAGICS: Final = (0xFEBE, 0x3EBE)
"""Inner node without and with checksums, as in all pairs here."""

_NODE_COUNTS: Final = struct.Struct(">HH")
_INFO_BYTES: Final = (12, 56)
_NODE_HEADER_BYTES: Final = (16, 64)
_LEVELS_MAX: Final = 5
"""XFS_DA_NODE_MAXDEPTH."""


def name_hash(name: bytes) -> int:
    """XFS's hash of a name: rotate by 7 and add, byte by byte."""
    value = 0
    for byte in name:
        value = (value << 7 & 0xFFFF_FFFF | value >> 25) ^ byte
    return value


def block_magic(data: bytes) -> int:
    """Magic number of a node or leaf."""
    return int.from_bytes(data[8:10], "big")


def forward(data: bytes) -> int:
    """Block of the next sibling, 0 if there is none."""
    return int.from_bytes(data[:4], "big")


def find_leaf(read: Callable[[int], bytes], root: int, wanted: int, checksums: bool, where: str) -> tuple[int, bytes]:
    """Number and bytes of the leaf where names of a hash begin, below the tree's root block.

    ``read`` gives a checked block of the tree. Every block that is no inner node is taken for a leaf.
    """
    block, level = root, None
    data = read(block)
    while block_magic(data) == NODE_MAGICS[checksums]:
        count, recorded = _NODE_COUNTS.unpack_from(data, _INFO_BYTES[checksums])
        header_bytes = _NODE_HEADER_BYTES[checksums]
        level = recorded if level is None else level - 1
        if not 0 < recorded <= _LEVELS_MAX or recorded != level or not 0 < count <= (len(data) - header_bytes) // 8:
            raise GuestDamaged(f"{where}: node {block} has {count} entries at level {recorded}")
        entries = struct.unpack_from(f">{2 * count}I", data, header_bytes)
        block = entries[2 * min(bisect_left(entries[::2], wanted), count - 1) + 1]
        data = read(block)
    if level not in (None, 1):
        raise GuestDamaged(f"{where}: block {block} is no node")
    return block, data
