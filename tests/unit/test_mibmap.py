"""MibMap gives back the bits it was made of, and is small where data lies together."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from xbfs_engine.catalog.mibmap import MibMap


@given(st.binary(max_size=2000), st.binary(max_size=4))
def test_bits_come_back(bits: bytes, more: bytes) -> None:
    made = MibMap(bits)
    assert made.bits() == bits
    assert made.mibs == sum(byte.bit_count() for byte in bits)
    assert (made == MibMap(bits + more)) is (not more)


def test_a_thousand_points_of_a_big_disk_fit_in_memory() -> None:
    """2 TiB, data in a few thousand runs: under 16 KiB each."""
    bits = bytearray(256 * 1024)
    for start in range(0, len(bits), 100):
        bits[start : start + 40] = b"\xff" * 40
    made = MibMap(bytes(bits))
    assert len(made._kept) < 16 * 1024
