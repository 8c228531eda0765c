"""Extents to segments: whole chunks, one leaf each, ascending."""

from __future__ import annotations

import pytest

from tests.support.engine import CHUNK, LEAF
from xbfs_engine.core.errors import BitmapInvalid
from xbfs_engine.ingest.planner import Segment, chunk_runs, grown_edge, plan

SIZE = 3 * LEAF + 100


def test_extents_are_rounded_out_to_chunks() -> None:
    assert list(chunk_runs([(CHUNK - 1, 2)], SIZE, CHUNK)) == [(0, 2)]
    assert list(chunk_runs([(CHUNK, 1)], SIZE, CHUNK)) == [(1, 2)]


def test_overlapping_and_touching_extents_join() -> None:
    extents = [(0, CHUNK), (10, 20), (CHUNK, 1), (3 * CHUNK, 1), (3 * CHUNK, 5 * CHUNK)]
    assert list(chunk_runs(extents, SIZE, CHUNK)) == [(0, 2), (3, 8)]


def test_a_run_over_two_leaves_becomes_two_segments() -> None:
    assert list(plan([(LEAF - CHUNK, 2 * CHUNK)], SIZE, CHUNK)) == [
        Segment(0, 0, ((63, 1),)),
        Segment(1, 1, ((0, 1),)),
    ]


def test_runs_of_one_leaf_share_a_segment() -> None:
    planned = list(plan([(0, 1), (5 * CHUNK, CHUNK), (2 * LEAF, 1)], SIZE, CHUNK))
    assert planned == [Segment(0, 0, ((0, 1), (5, 1))), Segment(1, 2, ((0, 1),))]
    assert [segment.chunks for segment in planned] == [2, 1]


def test_the_short_last_chunk_is_one_chunk() -> None:
    assert list(plan([(3 * LEAF + 99, 1)], SIZE, CHUNK)) == [Segment(0, 3, ((0, 1),))]


def test_nothing_gives_nothing() -> None:
    assert list(plan([], SIZE, CHUNK)) == []
    assert list(plan([], 0, CHUNK)) == []


def test_beyond_the_disk_is_refused() -> None:
    with pytest.raises(BitmapInvalid):
        list(plan([(SIZE, 1)], SIZE, CHUNK))


def test_growth_marks_the_old_short_chunk_and_nothing_else() -> None:
    assert grown_edge(CHUNK + 1, 3 * CHUNK, CHUNK) == [(CHUNK, CHUNK)]
    assert grown_edge(CHUNK + 1, CHUNK + 5, CHUNK) == [(CHUNK, 5)]
    assert grown_edge(CHUNK, 3 * CHUNK, CHUNK) == []
    assert grown_edge(CHUNK + 1, CHUNK + 1, CHUNK) == []
    assert grown_edge(0, CHUNK, CHUNK) == []
