"""Hostile logs of XFS: whatever is in one, opening ends with a reader or an XbfsError, and nothing else.

Records are damaged anywhere, and records of any content are written with right checksums.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.property.test_xfs_fuzz import walk
from tests.support import xfs_golden, xfs_log
from xbfs_engine.guestfs.base import VolumeState
from xbfs_engine.guestfs.xfs.geometry import parse_superblock
from xbfs_engine.guestfs.xfs.log import Log
from xbfs_engine.guestfs.xfs.reader import open_xfs

if TYPE_CHECKING:
    from collections.abc import Sequence

DIRTY = xfs_golden.image("dirty")
RECORDS = [record for record, _ in Log(DIRTY, parse_superblock(DIRTY.read_at(0, 512))).records()]
START = xfs_log.log_place(DIRTY)

small = st.integers(0, 40)
words = st.one_of(small, st.sampled_from([0xFFFF, 0x7FFF, 0x8000, 128, 256]), st.integers(0, 0xFFFF))
sectors = st.one_of(small, st.integers(0, 48 << 11), st.integers(-(1 << 63), (1 << 63) - 1))
regions = st.one_of(st.binary(min_size=1, max_size=300), st.integers(1, 9).map(lambda n: bytes(128 * n)))
inodes = st.one_of(st.integers(64, 300), st.integers(0, (1 << 64) - 1))


@st.composite
def buffers(draw: st.DrawFn) -> list[bytes]:
    bits = draw(st.one_of(st.integers(0, 255), st.integers(0, (1 << 64) - 1)))
    head = struct.pack("<4HqI", 0x123C, 0, draw(words), draw(words), draw(sectors), draw(st.integers(0, 3)))
    return [head + struct.pack("<Q", bits), *draw(st.lists(regions, max_size=4))]


@st.composite
def inode_items(draw: st.DrawFn) -> list[bytes]:
    """At their right place, with any fields and forks."""
    number = draw(inodes)
    block, slot = number >> 1, number & 1
    sector = (block * 2 + slot) & (1 << 62) - 1
    fields = draw(st.integers(0, 0x7FF))
    head = struct.pack("<HHIHH4xQ16sqii", 0x123B, 0, fields, 0, 0, number, bytes(range(16)), sector, 1, 0)
    core = bytearray(draw(st.binary(min_size=176, max_size=176)))
    core[:2] = b"NI"
    core[4] = 3
    core[2:4] = struct.pack("<H", draw(st.sampled_from([0o100644, 0o40755, 0o120777, 0o020000])))
    core[5] = draw(st.integers(0, 4))
    core[56:64] = struct.pack("<Q", draw(st.sampled_from([0, 6, 1000, 1 << 20, 1 << 62])))
    core[152:160] = struct.pack("<Q", number)
    core[82] = draw(st.sampled_from([0, 1, 20, 41, 42, 255]))
    return [head, bytes(core), *draw(st.lists(st.binary(min_size=1, max_size=400), max_size=2))]


@st.composite
def others(draw: st.DrawFn) -> list[bytes]:
    kind = draw(st.sampled_from([0x123F, *range(0x1236, 0x1252)]))
    numbers = draw(st.lists(st.one_of(small, st.integers(0, (1 << 32) - 1)), max_size=12))
    order = draw(st.sampled_from("<>"))
    return [struct.pack("<HH", kind, 0) + struct.pack(f"{order}{len(numbers)}I", *numbers)]


items = st.lists(st.one_of(buffers(), inode_items(), others()), max_size=5)
operations = st.lists(st.tuples(st.integers(0, 63), st.binary(max_size=60)), max_size=8)


@settings(max_examples=60, deadline=None)
@given(items, operations)
def test_any_items(found: list[list[bytes]], more: Sequence[tuple[int, bytes]]) -> None:
    source = xfs_golden.image("v5")
    xfs_log.append(source, [*xfs_log.transaction(found), *more])
    walk(source, nodes=60)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(RECORDS), st.integers(0, 1023), st.binary(min_size=1, max_size=8)),
        min_size=1,
        max_size=3,
    )
)
def test_a_damaged_log_is_replayed_up_to_the_damage_or_not_at_all(changes: list[tuple[object, int, bytes]]) -> None:
    source = DIRTY.copy()
    for record, at, value in changes:
        assert isinstance(record, type(RECORDS[0]))
        source.write_at(START + record.sector * 512 + at, value)
    assert open_xfs(source).info.state in (VolumeState.REPLAYED, VolumeState.DIRTY)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(0, (4 << 20) // 512 - 1), st.binary(min_size=4, max_size=8)), max_size=20))
def test_sectors_of_any_cycle(changes: list[tuple[int, bytes]]) -> None:
    source = DIRTY.copy()
    for sector, value in changes:
        source.write_at(START + sector * 512, value)
    assert open_xfs(source).info.type == "xfs"
