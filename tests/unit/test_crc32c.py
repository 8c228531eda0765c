"""CRC-32C: published vectors, and the plain bitwise definition over every length around the block size."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from xbfs_engine.guestfs.crc32c import crc32c, crc32c_rows


def plain(data: bytes) -> int:
    state = 0xFFFFFFFF
    for byte in data:
        state ^= byte
        for _ in range(8):
            state = state >> 1 ^ (0x82F63B78 if state & 1 else 0)
    return state ^ 0xFFFFFFFF


@pytest.mark.parametrize(
    ("data", "expected"),
    [  # RFC 3720, B.4; the check value of the CRC catalogue
        (bytes(32), 0x8A9136AA),
        (b"\xff" * 32, 0x62A8AB43),
        (bytes(range(32)), 0x46DD794E),
        (b"123456789", 0xE3069283),
        (b"", 0),
    ],
)
def test_published_vectors(data: bytes, expected: int) -> None:
    assert crc32c(data) == expected


@given(st.binary(max_size=1600), st.data())
def test_any_length_and_any_cut_agree_with_the_definition(data: bytes, draw: st.DataObject) -> None:
    cut = draw.draw(st.integers(0, len(data)))
    assert crc32c(data[cut:], crc32c(data[:cut])) == plain(data)


@pytest.mark.parametrize("width", [4, 5, 100, 511, 512, 513, 515, 516, 1024, 1540])
def test_rows_are_the_same_as_one_by_one(width: int) -> None:
    rows = np.arange(3 * width, dtype=np.uint32).astype(np.uint8).reshape(3, width) * 7
    assert crc32c_rows(rows).tolist() == [plain(row.tobytes()) for row in rows]
