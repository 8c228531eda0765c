"""A segment: a run of a volume's entries in path order, as the body of a metadata chunk. Format only, no state.

Paths are those within the volume, without a slash at either end; the root itself is no entry. Path order compares
component by component: the order of the bytes once ``/`` is replaced by NUL, which no name holds. It is the order of a
walk that enters each directory right after its entry. docs/format.md, "File index segment".
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np

from xbfs_engine.core.errors import FormatTooNew, IndexCorrupt
from xbfs_engine.guestfs.base import NAME_BYTES_MAX, Kind

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from xbfs_engine.codec.compress import Buffer

MAGIC: Final = 0x46
"""``F``: a block map node, the other thing that metadata chunks hold, begins with its version, 1."""
VERSION: Final = 1
HEAD: Final = struct.Struct("<BBHII")
"""Magic, version, entries, bytes of the path of the directory that holds the first entry, bytes of the names."""
assert HEAD.size == 12

ENTRIES_MAX: Final = 4096
DEPTH_MAX: Final = 1024
"""Components of a path; the kernel's PATH_MAX allows four times that in one-letter names."""
PATH_BYTES_MAX: Final = 32 << 10
"""Longest path of a directory: what Windows takes (32,767 UTF-16 units) in ASCII, eight times Linux's PATH_MAX."""
PATHS_BYTES_MAX: Final = 2 << 20
"""All paths of a segment together: they are stored as names, and a deep directory would unfold a thousandfold."""

KINDS: Final = tuple(Kind)
"""By code: f d l b c p s and ?."""
_CODES: Final = {kind: code for code, kind in enumerate(KINDS)}
_KIND_BITS: Final = 0x0F
_HAS_STAT: Final = 0x10
_HAS_CTIME: Final = 0x20
_NS_PER_S: Final = 1_000_000_000
_PLANES: Final = (("size", 8), ("mtime_s", 8), ("mtime_ns", 4), ("inode", 8), ("ctime_s", 8), ("ctime_ns", 4))
_STORED: Final = 2 + 1 + sum(width for _, width in _PLANES)
"""Bytes of an entry beside its name."""
_SIZE_MAX: Final = (1 << 63) - 1
_SECONDS_MAX: Final = 1 << 62


class Entry(NamedTuple):
    """One name of a volume. ``inode`` is 0 where its metadata could not be read: then size and times say nothing."""

    path: bytes
    kind: Kind
    size_bytes: int
    mtime_ns: int
    inode: int
    ctime_ns: int | None
    """When its metadata changed; None where the filesystem does not store it."""


def order(path: bytes) -> bytes:
    """The key by which paths are sorted."""
    return path.replace(b"/", b"\0")


def encode_segment(entries: Sequence[Entry]) -> bytes:
    """The body of 1..ENTRIES_MAX entries, ascending, each directory before what it holds."""
    assert 0 < len(entries) <= ENTRIES_MAX
    base = entries[0].path.rpartition(b"/")[0]
    names = b"\0".join(entry.path.rpartition(b"/")[2] for entry in entries)
    times = [entry.ctime_ns or 0 for entry in entries]
    columns: list[NDArray[np.uint64] | NDArray[np.uint32]] = [
        np.array([_clamped(entry.size_bytes, 0, _SIZE_MAX) for entry in entries], dtype=np.int64).view(np.uint64),
        _steps([_clamped(entry.mtime_ns // _NS_PER_S, -_SECONDS_MAX, _SECONDS_MAX) for entry in entries]),
        np.array([entry.mtime_ns % _NS_PER_S for entry in entries], dtype=np.uint32),
        _differences(np.array([entry.inode & (2**64 - 1) for entry in entries], dtype=np.uint64)),
        _steps([_clamped(time // _NS_PER_S, -_SECONDS_MAX, _SECONDS_MAX) for time in times]),
        np.array([time % _NS_PER_S for time in times], dtype=np.uint32),
    ]
    depths = np.array([entry.path.count(b"/") for entry in entries], dtype="<u2")
    flags = bytes(
        _CODES[entry.kind] | (_HAS_STAT if entry.inode else 0) | (0 if entry.ctime_ns is None else _HAS_CTIME)
        for entry in entries
    )
    head = HEAD.pack(MAGIC, VERSION, len(entries), len(base), len(names))
    return b"".join([head, base, names, depths.tobytes(), flags, *map(_planes, columns)])


def _clamped(value: int, low: int, high: int) -> int:
    return min(max(value, low), high)


def _steps(values: Sequence[int]) -> NDArray[np.uint64]:
    return _differences(np.array(values, dtype=np.int64).view(np.uint64))


def _differences(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Each value less the one before, modulo 2^64: neighbours are alike, so most bytes become zero."""
    found: NDArray[np.uint64] = np.diff(values, prepend=np.uint64(0))
    return found


def _planes(column: NDArray[np.uint64] | NDArray[np.uint32]) -> bytes:
    """All lowest bytes, then all next ones and so on: the compressor then sees like beside like."""
    little = column.astype(column.dtype.newbyteorder("<"), copy=False)
    return little.view(np.uint8).reshape(len(column), column.itemsize).T.tobytes()


class Segment:
    """A decoded segment. Immutable; any thread may use it.

    Raises IndexCorrupt unless the bytes are what ``encode_segment`` makes of some entries, FormatTooNew.
    """

    __slots__ = ("_columns", "_flags", "keys", "memory_bytes", "names", "paths")

    def __init__(self, body: Buffer) -> None:
        data = bytes(body)
        if len(data) < HEAD.size or data[0] != MAGIC:
            raise IndexCorrupt("a file index segment does not begin as one")
        _, version, count, base_size, names_size = HEAD.unpack_from(data)
        if version != VERSION:
            raise FormatTooNew(f"a file index segment has version {version}")
        start = HEAD.size + base_size + names_size
        if not 0 < count <= ENTRIES_MAX or base_size > PATH_BYTES_MAX or len(data) != start + count * _STORED:
            raise IndexCorrupt(f"a file index segment of {len(data)} bytes does not hold {count} entries")
        names = data[HEAD.size + base_size : start].split(b"\0")
        if len(names) != count:
            raise IndexCorrupt(f"a file index segment has {len(names)} names for {count} entries")
        depths = np.frombuffer(data, dtype="<u2", count=count, offset=start).tolist()
        start += 2 * count
        self._flags = data[start : start + count]
        self.names: list[bytes] = names
        self.paths: list[bytes] = _paths(data[HEAD.size : HEAD.size + base_size], names, depths, self._flags)
        self.keys: list[bytes] = [path.replace(b"/", b"\0") for path in self.paths]
        """``order`` of the paths."""
        self._columns = _columns(data, start + count, count)
        self.memory_bytes: int = 3 * sum(map(len, self.paths)) + count * 400

    def __len__(self) -> int:
        return len(self.paths)

    def entry(self, number: int) -> Entry:
        """The entry of that number."""
        size, mtime_s, mtime_ns, inode, ctime_s, ctime_ns = (column[number] for column in self._columns)
        flags = self._flags[number]
        ctime = ctime_s * _NS_PER_S + ctime_ns if flags & _HAS_CTIME else None
        kind = KINDS[flags & _KIND_BITS]
        return Entry(self.paths[number], kind, size, mtime_s * _NS_PER_S + mtime_ns, inode, ctime)

    def kind(self, number: int) -> Kind:
        """What that entry is."""
        return KINDS[self._flags[number] & _KIND_BITS]


def _paths(base: bytes, names: list[bytes], depths: list[int], flags: bytes) -> list[bytes]:
    """The full paths; checks that they ascend, hang together and have names that a filesystem can have."""
    above = base.split(b"/") if base else []
    if len(above) != depths[0] or len(above) >= DEPTH_MAX or not all(map(_is_name, above)):
        raise IndexCorrupt("a file index segment begins in a directory whose path is none")
    # By depth: the directory that is being listed with a slash behind it, and the name that came last in it.
    parents = [b"".join(part + b"/" for part in above[:depth]) for depth in range(len(above) + 1)]
    latest = [*above, b""]
    directory, left = _CODES[Kind.DIRECTORY], PATHS_BYTES_MAX
    found: list[bytes] = []
    for name, depth, flag in zip(names, depths, flags, strict=True):
        last = len(latest) - 1
        if depth != last:
            if depth > last:
                raise IndexCorrupt("a file index segment has an entry without a directory")
            del latest[depth + 1 :], parents[depth + 1 :]
        if name <= latest[depth] or not _is_name(name):
            raise IndexCorrupt("a file index segment has a name that is none or out of order")
        if flag & _KIND_BITS >= len(KINDS) or flag & ~(_KIND_BITS | _HAS_STAT | _HAS_CTIME):
            raise IndexCorrupt("a file index segment has an entry of an unknown kind")
        path = parents[depth] + name
        latest[depth] = name
        left -= len(path)
        if left < 0:
            raise IndexCorrupt(f"a file index segment has more than {PATHS_BYTES_MAX} bytes of paths")
        if flag & _KIND_BITS == directory and may_hold(path):
            parents.append(path + b"/")
            latest.append(b"")
        found.append(path)
    return found


def may_hold(path: bytes) -> bool:
    """Whether a directory of that path may have entries in an index."""
    return len(path) <= PATH_BYTES_MAX and path.count(b"/") < DEPTH_MAX - 1


def _is_name(name: bytes) -> bool:
    return 0 < len(name) <= NAME_BYTES_MAX and b"/" not in name and name not in (b".", b"..")


def _columns(data: bytes, start: int, count: int) -> list[list[int]]:
    """Size, mtime in s and ns, inode, ctime in s and ns, each by entry."""
    found = []
    for name, width in _PLANES:
        planes = np.frombuffer(data, dtype=np.uint8, count=width * count, offset=start).reshape(width, count)
        values = np.ascontiguousarray(planes.T).view(f"<u{width}").reshape(count)
        if name in {"mtime_s", "inode", "ctime_s"}:
            values = np.cumsum(values, dtype=np.uint64)
        numbers: list[int] = (values.view(np.int64) if name in {"mtime_s", "ctime_s"} else values).tolist()
        if width == 4 and max(numbers) >= _NS_PER_S:
            raise IndexCorrupt("a file index segment has a time of more than a second's nanoseconds")
        found.append(numbers)
        start += width * count
    return found
