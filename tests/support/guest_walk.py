"""Walks over a volume that may be hostile: only XbfsError comes out, every call ends, and what is returned is sound."""

from __future__ import annotations

from contextlib import suppress
from itertools import islice
from typing import TYPE_CHECKING

from xbfs_engine.core.errors import XbfsError
from xbfs_engine.guestfs.base import NODE_ID_MAX, XATTR_BYTES_MAX, Kind

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from tests.support.guest_sources import SparseSource
    from xbfs_engine.formats.source import BlockSource
    from xbfs_engine.guestfs.base import GuestFilesystem, NodeId

ENTRIES_MAX, READ_BYTES = 3000, 40_000
SIZE_END = 1 << 63
"""Linux counts sizes in 63 bits."""


def walk(
    open_: Callable[[BlockSource], GuestFilesystem],
    source: SparseSource,
    *,
    nodes: int,
    read_bytes_max: int,
    entries: int = ENTRIES_MAX,
    first: Sequence[NodeId] = (),
) -> int:
    """Looks at up to ``nodes`` nodes, ``first`` before those below the root; together they read no more of the source
    than said. Returns how many."""
    source.bytes_read = 0
    try:
        volume = open_(source)
        waiting = [volume.root, *first]
    except XbfsError:
        return 0
    seen = 0
    while waiting and seen < nodes:
        visit(volume, waiting.pop(), waiting, entries)
        seen += 1
    assert source.bytes_read < read_bytes_max
    return seen


def visit(volume: GuestFilesystem, node: NodeId, waiting: list[NodeId], entries: int = ENTRIES_MAX) -> None:
    assert len(node) <= NODE_ID_MAX
    attempt(lambda: all(len(xattr.value) <= XATTR_BYTES_MAX for xattr in islice(volume.xattrs(node), entries)))
    try:
        stat = volume.stat(node)
    except XbfsError:
        return
    assert 0 <= stat.mode <= 0o7777
    assert 0 <= stat.size_bytes < SIZE_END
    assert 0 <= stat.allocated_bytes < SIZE_END
    if stat.kind is Kind.DIRECTORY:
        attempt(lambda: list_some(volume, node, waiting, entries))
        attempt(lambda: volume.lookup(node, b"entry1") is None or True)
    elif stat.kind is Kind.FILE:
        attempt(lambda: covers(volume, node, stat.size_bytes, entries))
        attempt(lambda: len(volume.read(node, 0, READ_BYTES)) == min(READ_BYTES, stat.size_bytes))
        attempt(lambda: len(volume.read(node, max(0, stat.size_bytes - 10), READ_BYTES)) == min(10, stat.size_bytes))
    elif stat.kind is Kind.SYMLINK:
        attempt(lambda: len(volume.readlink(node)) >= 0)


def attempt(call: Callable[[], bool]) -> None:
    with suppress(XbfsError):
        assert call()


def list_some(volume: GuestFilesystem, node: NodeId, waiting: list[NodeId], entries: int) -> bool:
    cookie = 0
    for entry in islice(volume.list(node), entries):
        assert 0 < len(entry.name) <= 255
        assert not {0, ord("/")} & set(entry.name)
        assert entry.name not in (b".", b"..")
        assert entry.cookie > cookie
        cookie = entry.cookie
        waiting.append(entry.node)
    return True


def covers(volume: GuestFilesystem, node: NodeId, size_bytes: int, entries: int) -> bool:
    """The extents are without gaps up to the size."""
    at = 0
    for extent in islice(volume.extents(node), entries):
        assert extent.offset == at
        assert extent.length > 0
        at += extent.length
    return at <= size_bytes
