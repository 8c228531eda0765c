"""An XFS volume as a GuestFilesystem. One thread at a time; memory is bounded by the caches of its parts."""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING, Final

from xbfs_engine.core.errors import GuestDamaged, GuestUnsupported, GuestWrongKind
from xbfs_engine.guestfs.base import (
    READ_BYTES_MAX,
    DirEntry,
    FileExtent,
    Kind,
    NodeId,
    NodeStat,
    VolumeInfo,
    VolumeState,
)
from xbfs_engine.guestfs.xfs.attributes import attributes
from xbfs_engine.guestfs.xfs.directories import Directory
from xbfs_engine.guestfs.xfs.extents import Extent, extents
from xbfs_engine.guestfs.xfs.geometry import SUPERBLOCK_BYTES, parse_superblock
from xbfs_engine.guestfs.xfs.inodes import FORMAT_LOCAL, Inodes
from xbfs_engine.guestfs.xfs.log import Log
from xbfs_engine.guestfs.xfs.replay import replay
from xbfs_engine.guestfs.xfs.volume import REMOTE_HEADER, Volume

if TYPE_CHECKING:
    from collections.abc import Iterator

    from xbfs_engine.formats.source import BlockSource
    from xbfs_engine.guestfs.base import Xattr
    from xbfs_engine.guestfs.xfs.directories import Entry
    from xbfs_engine.guestfs.xfs.geometry import Geometry
    from xbfs_engine.guestfs.xfs.inodes import Inode

_SUPERBLOCK_READ_BYTES: Final = 32 << 10
"""The largest sector: the superblock's checksum covers one."""
_NODE_BYTES: Final = 8
_TARGET_BYTES_MAX: Final = 1024
"""XFS_SYMLINK_MAXLEN."""
_TARGET_MAGIC: Final = b"XSLM"
_TARGET_HEADER_BYTES: Final = 56
_TARGET_EXTENTS_MAX: Final = 3
"""XFS_SYMLINK_MAPS."""


def open_xfs(source: BlockSource) -> XfsReader:
    """A reader over a volume that starts at the source's first byte.

    Raises GuestUnsupported if it is no XFS or uses what is not known, GuestDamaged if it can not be read as a whole.
    """
    geometry = _geometry(source)
    try:
        return _checked(_replayed(source, geometry))
    except (GuestDamaged, GuestUnsupported) as exc:
        reason = f"changes that only its log holds are not shown: {exc.message}"
        return _checked(XfsReader(Volume(source, geometry), VolumeState.DIRTY, reason, frozenset()))


def _checked(reader: XfsReader) -> XfsReader:
    if reader.stat(reader.root).kind is not Kind.DIRECTORY:
        raise GuestDamaged("the root inode is no directory")
    return reader


def _geometry(source: BlockSource, *, is_replayed: bool = False) -> Geometry:
    data = source.read_at(0, min(_SUPERBLOCK_READ_BYTES, source.size_bytes))
    geometry = parse_superblock(data, is_replayed=is_replayed)
    if geometry.size_bytes > source.size_bytes:
        raise GuestDamaged(
            f"the filesystem has {geometry.size_bytes} bytes, its volume only {source.size_bytes}",
            hint="the volume was made smaller than its filesystem; the guest can not mount it either",
        )
    return geometry


def _replayed(source: BlockSource, geometry: Geometry) -> XfsReader:
    """A reader over the volume as it is after its log was replayed."""
    log = Log(source, geometry)
    if log.is_clean:
        return XfsReader(Volume(source, geometry), VolumeState.CLEAN, "", frozenset())
    done = replay(source, geometry, log)
    geometry = _geometry(done.source, is_replayed=done.source.is_replaced(0, SUPERBLOCK_BYTES))
    reason = f"it was in use; {done.transactions} transactions of its log were replayed in memory"
    if done.unfinished:
        reason += f"; changes of {len(done.unfinished)} files were under way, and what they concern is refused"
    return XfsReader(Volume(done.source, geometry, done.source), VolumeState.REPLAYED, reason, done.unfinished)


class XfsReader:
    """GuestFilesystem of an XFS; made by ``open_xfs``. A node id is the inode number, 8 bytes big-endian.

    ``unfinished`` are inodes whose content or attributes were being changed when the guest stopped.
    """

    def __init__(self, volume: Volume, state: VolumeState, reason: str, unfinished: frozenset[int]) -> None:
        self._volume = volume
        self._geometry = volume.geometry
        self._inodes = Inodes(volume)
        self._state = state
        self._reason = reason
        self._unfinished = unfinished

    @property
    def info(self) -> VolumeInfo:
        """What the superblock says, and what became of the log."""
        geometry, state, reason = self._geometry, self._state, self._reason
        if geometry.needs_repair:
            state, reason = VolumeState.DIRTY, "xfs_repair was interrupted; the guest must run it again"
        return VolumeInfo("xfs", geometry.label, str(geometry.uuid), geometry.size_bytes, state, reason)

    @property
    def root(self) -> NodeId:
        """The root directory."""
        return _node(self._geometry.root_inode)

    def lookup(self, node: NodeId, name: bytes) -> DirEntry | None:
        """By the index of hashes, as the kernel does."""
        directory = self._directory(node)
        if name in (b".", b".."):
            return None
        found = directory.find(name)
        return None if found is None else _entry(found)

    def list(self, node: NodeId, cookie: int = 0) -> Iterator[DirEntry]:
        """In the order of the directory's blocks; a cookie is a place in them."""
        return map(_entry, self._directory(node).entries(cookie))

    def stat(self, node: NodeId) -> NodeStat:
        """From the inode alone."""
        inode = self._inode(node)
        is_device = inode.kind in (Kind.BLOCK_DEVICE, Kind.CHARACTER_DEVICE)
        major, minor = inode.device if is_device else (0, 0)
        return NodeStat(
            inode=inode.number,
            kind=inode.kind,
            mode=inode.mode,
            uid=inode.uid,
            gid=inode.gid,
            nlink=inode.nlink,
            size_bytes=inode.size_bytes,
            allocated_bytes=inode.blocks << self._geometry.block_log,
            mtime_ns=inode.mtime_ns,
            atime_ns=inode.atime_ns,
            ctime_ns=inode.ctime_ns,
            btime_ns=inode.btime_ns,
            rdev_major=major,
            rdev_minor=minor,
        )

    def read(self, node: NodeId, offset: int, length: int) -> bytes:
        """Each extent that is touched is one read of the source."""
        assert offset >= 0
        assert 0 <= length <= READ_BYTES_MAX
        inode = self._finished(self._inode(node, Kind.FILE))
        end = min(offset + length, inode.size_bytes)
        parts: list[bytes] = []
        position = offset
        if position >= end:
            return b""
        for extent in self._content(inode, offset):
            start = max(extent.start << self._geometry.block_log, offset)
            stop = min(extent.end << self._geometry.block_log, end)
            if start >= end:
                break
            parts.append(bytes(start - position))
            parts.append(self._read_extent(inode, extent, start, stop))
            position = stop
        parts.append(bytes(end - position))
        return b"".join(parts)

    def extents(self, node: NodeId, offset: int = 0) -> Iterator[FileExtent]:
        """Data where blocks are mapped and written; the end of the last is the file's size."""
        pieces = self._pieces(self._finished(self._inode(node, Kind.FILE)), offset)
        for is_data, group in groupby(pieces, key=lambda piece: piece.is_data):
            length = sum(piece.length for piece in group)
            yield FileExtent(offset, length, is_data)
            offset += length

    def readlink(self, node: NodeId) -> bytes:
        """From the inode, or from blocks of its own."""
        inode = self._inode(node, Kind.SYMLINK)
        size = inode.size_bytes
        if size > _TARGET_BYTES_MAX:
            raise GuestDamaged(f"inode {inode.number}: a symlink of {size} bytes is not possible")
        if inode.content.format == FORMAT_LOCAL:
            target = inode.content.data[:size]
        else:
            target = b"".join(self._target_parts(inode))
        if len(target) != size or b"\0" in target:
            raise GuestDamaged(f"inode {inode.number}: the symlink's target is cut off")
        return target

    def xattrs(self, node: NodeId) -> Iterator[Xattr]:
        """As the kernel shows them to root, but for the raw form of ACLs and the kernel's own parent pointers."""
        return attributes(self._volume, self._finished(self._inode(node)))

    def _inode(self, node: NodeId, kind: Kind | None = None) -> Inode:
        if len(node) != _NODE_BYTES:
            raise GuestWrongKind(f"{node!r} names no inode of XFS")
        inode = self._inodes.get(int.from_bytes(node, "big"))
        if kind is not None and inode.kind is not kind:
            raise GuestWrongKind(f"inode {inode.number} is {inode.kind.name.lower()}, not {kind.name.lower()}")
        return inode

    def _finished(self, inode: Inode) -> Inode:
        if inode.number in self._unfinished:
            raise GuestUnsupported(f"inode {inode.number}: a change of it was under way when the guest stopped")
        return inode

    def _directory(self, node: NodeId) -> Directory:
        return Directory(self._volume, self._inode(node, Kind.DIRECTORY))

    def _content(self, inode: Inode, offset: int) -> Iterator[Extent]:
        return extents(self._volume, inode, inode.content, offset >> self._geometry.block_log)

    def _read_extent(self, inode: Inode, extent: Extent, start: int, stop: int) -> bytes:
        if extent.is_unwritten:
            return bytes(stop - start)
        if inode.is_realtime:
            raise GuestUnsupported(f"inode {inode.number}: its content is on the realtime device")
        begin = self._geometry.offset_of(extent.block, extent.blocks) - (extent.start << self._geometry.block_log)
        return self._volume.source.read_at(begin + start, stop - start)

    def _pieces(self, inode: Inode, offset: int) -> Iterator[FileExtent]:
        """Extents and the holes between them, from ``offset`` to the file's size."""
        position, size, log = offset, inode.size_bytes, self._geometry.block_log
        for extent in self._content(inode, offset):
            start = max(extent.start << log, offset)
            if start >= size:
                break
            if start > position:
                yield FileExtent(position, start - position, is_data=False)
            position = min(extent.end << log, size)
            yield FileExtent(start, position - start, not extent.is_unwritten)
        if position < size:
            yield FileExtent(position, size - position, is_data=False)

    def _target_parts(self, inode: Inode) -> Iterator[bytes]:
        """A symlink's target by extents; with checksums each extent has one header."""
        left, done = inode.size_bytes, 0
        header_bytes = _TARGET_HEADER_BYTES if self._geometry.has_checksums else 0
        blocks_left = -(-left // (self._geometry.block_bytes - header_bytes))
        for _, extent in zip(range(_TARGET_EXTENTS_MAX), self._content(inode, 0), strict=False):
            count = min(extent.blocks, blocks_left)
            blocks_left -= count
            data = self._volume.metadata([(extent.block, count)], REMOTE_HEADER, inode.number, "symlink")
            part = data[header_bytes : header_bytes + left]
            if header_bytes and (
                not data.startswith(_TARGET_MAGIC)
                or data[4:12] != done.to_bytes(4, "big") + len(part).to_bytes(4, "big")
            ):
                raise GuestDamaged(f"inode {inode.number}: block {extent.block} is no part of its target")
            yield part
            done += len(part)
            left -= len(part)
            if not left or not blocks_left:
                return


def _node(number: int) -> NodeId:
    return NodeId(number.to_bytes(_NODE_BYTES, "big"))


def _entry(found: Entry) -> DirEntry:
    return DirEntry(found.name, _node(found.inode), found.kind, found.next)
