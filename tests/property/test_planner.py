"""The planner against a set of touched chunks."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from xbfs_engine.core.limits import KIB, LEAF_FANOUT
from xbfs_engine.ingest.planner import plan

_EXTENTS = st.lists(st.tuples(st.integers(0, 1 << 24), st.integers(0, 1 << 20)), max_size=20)


@given(extents=_EXTENTS, size=st.integers(0, 1 << 24), chunk_size=st.sampled_from([64 * KIB, 128 * KIB, 1024 * KIB]))
def test_segments_cover_exactly_the_touched_chunks(extents: list[tuple[int, int]], size: int, chunk_size: int) -> None:
    inside = sorted((offset, min(length, size - offset)) for offset, length in extents if offset < size)
    inside = [extent for extent in inside if extent[1]]
    wanted = {n for at, length in inside for n in range(at // chunk_size, -(-(at + length) // chunk_size))}
    segments = list(plan(inside, size, chunk_size))
    planned = [
        segment.leaf * LEAF_FANOUT + slot
        for segment in segments
        for first, count in segment.runs
        for slot in range(first, first + count)
    ]
    assert planned == sorted(wanted), "each once, ascending"
    assert [segment.number for segment in segments] == list(range(len(segments)))
    leaves = [segment.leaf for segment in segments]
    assert leaves == sorted(set(leaves)), "one segment a leaf"
    assert all(first >= 0 and first + count <= LEAF_FANOUT for s in segments for first, count in s.runs)
