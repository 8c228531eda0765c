"""The bitmap parser against a plain loop over its definition, and against anything at all."""

from __future__ import annotations

import base64

from hypothesis import given
from hypothesis import strategies as st

from xbfs_engine.core.errors import BitmapInvalid
from xbfs_engine.core.limits import CBT_BLOCK_SIZE as BLOCK
from xbfs_engine.source.cbt import parse_bitmap, parse_changed


@given(raw=st.binary(max_size=40), spare=st.integers(0, 7), tail=st.integers(0, BLOCK - 1))
def test_exactly_the_marked_blocks_are_in_the_extents(raw: bytes, spare: int, tail: int) -> None:
    size = max(0, (len(raw) * 8 - spare) * BLOCK - tail)
    extents = parse_bitmap(base64.b64encode(raw), size)
    marked = {n for n in range(-(-size // BLOCK)) if raw[n // 8] & (0x80 >> (n % 8))}
    covered = {n for offset, length in extents for n in range(offset // BLOCK, -(-(offset + length) // BLOCK))}
    assert covered == marked
    assert all(offset % BLOCK == 0 and length > 0 and offset + length <= size for offset, length in extents)
    ends = [offset + length for offset, length in extents]
    assert all(end < start for end, (start, _) in zip(ends, extents[1:], strict=False)), "disjoint, ascending, joined"


@given(text=st.binary(max_size=200), size=st.integers(0, 1 << 30))
def test_anything_gives_extents_within_the_disk_or_a_typed_error(text: bytes, size: int) -> None:
    try:
        extents = parse_changed(text, size)
    except BitmapInvalid:
        return
    assert all(offset >= 0 and length > 0 and offset + length <= size for offset, length in extents)


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2), inner, max_size=2),
    max_leaves=12,
)


@given(listed=st.lists(_JSON, max_size=4), size=st.integers(0, 1 << 20))
def test_any_json_list_gives_extents_or_a_typed_error(listed: list[object], size: int) -> None:
    import json

    try:
        extents = parse_changed(json.dumps(listed).encode(), size)
    except BitmapInvalid:
        return
    assert extents == sorted(extents)
    assert all(offset >= 0 and length > 0 and offset + length <= size for offset, length in extents)
