"""What all filesystems read by fs_explorer have in common: the seam's methods over a few that differ.

A volume keeps four bounded things: the library's cache, listings that were left half-way, opened files, and the names
of directories in which something was looked up. One thread at a time.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections import OrderedDict
from itertools import islice
from typing import TYPE_CHECKING, Final, NamedTuple

from fs_explorer.entry import EntryType

from xbfs_engine.core.errors import GuestDamaged, GuestWrongKind
from xbfs_engine.guestfs.base import (
    NAME_BYTES_MAX,
    READ_BYTES_MAX,
    DirEntry,
    FileExtent,
    Kind,
    NodeId,
    NodeStat,
    VolumeInfo,
    Xattr,
)
from xbfs_engine.guestfs.explorer.library import guarded, steps

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fs_explorer.io.source import RandomAccess
    from fs_explorer.tree import Node

KINDS: Final = {
    EntryType.FILE: Kind.FILE,
    EntryType.DIR: Kind.DIRECTORY,
    EntryType.SYMLINK: Kind.SYMLINK,
    EntryType.CHAR_DEVICE: Kind.CHARACTER_DEVICE,
    EntryType.BLOCK_DEVICE: Kind.BLOCK_DEVICE,
    EntryType.FIFO: Kind.FIFO,
    EntryType.SOCKET: Kind.SOCKET,
}

ENTRY_KINDS: Final = {
    1: Kind.FILE,
    2: Kind.DIRECTORY,
    3: Kind.CHARACTER_DEVICE,
    4: Kind.BLOCK_DEVICE,
    5: Kind.FIFO,
    6: Kind.SOCKET,
    7: Kind.SYMLINK,
}
"""What ext and btrfs write into directory entries (directory.rst, BTRFS_FT_*)."""

_LISTINGS_MAX: Final = 16
_OPENED_MAX: Final = 16
_INDEXED_NAMES_MAX: Final = 128 << 10
"""Names of all indexed directories together: about 30 MB."""

_FILE_BYTES_END: Final = 1 << 63
"""Linux counts bytes of a file in 63 bits; what claims more is no file."""

_NOT_LISTED: Final = 1
"""Cookie of an entry that was found without listing."""


class Found(NamedTuple):
    """A directory entry as its filesystem has it; the name is any bytes."""

    name: bytes
    node: NodeId
    kind: Kind


class Opened(NamedTuple):
    """A file's content; ``ranges`` are (offset, length) of what is stored, None if all of it is."""

    data: RandomAccess
    ranges: list[tuple[int, int]] | None


class _Index(NamedTuple):
    """A directory's names; ``error`` is what ended its listing early."""

    entries: dict[bytes, DirEntry]
    error: GuestDamaged | None


def fit_name(name: bytes) -> bytes:
    """The name if Linux takes it; else one that it takes, as unmistakable: made legal, cut, and with a digest.

    NTFS and exFAT names have up to 255 UTF-16 units, which can be 765 bytes; other reasons are found in damaged or
    hostile volumes only.
    """
    if 0 < len(name) <= NAME_BYTES_MAX and b"/" not in name and b"\0" not in name and name not in (b".", b".."):
        return name
    digest = hashlib.blake2b(name, digest_size=8).hexdigest().encode()
    cut = min(len(name), NAME_BYTES_MAX - len(digest) - 1)
    while 0 < cut < len(name) and name[cut] & 0xC0 == 0x80:
        # Not within a character of UTF-8.
        cut -= 1
    return name[:cut].replace(b"/", b"_").replace(b"\0", b"_") + b"~" + digest


def wtf8(text: str) -> bytes:
    """UTF-16 as bytes; halves of characters, which NTFS allows in names, as UTF-8 would write them."""
    return text.encode("utf-8", "surrogatepass")


def plain_stat(node: Node, inode: int) -> NodeStat:
    """Metadata of a filesystem without owners, links and devices."""
    return NodeStat(
        inode=inode,
        kind=KINDS[node.type],
        mode=(node.mode or 0) & 0o7777,
        uid=0,
        gid=0,
        nlink=1,
        size_bytes=node.size or 0,
        allocated_bytes=node.stored_size or 0,
        mtime_ns=node.mtime_ns or 0,
        atime_ns=node.atime_ns,
        ctime_ns=None,
        btime_ns=node.btime_ns,
        rdev_major=0,
        rdev_minor=0,
    )


class ExplorerVolume(ABC):
    """A GuestFilesystem over one of fs_explorer's trees."""

    def __init__(self, info: VolumeInfo, root: NodeId) -> None:
        self._info = info
        self._root = root
        self._listings: OrderedDict[tuple[NodeId, int], Iterator[Found]] = OrderedDict()
        self._opened: OrderedDict[NodeId, Opened] = OrderedDict()
        self._indexes: OrderedDict[NodeId, _Index] = OrderedDict()

    @property
    def info(self) -> VolumeInfo:
        """What the volume is, and how far it can be trusted."""
        return self._info

    @property
    def root(self) -> NodeId:
        """The topmost directory."""
        return self._root

    def lookup(self, node: NodeId, name: bytes) -> DirEntry | None:
        """The entry of that exact name in a directory, or None."""
        index = self._index(node)
        if index is not None:
            entry = index.entries.get(name)
            if entry is None and index.error is not None:
                raise index.error
            return entry
        with guarded():
            found = self._find(node, name) if fit_name(name) == name else None
        if found is not None:
            return DirEntry(name, found.node, found.kind, _NOT_LISTED)
        return next((entry for entry in self.list(node) if entry.name == name), None)

    def list(self, node: NodeId, cookie: int = 0) -> Iterator[DirEntry]:
        """Entries of a directory; the cookie counts them."""
        entries = self._listings.pop((node, cookie), None)
        if entries is None:
            entries = islice(steps(self._entries(node)), cookie, None)
        try:
            for found in entries:
                cookie += 1
                yield DirEntry(fit_name(found.name), found.node, found.kind, cookie)
        except GeneratorExit:
            # Left half-way: whoever goes on from here need not begin at the start.
            self._listings[node, cookie] = entries
            if len(self._listings) > _LISTINGS_MAX:
                self._listings.popitem(last=False)
            raise

    def stat(self, node: NodeId) -> NodeStat:
        """Metadata, without reading any content (but of Interix links, which are told by it)."""
        with guarded():
            stat = self._stat(node)
        _check_size(stat.size_bytes)
        _check_size(stat.allocated_bytes)
        return stat

    def read(self, node: NodeId, offset: int, length: int) -> bytes:
        """Content of a file from ``offset``, fewer than ``length`` bytes only at its end."""
        assert offset >= 0
        assert 0 <= length <= READ_BYTES_MAX
        with guarded():
            data = self._open_file(node).data
            wanted = max(0, min(length, data.size - offset))
            content = data.read_at(offset, wanted) if wanted else b""
        if len(content) != wanted:
            raise GuestDamaged(f"{len(content)} bytes of {wanted} at {offset} of a file of {data.size}")
        return content

    def extents(self, node: NodeId, offset: int = 0) -> Iterator[FileExtent]:
        """A file's data and holes from ``offset`` up to its size."""
        with guarded():
            opened = self._open_file(node)
        size = opened.data.size
        at = 0
        for start, length in [(0, size)] if opened.ranges is None else opened.ranges:
            if at < start:
                yield from _extent(at, start, offset, is_data=False)
            at = max(at, min(start + length, size))
            yield from _extent(start, at, offset, is_data=True)
        yield from _extent(at, size, offset, is_data=False)

    def readlink(self, node: NodeId) -> bytes:
        """The target of a symlink."""
        with guarded():
            return self._readlink(node)

    def xattrs(self, node: NodeId) -> Iterator[Xattr]:
        """All extended attributes that fit into one."""
        yield from steps(self._xattrs(node))

    def _index(self, node: NodeId) -> _Index | None:
        """Names of a directory, or None if it is too large to keep them."""
        index = self._indexes.get(node)
        if index is not None:
            self._indexes.move_to_end(node)
            return index
        entries: dict[bytes, DirEntry] = {}
        error = None
        try:
            for entry in self.list(node):
                entries.setdefault(entry.name, entry)
                if len(entries) > _INDEXED_NAMES_MAX:
                    return None
        except GuestDamaged as damage:
            error = damage
        index = self._indexes[node] = _Index(entries, error)
        while sum(len(kept.entries) for kept in self._indexes.values()) > _INDEXED_NAMES_MAX:
            self._indexes.popitem(last=False)
        return index

    def _open_file(self, node: NodeId) -> Opened:
        opened = self._opened.get(node)
        if opened is None:
            opened = self._open(node)
            _check_size(opened.data.size)
            self._opened[node] = opened
            if len(self._opened) > _OPENED_MAX:
                self._opened.popitem(last=False)
        self._opened.move_to_end(node)
        return opened

    # All that follow run under ``guarded``.

    @abstractmethod
    def _entries(self, node: NodeId) -> Iterator[Found]:
        """A directory's entries in an order that never changes; without ``.`` and ``..`` where those are real."""

    @abstractmethod
    def _stat(self, node: NodeId) -> NodeStat: ...

    @abstractmethod
    def _open(self, node: NodeId) -> Opened: ...

    def _find(self, node: NodeId, name: bytes) -> Found | None:
        """An entry of a directory that is too large to be indexed, if there is a faster way than to list it."""
        return None

    def _readlink(self, node: NodeId) -> bytes:
        raise GuestWrongKind("no symlink")

    def _xattrs(self, node: NodeId) -> Iterator[Xattr]:
        yield from ()


def _check_size(size_bytes: int) -> None:
    if size_bytes >= _FILE_BYTES_END:
        raise GuestDamaged(f"a file claims {size_bytes} bytes")


def _extent(start: int, end: int, offset: int, *, is_data: bool) -> Iterator[FileExtent]:
    if start < end and end > offset:
        yield FileExtent(start, end - start, is_data)
