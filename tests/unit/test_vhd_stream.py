"""Allocation from the head of a VHD stream: bytes as ocaml-vhd writes them, files of qemu-img, and hostile ones."""

from __future__ import annotations

import io
import struct
import subprocess
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xbfs_engine.core.errors import SourceUnreadable, XbfsError
from xbfs_engine.core.limits import GIB, MIB
from xbfs_engine.formats.vhd_records import VHD_SIZE_MAX, checksum
from xbfs_engine.formats.vhd_stream import AllocatedBlocks, allocated_blocks

if TYPE_CHECKING:
    from pathlib import Path

BLOCK = 2 * MIB


def sealed(record: bytes, at: int) -> bytes:
    return record[:at] + struct.pack(">I", checksum(record)) + record[at + 4 :]


def host_stream(size: int, blocks: dict[int, int], *, disk_type: int = 3, gap: int = 512) -> bytes:
    """Footer, header at 512, an empty sector, BAT at 2048: as ocaml-vhd's Vhd_format writes a stream."""
    footer = struct.pack(
        ">8sIIQI4sIIQQIII16sB427x",
        *(b"conectix", 2, 0x10000, 512, 700_000_000, b"caml", 1, 0, size, size, 0x03FF0411, disk_type, 0),
        *(bytes(range(16)), 0),
    )
    entries = -(-size // BLOCK)
    table_at = 1536 + gap
    header = struct.pack(">8sQQIIII", b"cxsparse", 2**64 - 1, table_at, 0x10000, entries, BLOCK, 0).ljust(1024, b"\0")
    table = b"".join(struct.pack(">I", blocks.get(number, 0xFFFFFFFF)) for number in range(entries))
    return sealed(footer, 64) + sealed(header, 36) + bytes(gap) + table


def parse(stream: bytes, size: int) -> AllocatedBlocks:
    return allocated_blocks(io.BytesIO(stream).read, disk_size_bytes=size)


def test_blocks_of_a_host_stream_become_extents_within_the_disk() -> None:
    size = 9 * BLOCK - 512
    found = parse(host_stream(size, {0: 6, 1: 4103, 4: 9000, 8: 20000}), size)
    assert list(found.extents()) == [(0, 2 * BLOCK), (4 * BLOCK, BLOCK), (8 * BLOCK, BLOCK - 512)]
    assert found.allocated_bytes == 4 * BLOCK - 512


def test_nothing_behind_the_bat_is_read() -> None:
    head = host_stream(4 * BLOCK, {2: 6})
    stream = io.BytesIO(head + b"data")
    allocated_blocks(stream.read, disk_size_bytes=4 * BLOCK)
    assert stream.tell() == len(head)


@pytest.mark.parametrize("blocks", [{}, {n: 6 + n for n in range(5)}])
def test_empty_and_full_disks(blocks: dict[int, int]) -> None:
    expected = [(0, 5 * BLOCK)] if blocks else []
    assert list(parse(host_stream(5 * BLOCK, blocks), 5 * BLOCK).extents()) == expected


@given(st.lists(st.booleans(), min_size=1, max_size=100))
def test_extents_cover_exactly_the_blocks(bits: list[bool]) -> None:
    size = len(bits) * BLOCK
    extents = list(parse(host_stream(size, {n: 6 for n, bit in enumerate(bits) if bit}), size).extents())
    covered = [any(at <= n * BLOCK < at + length for at, length in extents) for n in range(len(bits))]
    assert covered == bits
    assert all(end < start for (_, end), (start, _) in zip([(a, a + n) for a, n in extents], extents[1:], strict=False))


def test_the_largest_disk_in_its_most_scattered_state() -> None:
    entries = VHD_SIZE_MAX // BLOCK
    found = AllocatedBlocks(VHD_SIZE_MAX, BLOCK, b"\xaa" * (entries // 8))
    assert sum(1 for _ in found.extents()) == entries // 2
    assert found.allocated_bytes == VHD_SIZE_MAX // 2


def test_a_file_of_qemu_img(tmp_path: Path) -> None:
    raw, vhd = tmp_path / "disk.raw", tmp_path / "disk.vhd"
    size = 40 * BLOCK
    with raw.open("wb") as file:
        for block in (1, 2, 17, 39):
            file.seek(block * BLOCK + 4096)
            file.write(b"data")
        file.truncate(size)
    command = ["qemu-img", "convert", "-f", "raw", "-O", "vpc", "-o", "subformat=dynamic,force_size=on", raw, vhd]
    subprocess.run(command, check=True, timeout=60)
    with vhd.open("rb") as file:
        found = allocated_blocks(file.read, disk_size_bytes=size)
    assert list(found.extents()) == [(BLOCK, 2 * BLOCK), (17 * BLOCK, BLOCK), (39 * BLOCK, BLOCK)]


@pytest.mark.parametrize(
    ("stream", "size"),
    [
        (b"", GIB),
        (b"HTTP/1.1 500 Internal Error\r\n\r\n", GIB),
        (bytes(1 << 20), GIB),
        (host_stream(GIB, {}), 2 * GIB),
        (host_stream(GIB, {})[:-1], GIB),
        (host_stream(GIB, {})[:1000], GIB),
        (host_stream(GIB, {}, disk_type=2), GIB),
        (host_stream(GIB, {}, gap=1 << 20), GIB),
    ],
    ids=["empty", "http", "zeros", "other size", "cut BAT", "cut header", "fixed", "far BAT"],
)
def test_what_is_no_such_stream_is_refused(stream: bytes, size: int) -> None:
    with pytest.raises(SourceUnreadable):
        parse(stream, size)


@given(at=st.integers(0, 2047), value=st.integers(0, 255), cut=st.integers(0, 2600))
def test_damage_gives_a_typed_error_or_extents_within_the_disk(at: int, value: int, cut: int) -> None:
    stream = bytearray(host_stream(64 * BLOCK, {3: 6, 60: 9}))
    stream[at] = value
    try:
        found = parse(bytes(stream[:cut] if cut < 2000 else stream), 64 * BLOCK)
    except XbfsError:
        return
    assert all(start >= 0 and length > 0 and start + length <= 64 * BLOCK for start, length in found.extents())
