"""SparseMap answers as lseek(2) would on a file with the same holes."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from xbfs.view.sparse import SparseMap
from xbfs_engine.core.limits import MIB


def packed(bits: list[bool]) -> bytes:
    padded = bits + [False] * (-len(bits) % 8)
    return bytes(sum(bit << (7 - at) for at, bit in enumerate(padded[i : i + 8])) for i in range(0, len(padded), 8))


@given(st.lists(st.booleans(), max_size=40), st.integers(0, MIB - 1), st.data())
def test_like_a_list_of_mibs(bits: list[bool], short: int, data: st.DataObject) -> None:
    size = max(len(bits) * MIB - short, 0)
    bits = bits[: -(-size // MIB)]
    sparse = SparseMap.of_disk(packed(bits), size)
    offset = data.draw(st.integers(0, size + MIB))

    def first(wanted: bool) -> int | None:
        found = (max(offset, at * MIB) for at, bit in enumerate(bits) if bit is wanted and (at + 1) * MIB > offset)
        return next(found, None)

    if offset >= size:
        assert sparse.data_from(offset) is None
        assert sparse.hole_from(offset) is None
        return
    assert sparse.data_from(offset) == first(True)
    hole = first(False)
    assert sparse.hole_from(offset) == (size if hole is None else hole)


def test_solid_has_one_hole_at_its_end() -> None:
    sparse = SparseMap.solid(10)
    assert [sparse.data_from(at) for at in (0, 9, 10)] == [0, 9, None]
    assert [sparse.hole_from(at) for at in (0, 9, 10)] == [10, 10, None]
