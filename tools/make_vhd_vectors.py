#!/usr/bin/env python3
"""Writes docs/vectors/vhd.json: the bytes of VHD records for a few disks, which no release may change.

Run it only when a change of these bytes is meant; tests/golden/test_vhd_vectors.py compares.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TypedDict

import numpy as np

from xbfs_engine.core.ids import PointId
from xbfs_engine.formats.segments import Literal
from xbfs_engine.formats.vhd import VhdDynamicLayout, VhdFixedLayout, vhd_block_count, vhd_uuid

TARGET = Path(__file__).parents[1] / "docs" / "vectors" / "vhd.json"
TIMESTAMP_S = 841_000_000
CASES: list[tuple[str, int, list[int] | str]] = [
    ("empty disk", 0, []),
    ("one byte", 1, "all"),
    ("1 GiB, blocks 0, 3 and 511", 1 << 30, [0, 3, 511]),
    ("100 GiB and 512 bytes, no blocks", (100 << 30) + 512, []),
    ("4097 blocks, all: libvhd sums one batmap sector of two", 4097 << 21, "all"),
    ("2040 GiB, all", 2040 << 30, "all"),
]


class Vector(TypedDict):
    """One disk. Byte strings are hexadecimal, without the zeros at their end; ``head`` ends with the batmap."""

    name: str
    disk_size: int
    blocks: list[int] | str
    point_id: str
    disk_number: int
    timestamp_s: int
    uuid: str
    file_size: int
    footer: str
    header: str
    batmap_header: str
    bat_start: str
    head_size: int
    head_sha256: str
    fixed_footer: str


def describe(name: str, disk_size: int, blocks: list[int] | str) -> Vector:
    """The vector of one disk, computed by the product."""
    point_id = hashlib.sha256(name.encode()).hexdigest()
    uuid16 = vhd_uuid(PointId(point_id), 1)
    allocated = np.zeros(vhd_block_count(disk_size), np.bool_)
    allocated[range(len(allocated)) if isinstance(blocks, str) else blocks] = True
    layout = VhdDynamicLayout(disk_size, allocated, uuid16=uuid16, timestamp_s=TIMESTAMP_S)
    fixed = VhdFixedLayout(disk_size, uuid16=uuid16, timestamp_s=TIMESTAMP_S)
    entries = max(vhd_block_count(disk_size), 1)
    batmap_at = 1536 + -(-entries * 4 // 512) * 512
    head_size = batmap_at + 512 + max(-(-entries // 4096), 1) * 512

    def literal(offset: int, length: int) -> bytes:
        return b"".join(part.data for part in layout.segments(offset, length) if isinstance(part, Literal))

    (fixed_footer,) = (part for part in fixed.segments(fixed.size_bytes - 512, 512) if isinstance(part, Literal))
    return Vector(
        name=name,
        disk_size=disk_size,
        blocks=blocks,
        point_id=point_id,
        disk_number=1,
        timestamp_s=TIMESTAMP_S,
        uuid=uuid16.hex(),
        file_size=layout.size_bytes,
        footer=literal(0, 512).rstrip(b"\0").hex(),
        header=literal(512, 1024).rstrip(b"\0").hex(),
        batmap_header=literal(batmap_at, 512).rstrip(b"\0").hex(),
        bat_start=literal(1536, min(entries * 4, 64)).hex(),
        head_size=head_size,
        head_sha256=hashlib.sha256(literal(0, head_size)).hexdigest(),
        fixed_footer=fixed_footer.data.rstrip(b"\0").hex(),
    )


if __name__ == "__main__":
    TARGET.parent.mkdir(parents=True, exist_ok=True)
    TARGET.write_text(json.dumps([describe(*case) for case in CASES], indent=1) + "\n", encoding="utf-8")
