"""Hostile volumes: whatever ext, btrfs, NTFS, FAT and exFAT hold, only XbfsError is raised, and all calls end."""

from __future__ import annotations

from contextlib import suppress
from itertools import islice
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support import guest_golden
from xbfs_engine.core.errors import XbfsError
from xbfs_engine.guestfs.base import NODE_ID_MAX, XATTR_BYTES_MAX, Kind
from xbfs_engine.guestfs.crc32c import crc32c

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.support.guest_sources import SparseSource
    from xbfs_engine.guestfs.base import GuestFilesystem, NodeId

NODES_MAX, ENTRIES_MAX, READ_BYTES = 250, 700, 40_000
SOURCE_BYTES_MAX = 600 << 20
VALUES = st.one_of(
    st.binary(min_size=1, max_size=8),
    st.sampled_from([bytes([value]) * size for value in (0, 1, 0x7F, 0x80, 0xFF) for size in (1, 2, 4, 8)]),
)
CHANGES = st.lists(st.tuples(st.integers(0, 1 << 30), st.integers(0, 4095), VALUES), min_size=1, max_size=25)


@pytest.mark.parametrize("name", guest_golden.NAMES)
@settings(max_examples=25, suppress_health_check=list(HealthCheck), deadline=None)
@given(changes=CHANGES)
def test_changed_volumes(name: str, changes: list[tuple[int, int, bytes]]) -> None:
    source = guest_golden.image(name)
    places = sorted(source.chunks)
    for where, at, value in changes:
        # Half of the changes hit the first blocks, where what all depends on is.
        number = places[where % len(places)] if where & 1 else places[where % min(12, len(places))]
        source.write_at(number * 4096 + min(at, 4096 - len(value)), value)
        seal(name, source, number)
    walk(name, source)


def seal(name: str, source: SparseSource, number: int) -> None:
    """Makes checksums right again: damage behind wrong ones never reaches the parsers."""
    block = source.chunks[number]
    if name == "btrfs" and block[32:48] == source.read_at(65_536 + 32, 16):
        # The superblock and tree blocks of this image are of 4096 bytes.
        source.write_at(number * 4096, crc32c(block[32:]).to_bytes(4, "little"))
    elif number == 0 and name.startswith("ext4"):
        source.write_at(2044, (crc32c(block[1024:2044]) ^ 0xFFFF_FFFF).to_bytes(4, "little"))


@pytest.mark.parametrize("name", guest_golden.NAMES)
def test_volumes_that_end_early(name: str) -> None:
    whole = guest_golden.image(name)
    for size in (0, 511, 512, 2048, 65_536 + 4096, whole.size_bytes // 3, whole.size_bytes - 512):
        source = guest_golden.image(name)
        source.size_bytes = size
        walk(name, source)


def walk(name: str, source: SparseSource) -> None:
    source.bytes_read = 0
    try:
        volume = guest_golden.NAMES[name](source)
        waiting = [volume.root]
    except XbfsError:
        return
    for _ in range(NODES_MAX):
        if not waiting:
            break
        visit(volume, waiting.pop(), waiting)
    assert source.bytes_read < SOURCE_BYTES_MAX


def visit(volume: GuestFilesystem, node: NodeId, waiting: list[NodeId]) -> None:
    assert len(node) <= NODE_ID_MAX
    attempt(lambda: all(len(xattr.value) <= XATTR_BYTES_MAX for xattr in islice(volume.xattrs(node), ENTRIES_MAX)))
    try:
        stat = volume.stat(node)
    except XbfsError:
        return
    assert 0 <= stat.mode <= 0o7777
    if stat.kind is Kind.DIRECTORY:
        attempt(lambda: list_some(volume, node, waiting))
        attempt(lambda: volume.lookup(node, b"entry1") is None or True)
    elif stat.kind is Kind.FILE:
        attempt(lambda: covers(volume, node, stat.size_bytes))
        attempt(lambda: len(volume.read(node, 0, READ_BYTES)) == min(READ_BYTES, stat.size_bytes))
        attempt(lambda: len(volume.read(node, max(0, stat.size_bytes - 10), READ_BYTES)) == min(10, stat.size_bytes))
    elif stat.kind is Kind.SYMLINK:
        attempt(lambda: len(volume.readlink(node)) >= 0)


def attempt(call: Callable[[], bool]) -> None:
    with suppress(XbfsError):
        assert call()


def list_some(volume: GuestFilesystem, node: NodeId, waiting: list[NodeId]) -> bool:
    cookie = 0
    for entry in islice(volume.list(node), ENTRIES_MAX):
        assert 0 < len(entry.name) <= 255
        assert not {0, ord("/")} & set(entry.name)
        assert entry.cookie > cookie
        cookie = entry.cookie
        waiting.append(entry.node)
    return True


def covers(volume: GuestFilesystem, node: NodeId, size_bytes: int) -> bool:
    """The extents are without gaps up to the size."""
    at = 0
    for extent in islice(volume.extents(node), ENTRIES_MAX):
        assert extent.offset == at
        assert extent.length > 0
        at += extent.length
    return at <= size_bytes
