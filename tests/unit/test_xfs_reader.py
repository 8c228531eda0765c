"""The XFS reader's own promises, on kept images: cookies, ranges, wrong kinds, and damage that names its block."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support import xfs_golden, xfs_seal
from tests.support.guest_tree import node_of
from tests.support.xfs_images import pattern
from xbfs_engine.core.errors import GuestDamaged, GuestUnsupported, GuestWrongKind, XbfsError
from xbfs_engine.guestfs.base import Kind, NodeId
from xbfs_engine.guestfs.xfs.reader import XfsReader, open_xfs

if TYPE_CHECKING:
    from tests.support.guest_sources import SparseSource

V5 = open_xfs(xfs_golden.image("v5"))
V4 = open_xfs(xfs_golden.image("v4"))
FEATURES_AT = 216


def reseal(source: SparseSource, offset: int, length: int, place: int, at: int, new: bytes) -> None:
    data = source.read_at(offset, length)
    data = data[:at] + new + data[at + len(new) :]
    source.write_at(offset, xfs_seal.sealed(data, place))


@pytest.mark.parametrize(("volume", "path"), [(V5, f"dir{n}{t}") for n in (1, 5, 40, 300, 500) for t in ("", "thin")])
def test_a_listing_goes_on_after_any_cookie(volume: XfsReader, path: str) -> None:
    node = node_of(volume, path)
    entries = list(volume.list(node))
    assert len({entry.name for entry in entries}) == len(entries)
    cookies = [entry.cookie for entry in entries]
    assert cookies == sorted(set(cookies))
    assert all(0 < cookie < 1 << 63 for cookie in cookies)
    for index in range(0, len(entries), 1 + len(entries) // 50):
        assert list(volume.list(node, entries[index].cookie)) == entries[index + 1 :]


@pytest.mark.parametrize("volume", [V5, V4], ids=["v5", "v4"])
def test_every_name_is_found_and_no_other(volume: XfsReader) -> None:
    waiting = [volume.root]
    while waiting:
        node = waiting.pop()
        for entry in volume.list(node):
            assert volume.lookup(node, entry.name) == entry
            assert volume.lookup(node, entry.name + b"~") is None
            if volume.stat(entry.node).kind is Kind.DIRECTORY:
                waiting.append(entry.node)
        for name in (b".", b"..", b"", b"/", b"nonesuch", b"\0"):
            assert volume.lookup(node, name) is None


@given(st.integers(0, 1_000_100), st.integers(0, 70_000))
def test_any_range_of_a_file(offset: int, length: int) -> None:
    node = node_of(V5, "files/of1000003")
    assert V5.read(node, offset, length) == pattern(1_000_003)[offset : offset + length]


@given(st.integers(0, 320_000), st.integers(0, 20_000))
def test_what_was_allocated_but_not_written_is_zero(offset: int, length: int) -> None:
    written = bytes(300_000) + pattern(7000) + bytes((1 << 20) - 307_000)
    assert V5.read(node_of(V5, "files/unwritten"), offset, length) == written[offset : offset + length]


@settings(max_examples=30)
@given(st.integers(0, 2300))
def test_extents_from_anywhere_are_the_end_of_all_extents(block: int) -> None:
    node = node_of(V5, "fragmented/deep")
    offset = block * 1000
    whole = [(max(e.offset, offset), e.offset + e.length, e.is_data) for e in V5.extents(node)]
    assert [(e.offset, e.offset + e.length, e.is_data) for e in V5.extents(node, offset)] == [
        piece for piece in whole if piece[1] > offset
    ]


def test_a_file_of_four_exbibytes_is_one_hole() -> None:
    node = node_of(V5, "files/huge-hole")
    assert [tuple(e) for e in V5.extents(node)] == [(0, (1 << 62) + 12345, False)]
    assert V5.read(node, (1 << 62) + 12340, 100) == bytes(5)


def test_calls_on_the_wrong_kind_are_refused() -> None:
    file, folder = node_of(V5, "files/of1"), node_of(V5, "files")
    for call in (
        lambda: V5.read(folder, 0, 1),
        lambda: list(V5.extents(folder)),
        lambda: V5.readlink(file),
        lambda: list(V5.list(file)),
        lambda: V5.lookup(file, b"x"),
        lambda: V5.stat(NodeId(b"short")),
    ):
        with pytest.raises(GuestWrongKind):
            call()
    with pytest.raises(GuestDamaged, match="outside"):
        V5.stat(NodeId(b"\xff" * 8))


def test_each_damaged_block_is_named_and_the_rest_is_read() -> None:
    pristine = xfs_golden.image("v5")
    places = list(xfs_seal.metadata(pristine, 1024, 512))
    assert len(places) > 1000
    for offset, length, _ in places[:: len(places) // 10]:
        source = pristine.copy()
        source.write_at(offset + length // 2, bytes([source.read_at(offset + length // 2, 1)[0] ^ 0x10]))
        errors = list(errors_of(source))
        assert all(isinstance(error, GuestDamaged) for error in errors)
        assert all(f"sector {offset // 512}" in str(e) or "inode" in str(e) for e in errors)


def errors_of(source: SparseSource) -> list[XbfsError]:
    try:
        volume = open_xfs(source)
    except XbfsError as exc:
        return [exc]
    errors: list[XbfsError] = []
    waiting = [volume.root]
    while waiting:
        node = waiting.pop()
        try:
            kind = volume.stat(node).kind
            if kind is Kind.DIRECTORY:
                waiting += [entry.node for entry in volume.list(node)]
            elif kind is Kind.FILE:
                list(volume.extents(node))
            list(volume.xattrs(node))
        except XbfsError as exc:
            errors.append(exc)
    return errors


def test_a_superblock_that_is_not_known_or_not_sound_is_refused() -> None:
    with pytest.raises(GuestUnsupported, match="no XFS"):
        open_xfs(xfs_golden.SparseSource(1 << 20, {}))
    source = xfs_golden.image("v5")
    reseal(source, 0, 512, xfs_seal.SUPERBLOCK_CRC, FEATURES_AT, (1 << 30).to_bytes(4, "big"))
    with pytest.raises(GuestUnsupported, match="0x40000000"):
        open_xfs(source)
    source = xfs_golden.image("v5")
    source.write_at(120, b"\xff")
    with pytest.raises(GuestDamaged, match="superblock: checksum"):
        open_xfs(source)


def test_a_volume_that_was_cut_off_is_refused() -> None:
    source = xfs_golden.image("v5")
    source.size_bytes -= 512
    with pytest.raises(GuestDamaged, match="only"):
        open_xfs(source)


def test_an_interrupted_repair_is_told() -> None:
    source = xfs_golden.image("v5")
    flags = int.from_bytes(source.read_at(FEATURES_AT, 4), "big") | 1 << 4
    reseal(source, 0, 512, xfs_seal.SUPERBLOCK_CRC, FEATURES_AT, flags.to_bytes(4, "big"))
    assert "xfs_repair" in open_xfs(source).info.reason


def test_content_on_a_realtime_device_is_refused() -> None:
    source = xfs_golden.image("v5")
    node = node_of(V5, "files/of4096")
    xfs_seal.change_inode(source, node, 90, b"\0\1")
    volume = open_xfs(source)
    assert volume.stat(node).size_bytes == 4096
    with pytest.raises(GuestUnsupported, match="realtime"):
        volume.read(node, 0, 10)


def test_a_listing_reads_little_more_than_the_directory() -> None:
    source = xfs_golden.image("v5")
    volume = open_xfs(source)
    node = node_of(volume, "dir500")
    source.bytes_read = 0
    assert len(list(volume.list(node))) == 500
    assert source.bytes_read < volume.stat(node).size_bytes * 2 + (64 << 10)


@settings(max_examples=30)
@given(st.sampled_from(["acl", "acl-dir", "few", "node", "big"]))
def test_attributes_are_the_same_at_every_call(name: str) -> None:
    node = node_of(V5, f"xattrs/{name}")
    assert list(V5.xattrs(node)) == list(V5.xattrs(node))
