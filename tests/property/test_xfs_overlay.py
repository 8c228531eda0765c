"""Sectors laid over a source are the same as bytes written into a copy of it."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tests.support.guest_sources import SparseSource
from xbfs_engine.guestfs.xfs.overlay import Overlay

SIZE = 300 << 10
places = st.integers(0, SIZE - 1)


@given(
    st.lists(st.tuples(places, st.binary(min_size=1, max_size=40), st.integers(1, 60)), max_size=12),
    st.lists(st.tuples(places, st.integers(1, 150_000)), max_size=12),
)
def test_reads_see_all_writes(writes: list[tuple[int, bytes, int]], reads: list[tuple[int, int]]) -> None:
    plain = bytearray(bytes(range(256)) * (SIZE // 256))
    source = SparseSource(SIZE, {n: bytes(plain[n * 4096 : (n + 1) * 4096]) for n in range(SIZE // 4096)})
    overlay = Overlay(source)
    written: set[int] = set()
    for at, piece, times in writes:
        data = (piece * times)[: SIZE - at]
        overlay.write_at(at, data)
        plain[at : at + len(data)] = data
        written |= set(range(at // 512, (at + len(data) + 511) // 512))
    for at, length in [(0, SIZE), *reads]:
        length = min(length, SIZE - at)
        assert overlay.read_at(at, length) == plain[at : at + length]
        touched = {sector for sector in written if at < (sector + 1) * 512 and sector * 512 < at + length}
        assert overlay.is_replaced(at, length) == bool(touched)
