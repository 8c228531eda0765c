"""VHD footer and header: what the strict parser takes, and that anything else is a typed error with a reason."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.disks import UUID16
from tests.support.vhd_rules import chs
from xbfs_engine.core.errors import SourceUnreadable, XbfsError
from xbfs_engine.core.limits import GIB, MIB
from xbfs_engine.formats.vhd_records import (
    NO_OFFSET,
    VHD_SIZE_MAX,
    VhdFooter,
    VhdHeader,
    VhdType,
    checksum,
    geometry,
    parse_vhd_footer,
    parse_vhd_header,
)

DYNAMIC = VhdFooter(VhdType.DYNAMIC, 100 * MIB, UUID16, 7, 512)
FIXED = VhdFooter(VhdType.FIXED, 100 * MIB, UUID16, 7, NO_OFFSET)
CHILD = VhdFooter(VhdType.DIFFERENCING, 100 * MIB, UUID16, 7, 512)
HEADER = VhdHeader(1536, 50)


def patched(record: bytes, at: int, value: bytes, checksum_at: int) -> bytes:
    """The record with other bytes and a checksum that holds again."""
    out = bytearray(record)
    out[at : at + len(value)] = value
    out[checksum_at : checksum_at + 4] = bytes(4)
    out[checksum_at : checksum_at + 4] = struct.pack(">I", checksum(bytes(out)))
    return bytes(out)


def footer_with(at: int, value: bytes, footer: VhdFooter = DYNAMIC) -> bytes:
    return patched(footer.pack(), at, value, 64)


def header_with(at: int, value: bytes) -> bytes:
    return patched(HEADER.pack(), at, value, 36)


@pytest.mark.parametrize("footer", [DYNAMIC, FIXED, CHILD])
def test_what_we_write_we_read(footer: VhdFooter) -> None:
    assert parse_vhd_footer(footer.pack()) == footer


def test_header_roundtrip() -> None:
    assert parse_vhd_header(HEADER.pack(), DYNAMIC) == HEADER


def test_other_creators_and_hidden_disks_are_read() -> None:
    footer = VhdFooter(VhdType.DYNAMIC, 512 * 3, UUID16, 0, 512, b"win ", 0x00060001, hidden=True)
    assert parse_vhd_footer(footer.pack()) == footer


def test_a_differencing_header_names_its_parent() -> None:
    assert parse_vhd_header(header_with(40, UUID16), CHILD).parent_uuid16 == UUID16


@pytest.mark.parametrize(
    ("at", "value", "reason"),
    [
        (0, b"conectic", "cookie"),
        (0, b"v_poison", "disabled"),
        (8, struct.pack(">I", 0), "features"),
        (8, struct.pack(">I", 6), "features"),
        (12, struct.pack(">I", 0x00020000), "format version"),
        (16, struct.pack(">Q", 513), "data offset"),
        (16, struct.pack(">Q", 0), "data offset"),
        (16, struct.pack(">Q", NO_OFFSET), "data offset"),
        (40, struct.pack(">Q", 0), "disk size"),
        (48, struct.pack(">Q", 0), "disk size"),
        (48, struct.pack(">Q", 100 * MIB + 1), "disk size"),
        (48, struct.pack(">Q", VHD_SIZE_MAX + 512), "disk size"),
        (60, struct.pack(">I", 0), "disk type"),
        (60, struct.pack(">I", 5), "disk type"),
        (68, bytes(16), "null uuid"),
        (84, b"\x02", "saved"),
        (85, b"\x02", "hidden"),
        (86, b"\x01", "reserved"),
        (511, b"\x01", "reserved"),
    ],
)
def test_odd_footers_are_refused_with_the_reason(at: int, value: bytes, reason: str) -> None:
    with pytest.raises(SourceUnreadable, match=reason) as raised:
        parse_vhd_footer(footer_with(at, value))
    assert raised.value.hint


def test_a_fixed_disk_has_no_data_offset() -> None:
    with pytest.raises(SourceUnreadable, match="data offset"):
        parse_vhd_footer(footer_with(16, struct.pack(">Q", 512), FIXED))


@pytest.mark.parametrize(
    ("at", "value", "reason"),
    [
        (0, b"cxsparsf", "cookie"),
        (8, struct.pack(">Q", 0), "data offset"),
        (16, struct.pack(">Q", 1024), "BAT at"),
        (16, struct.pack(">Q", 1537), "BAT at"),
        (16, struct.pack(">Q", 1 << 41), "BAT at"),
        (24, struct.pack(">I", 0x00010001), "version"),
        (28, struct.pack(">I", 49), "49 BAT entries for 50 blocks"),
        (28, struct.pack(">I", 0xFFFFFFFF), "BAT entries"),
        (32, struct.pack(">I", 0), "block size"),
        (32, struct.pack(">I", 3 * MIB // 2), "block size"),
        (32, struct.pack(">I", 4 * MIB), "block size"),
        (32, struct.pack(">I", 512), "block size"),
        (40, UUID16, "a parent"),
        (56, b"\0\0\0\x01", "a parent"),
        (60, b"\x01", "reserved"),
        (64, b"\0x", "a parent"),
        (576, b"W2ru", "a parent"),
        (1023, b"\x01", "reserved"),
    ],
)
def test_odd_headers_are_refused_with_the_reason(at: int, value: bytes, reason: str) -> None:
    with pytest.raises(SourceUnreadable, match=reason):
        parse_vhd_header(header_with(at, value), DYNAMIC)


def test_a_child_without_parent_and_a_fixed_disk_with_header_are_refused() -> None:
    with pytest.raises(SourceUnreadable, match="without parent"):
        parse_vhd_header(HEADER.pack(), CHILD)
    with pytest.raises(SourceUnreadable, match="fixed disk"):
        parse_vhd_header(HEADER.pack(), FIXED)


@given(st.integers(0, 511), st.integers(1, 255))
def test_any_flipped_footer_byte_is_noticed(at: int, flip: int) -> None:
    damaged = bytearray(DYNAMIC.pack())
    damaged[at] ^= flip
    with pytest.raises(SourceUnreadable):
        parse_vhd_footer(bytes(damaged))


@given(st.integers(0, 1023), st.integers(1, 255))
def test_any_flipped_header_byte_is_noticed(at: int, flip: int) -> None:
    damaged = bytearray(HEADER.pack())
    damaged[at] ^= flip
    with pytest.raises(SourceUnreadable):
        parse_vhd_header(bytes(damaged), DYNAMIC)


@given(st.lists(st.tuples(st.integers(0, 1020), st.binary(min_size=1, max_size=16)), max_size=4), st.booleans())
def test_hostile_records_only_raise_our_errors_and_leave_bounds(patches: list[tuple[int, bytes]], child: bool) -> None:
    footer_raw, header_raw = (CHILD if child else DYNAMIC).pack(), HEADER.pack()
    for at, value in patches:
        footer_raw = patched(footer_raw, at // 2, value[: 512 - at // 2], 64)
        header_raw = patched(header_raw, at, value[: 1024 - at], 36)
    try:
        footer = parse_vhd_footer(footer_raw)
        header = parse_vhd_header(header_raw, footer)
    except XbfsError:
        return
    assert 0 < footer.size_bytes <= VHD_SIZE_MAX
    assert header.entries <= 1 << 22
    assert header.entries * header.block_size >= footer.size_bytes


@given(st.binary(max_size=1100))
def test_noise_is_refused(noise: bytes) -> None:
    with pytest.raises(SourceUnreadable):
        parse_vhd_footer(noise)
    with pytest.raises(SourceUnreadable):
        parse_vhd_header(noise, DYNAMIC)


@pytest.mark.parametrize(
    ("size", "cylinders", "heads", "per_track"),
    [
        (GIB, 2080, 16, 63),
        (128 * MIB, 963, 16, 17),
        (2 * MIB, 60, 4, 17),
        (VHD_SIZE_MAX, 65535, 16, 255),
    ],
)
def test_known_geometries(size: int, cylinders: int, heads: int, per_track: int) -> None:
    assert geometry(size) == cylinders << 16 | heads << 8 | per_track


@given(st.integers(1, VHD_SIZE_MAX // 512))
def test_geometry_is_the_specifications(sectors: int) -> None:
    assert geometry(sectors * 512) == chs(sectors)
    assert geometry(sectors * 512 - 1) == chs(sectors)
