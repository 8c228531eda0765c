"""Hostile XFS images: whatever a volume holds, a reader only ever raises XbfsError, and comes to an end.

Metadata is changed with its checksum made right again, since damage behind a wrong one never reaches the parsers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tests.support import guest_walk, xfs_golden, xfs_seal
from xbfs_engine.guestfs.xfs.reader import open_xfs

if TYPE_CHECKING:
    from tests.support.guest_sources import SparseSource

NODES_MAX = 600
SOURCE_BYTES_MAX = 400 << 20
"""What a walk of so many nodes may read of the source at most: a window of inodes, and some blocks for each."""

V5_PLACES = list(xfs_seal.metadata(xfs_golden.image("v5"), 1024, 512))
V4_CHUNKS = sorted(xfs_golden.image("v4").chunks)
INTERESTING = (0, 1, 2, 0x7F, 0x80, 0xFF)
VALUES = st.one_of(
    st.binary(min_size=1, max_size=8),
    st.sampled_from([bytes([value]) * size for value in INTERESTING for size in (1, 2, 4, 8)]),
)


@settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(st.lists(st.tuples(st.sampled_from(V5_PLACES), st.integers(0, 4095), VALUES), min_size=1, max_size=4))
def test_version_5_with_right_checksums(changes: list[tuple[tuple[int, int, int], int, bytes]]) -> None:
    source = xfs_golden.image("v5")
    for (offset, length, place), at, value in changes:
        data = source.read_at(offset, length)
        # Half of the changes hit the first bytes, where counts and links are.
        at = at % length if at & 1 else at % 176
        data = (data[:at] + value + data[at + len(value) :])[:length]
        source.write_at(offset, xfs_seal.sealed(data, place))
    walk(source)


@settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(st.lists(st.tuples(st.sampled_from(V4_CHUNKS), st.integers(0, 4095), VALUES), min_size=1, max_size=30))
def test_version_4_has_nothing_that_checks_it(changes: list[tuple[int, int, bytes]]) -> None:
    source = xfs_golden.image("v4")
    for chunk, at, value in changes:
        source.write_at(chunk * 4096 + min(at, 4096 - len(value)), value)
    walk(source)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 263), VALUES, st.sampled_from(["v5", "v4"]))
@example(at=92, value=bytes(8), name="v5")
def test_any_superblock(at: int, value: bytes, name: str) -> None:
    source = xfs_golden.image(name)
    data = source.read_at(0, 512)
    data = (data[:at] + value + data[at + len(value) :])[:512]
    source.write_at(0, xfs_seal.sealed(data, xfs_seal.SUPERBLOCK_CRC) if name == "v5" else data)
    walk(source)


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=2000))
def test_anything_at_all(data: bytes) -> None:
    source = xfs_golden.SparseSource(len(data) + 512, {})
    source.write_at(0, b"XFSB"[: len(data)] + data[4:])
    walk(source)


def walk(source: SparseSource, nodes: int = NODES_MAX) -> None:
    guest_walk.walk(open_xfs, source, nodes=nodes, read_bytes_max=SOURCE_BYTES_MAX)
