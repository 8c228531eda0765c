"""XAPI's changed-block bitmaps and JSON extents, as extents."""

from __future__ import annotations

import base64
import json

import pytest

from xbfs_engine.core.errors import BitmapInvalid
from xbfs_engine.core.limits import CBT_BLOCK_SIZE as BLOCK
from xbfs_engine.core.limits import KIB, MIB
from xbfs_engine.source.cbt import parse_bitmap, parse_changed, parse_extents


def text(*raw: int) -> bytes:
    return base64.b64encode(bytes(raw))


def test_the_first_block_is_the_most_significant_bit() -> None:
    assert parse_bitmap(text(0x80, 0x00), 16 * BLOCK) == [(0, BLOCK)]
    assert parse_bitmap(text(0x01, 0x00), 16 * BLOCK) == [(7 * BLOCK, BLOCK)]
    assert parse_bitmap(text(0x00, 0x40), 16 * BLOCK) == [(9 * BLOCK, BLOCK)]


def test_neighbours_become_one_extent_across_bytes() -> None:
    assert parse_bitmap(text(0b0000_0011, 0b1100_0001), 16 * BLOCK) == [(6 * BLOCK, 4 * BLOCK), (15 * BLOCK, BLOCK)]


def test_the_last_block_ends_with_the_disk() -> None:
    size = 9 * BLOCK + 512
    assert parse_bitmap(text(0x00, 0x40), size) == [(9 * BLOCK, 512)]


def test_padding_bits_behind_the_last_block_are_ignored() -> None:
    assert parse_bitmap(text(0x00, 0xFF), 9 * BLOCK) == [(8 * BLOCK, BLOCK)]
    assert parse_bitmap(text(0x00, 0x7F), 9 * BLOCK) == []


def test_an_empty_disk_has_an_empty_bitmap() -> None:
    assert parse_bitmap(b"", 0) == []


@pytest.mark.parametrize("size", [1, BLOCK, 8 * BLOCK])
def test_a_byte_serves_up_to_eight_blocks(size: int) -> None:
    assert parse_bitmap(text(0x80), size) == [(0, min(size, BLOCK))]


@pytest.mark.parametrize(("raw", "blocks"), [((0x80,), 9), ((0x80, 0), 8), ((), 1), ((0,), 0)])
def test_a_bitmap_of_another_disk_is_refused(raw: tuple[int, ...], blocks: int) -> None:
    with pytest.raises(BitmapInvalid, match="needs"):
        parse_bitmap(text(*raw), blocks * BLOCK)


@pytest.mark.parametrize("breaks", [b"\n", b"\r\n", b" ", b"\n\n"])
def test_line_breaks_in_base64_are_allowed(breaks: bytes) -> None:
    whole = text(*([0x80] * 100))
    wrapped = breaks.join(whole[at : at + 76] for at in range(0, len(whole), 76)) + breaks
    assert parse_changed(wrapped, 800 * BLOCK) == parse_bitmap(whole, 800 * BLOCK)
    assert len(parse_changed(wrapped, 800 * BLOCK)) == 100


@pytest.mark.parametrize("bad", [b"gA=", b"gA", b"g*==", b"\xff\xfe", b"gA==gA==", "gÄ==".encode()])
def test_what_is_not_base64_is_refused(bad: bytes) -> None:
    with pytest.raises(BitmapInvalid):
        parse_changed(bad, 8 * BLOCK)


def test_a_sparse_bitmap_of_64_tib_is_quick_and_exact() -> None:
    size = 64 << 40
    raw = bytearray(size // BLOCK // 8)
    raw[-1] = 0x01
    raw[len(raw) // 2] = 0x18
    middle = (len(raw) // 2 * 8 + 3) * BLOCK
    assert parse_bitmap(base64.b64encode(raw), size) == [(middle, 2 * BLOCK), (size - BLOCK, BLOCK)]


def test_extents_come_sorted_and_without_empty_ones() -> None:
    listed = [[MIB, 10], [0, 5], [7, 0], [3, MIB]]
    assert parse_extents(json.dumps(listed).encode(), 2 * MIB) == [(0, 5), (3, MIB), (MIB, 10)]


def test_the_form_is_told_from_the_content() -> None:
    assert parse_changed(b" \n[[0, 1]] \n", MIB) == [(0, 1)]
    assert parse_changed(text(0x80, 0) + b"\n", MIB) == [(0, BLOCK)]
    assert parse_changed(b"[]", MIB) == []


@pytest.mark.parametrize(
    "bad",
    [
        b"[[0, 1048577]]",
        b"[[1048576, 1]]",
        b"[[-1, 1]]",
        b"[[0, -1]]",
        b"[[0, 1, 2]]",
        b"[[0]]",
        b"[0, 1]",
        b'[["0", 1]]',
        b"[[0.0, 1]]",
        b"[[true, 1]]",
        b"[[0, null]]",
        b'{"extents": []}',
        b"[[0, 1]",
        b"[" * 100_000,
        b"[[" + b"9" * 5000 + b", 1]]",
        b"\xff",
        b"[\xff]",
    ],
)
def test_extents_that_do_not_fit_are_refused(bad: bytes) -> None:
    with pytest.raises(BitmapInvalid):
        parse_changed(bad, MIB)


def test_an_extent_at_the_very_end_may_be_empty() -> None:
    assert parse_extents(b"[[1048576, 0]]", MIB) == []


def test_the_block_is_xenserver_s() -> None:
    assert BLOCK == 64 * KIB
