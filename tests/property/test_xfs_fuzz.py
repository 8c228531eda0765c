"""Hostile XFS images: whatever a volume holds, a reader only ever raises XbfsError, and comes to an end.

Metadata is changed with its checksum made right again, since damage behind a wrong one never reaches the parsers.
"""

from __future__ import annotations

from contextlib import suppress
from itertools import islice
from typing import TYPE_CHECKING

from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tests.support import xfs_golden, xfs_seal
from xbfs_engine.core.errors import XbfsError
from xbfs_engine.guestfs.base import XATTR_BYTES_MAX, Kind
from xbfs_engine.guestfs.xfs.reader import open_xfs

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.support.guest_sources import SparseSource
    from xbfs_engine.guestfs.base import NodeId
    from xbfs_engine.guestfs.xfs.reader import XfsReader

NODES_MAX, ENTRIES_MAX, READ_BYTES = 600, 3000, 40_000
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
@given(st.lists(st.tuples(st.sampled_from(V5_PLACES), st.integers(0, 1023), VALUES), min_size=1, max_size=4))
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
    source.bytes_read = 0
    try:
        volume = open_xfs(source)
        waiting = [volume.root]
    except XbfsError:
        return
    for _ in range(nodes):
        if not waiting:
            break
        visit(volume, waiting.pop(), waiting)
    assert source.bytes_read < SOURCE_BYTES_MAX


def visit(volume: XfsReader, node: NodeId, waiting: list[NodeId]) -> None:
    try:
        stat = volume.stat(node)
    except XbfsError:
        return
    attempt(lambda: all(len(xattr.value) <= XATTR_BYTES_MAX for xattr in islice(volume.xattrs(node), ENTRIES_MAX)))
    if stat.kind is Kind.DIRECTORY:
        attempt(lambda: list_some(volume, node, waiting))
        attempt(lambda: volume.lookup(node, b"entry1") is None or True)
    elif stat.kind is Kind.FILE:
        attempt(lambda: covers(volume, node, stat.size_bytes))
        attempt(lambda: len(volume.read(node, 0, READ_BYTES)) == min(READ_BYTES, stat.size_bytes))
        attempt(lambda: len(volume.read(node, max(0, stat.size_bytes - 10), READ_BYTES)) == min(10, stat.size_bytes))
    elif stat.kind is Kind.SYMLINK:
        attempt(lambda: len(volume.readlink(node)) == stat.size_bytes)


def attempt(call: Callable[[], bool]) -> None:
    with suppress(XbfsError):
        assert call()


def list_some(volume: XfsReader, node: NodeId, waiting: list[NodeId]) -> bool:
    cookie = 0
    for entry in islice(volume.list(node), ENTRIES_MAX):
        assert 0 < len(entry.name) <= 255
        assert not {0, ord("/")} & set(entry.name)
        assert entry.cookie > cookie
        cookie = entry.cookie
        waiting.append(entry.node)
    return True


def covers(volume: XfsReader, node: NodeId, size_bytes: int) -> bool:
    """The extents are without gaps up to the size."""
    at = 0
    for extent in islice(volume.extents(node), ENTRIES_MAX):
        assert extent.offset == at
        assert extent.length > 0
        at += extent.length
    return at <= size_bytes
