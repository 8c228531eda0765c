"""A walk over all names of a volume in path order, in memory that does not grow with the volume.

Everything a guest says is hostile: directories that are met twice are entered once, depth and paths are bounded, and
what can not be read becomes a problem of the walk, never a missing name without a word.
"""

from __future__ import annotations

import marshal
from heapq import merge
from itertools import islice
from operator import itemgetter
from typing import TYPE_CHECKING, Final

import zstandard

from xbfs_engine.catalog.fileindex.records import Problem
from xbfs_engine.catalog.fileindex.root import PROBLEMS_MAX
from xbfs_engine.catalog.fileindex.segment import Entry, may_hold
from xbfs_engine.core.errors import GuestError, GuestReaderFailed, IntegrityError
from xbfs_engine.guestfs.base import Kind, NodeId

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from xbfs_engine.guestfs.guest import Guest, Listed

RUN_ROWS: Final = 32 << 10
"""Rows of a directory that are sorted at once, some 10 MiB; a larger directory is merged from sorted runs."""
BLOCK_ROWS: Final = 512
"""Rows kept as they are while what is below one of them is walked, 150 KiB for every level; others are compressed."""
DIRECTORIES_MAX: Final = 1_000_000
"""Directories of a volume that are entered: each is remembered, at some 130 bytes."""

_Row = tuple[bytes, bytes, str, int, int, int, int | None]
"""Name, node of a directory (else empty), letter of the kind, size, mtime, inode, ctime."""
_BY_NAME = itemgetter(0)


class Walk:
    """One walk over one volume; a generator that keeps account. One thread."""

    def __init__(self, guest: Guest, volume: str, wanted: Iterable[bytes] = ()) -> None:
        self._guest = guest
        self._volume = volume
        self._wanted = set(wanted)
        self._entered: set[bytes] = set()
        self.root = b""
        self.places: dict[bytes, bytes] = {}
        """Paths of those wanted directories (by node id) that were met."""
        self.problems: list[Problem] = []
        self.problems_omitted = 0
        self.settled = True
        """Whether another walk would meet the same problems."""

    def entries(self) -> Iterator[Entry]:
        """All entries, ascending by ``segment.order``. Raises StorageError, and GuestError if there is no root."""
        self.root = bytes(self._guest.root(self._volume))
        if self.root in self._wanted:
            self.places[self.root] = b""
        stack = [(b"", self._enter(b"", self.root))]
        while stack:
            prefix, rows = stack[-1]
            row = next(rows, None)
            if row is None:
                stack.pop()
                continue
            name, node, letter, size, mtime_ns, inode, ctime_ns = row
            path = prefix + name
            yield Entry(path, Kind(letter), size, mtime_ns, inode, ctime_ns)
            if not inode:
                self._problem(path, "its metadata can not be read")
            if node and self._may_enter(path, node):
                stack.append((path + b"/", self._enter(path, node)))

    def _may_enter(self, path: bytes, node: bytes) -> bool:
        if node in self._wanted:
            self.places.setdefault(node, path)
        if node in self._entered:
            self._problem(path, "is a directory that is also in another place: what it holds is listed there")
        elif not may_hold(path):
            self._problem(path, "lies too deep: what it holds is not listed")
        elif len(self._entered) >= DIRECTORIES_MAX:
            self._problem(path, f"is beyond the first {DIRECTORIES_MAX} directories: what it holds is not listed")
        else:
            return True
        return False

    def _enter(self, path: bytes, node: bytes) -> Iterator[_Row]:
        self._entered.add(node)
        runs: list[list[bytes]] = []
        listed = self._listed(path, node)
        while True:
            rows = sorted(islice(listed, RUN_ROWS), key=_BY_NAME)
            if not runs and len(rows) <= BLOCK_ROWS:
                return self._once(path, rows)
            runs.append(_packed(rows))
            if len(rows) < RUN_ROWS:
                return self._once(path, merge(*map(_unpacked, runs), key=_BY_NAME))

    def _once(self, path: bytes, rows: Iterable[_Row]) -> Iterator[_Row]:
        """The rows without a second one of the same name."""
        last = b""
        for row in rows:
            if row[0] == last:
                self._problem(path + b"/" + last if path else last, "is listed twice; the first is shown")
                continue
            last = row[0]
            yield row

    def _listed(self, path: bytes, node: bytes) -> Iterator[_Row]:
        cookie = 0
        while True:
            try:
                page = self._guest.list(self._volume, NodeId(node), cookie)
            except (GuestError, IntegrityError) as exc:
                if isinstance(exc, (IntegrityError, GuestReaderFailed)):
                    self.settled = False
                self._problem(path, exc.message)
                return
            yield from map(_row, page.entries)
            if page.is_last:
                return
            if not page.entries or page.entries[-1].entry.cookie <= cookie:
                self._problem(path, "its listing does not go on")
                return
            cookie = page.entries[-1].entry.cookie

    def _problem(self, path: bytes, message: str) -> None:
        if len(self.problems) < PROBLEMS_MAX:
            self.problems.append(Problem(path, message))
        else:
            self.problems_omitted += 1


def _row(listed: Listed) -> _Row:
    entry, stat = listed
    if stat is None:
        return (entry.name, bytes(entry.node) if entry.kind is Kind.DIRECTORY else b"", entry.kind.value, 0, 0, 0, None)
    node = bytes(entry.node) if stat.kind is Kind.DIRECTORY else b""
    return (entry.name, node, stat.kind.value, stat.size_bytes, stat.mtime_ns, stat.inode, stat.ctime_ns)


def _packed(rows: list[_Row]) -> list[bytes]:
    compressor = zstandard.ZstdCompressor(level=1)
    return [
        compressor.compress(marshal.dumps(rows[first : first + BLOCK_ROWS]))
        for first in range(0, len(rows), BLOCK_ROWS)
    ]


def _unpacked(blocks: list[bytes]) -> Iterator[_Row]:
    """Rows that ``_packed`` made, in this process: marshal is given nothing else."""
    decompressor = zstandard.ZstdDecompressor()
    for block in blocks:
        yield from marshal.loads(decompressor.decompress(block))  # noqa: S302 - our own bytes
