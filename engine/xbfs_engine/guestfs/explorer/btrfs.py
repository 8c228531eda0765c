"""btrfs on one device, from its topmost subvolume. A node is a subvolume's number and an inode number in it.

The log tree is not replayed: a volume that has one is DIRTY.
"""

from __future__ import annotations

import struct
import uuid
import zlib
from bisect import bisect_left, bisect_right
from typing import TYPE_CHECKING, Final

import zstandard
from fs_explorer.codecs.crc32c import btrfs_name_hash
from fs_explorer.entry import EntryType
from fs_explorer.errors import CorruptDataError, UnsupportedFormatError
from fs_explorer.filesystems.btrfs.fs import (
    COMPRESS_ZLIB,
    COMPRESS_ZSTD,
    DIR_INDEX,
    DIR_ITEM,
    EMPTY_SUBVOL_DIR_OBJECTID,
    FS_TREE_OBJECTID,
    INODE_ITEM,
    MAX_COMPRESSED_EXTENT,
    ROOT_ITEM,
    BtrfsFS,
    _dir_entries,
    _parse_inode,
)
from fs_explorer.filesystems.btrfs.super import INCOMPAT_ZONED
from fs_explorer.tree import Node

from xbfs_engine.core.errors import GuestDamaged, GuestWrongKind
from xbfs_engine.guestfs.base import Kind, NodeId, NodeStat, VolumeInfo, VolumeState, Xattr
from xbfs_engine.guestfs.explorer.btrfs_checked import checked
from xbfs_engine.guestfs.explorer.library import VolumeBytes, guarded, make_context
from xbfs_engine.guestfs.explorer.volume import ENTRY_KINDS, KINDS, ExplorerVolume, Found, Opened

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fs_explorer.filesystems.btrfs.btree import BNode
    from fs_explorer.filesystems.btrfs.fs import _Inode
    from fs_explorer.tree import Context

    from xbfs_engine.formats.source import BlockSource

_ROOT_REF: Final = 156
_ROOT_REF_HEAD: Final = struct.Struct("<QQH")
"""Directory, sequence, length of the name that follows (btrfs_root_ref)."""


def open_btrfs(source: BlockSource) -> BtrfsVolume:
    """Opens the volume. GuestDamaged, GuestUnsupported: it can not be read as a whole."""
    context = make_context()
    with guarded():
        tree = _Tree(VolumeBytes(source, context.cache), context)
        sb = tree.sb
        if sb.incompat_flags & INCOMPAT_ZONED:
            raise UnsupportedFormatError("btrfs", "a filesystem of zones is not read")
        state, reason = VolumeState.CLEAN, ""
        if sb.log_root:
            state = VolumeState.DIRTY
            reason = (
                "changes that programs had synced since the last commit (30 seconds at most by default) are missing"
            )
        tree.inode(FS_TREE_OBJECTID, tree.subvol_root(FS_TREE_OBJECTID)[1])
        return BtrfsVolume(
            tree,
            VolumeInfo(
                type="btrfs",
                label=sb.label,
                uuid=str(uuid.UUID(bytes=sb.fsid)),
                size_bytes=sb.total_bytes,
                state=state,
                reason=reason,
            ),
        )


class BtrfsVolume(ExplorerVolume):
    """All subvolumes of a btrfs; snapshots of snapshots are empty directories, as they are for Linux."""

    def __init__(self, tree: BtrfsFS, info: VolumeInfo) -> None:
        super().__init__(info, _id(FS_TREE_OBJECTID, tree.subvol_root(FS_TREE_OBJECTID)[1]))
        self._tree = tree

    @property
    def default_subvolume(self) -> NodeId:
        """The directory that is mounted when no subvolume is named."""
        with guarded():
            return _id(self._tree.default_subvol, self._tree.subvol_root(self._tree.default_subvol)[1])

    def subvolume(self, number: int) -> NodeId:
        """The topmost directory of a subvolume, as the mount option ``subvolid`` names it."""
        with guarded():
            return _id(number, self._tree.subvol_root(number)[1])

    def _entries(self, node: NodeId) -> Iterator[Found]:
        subvolume, number = _numbers(node)
        if self._inode(node).type != EntryType.DIR:
            raise GuestWrongKind(f"inode {number} of subvolume {subvolume} is no directory")
        if number == EMPTY_SUBVOL_DIR_OBJECTID:
            return
        top, _ = self._tree.subvol_root(subvolume)
        for _, item in self._tree.trees.iter_range(top, number, DIR_INDEX):
            for location, file_type, name, _ in _dir_entries(item):
                yield self._found(node, name, location, file_type)

    def _find(self, node: NodeId, name: bytes) -> Found | None:
        subvolume, number = _numbers(node)
        top, _ = self._tree.subvol_root(subvolume)
        item = self._tree.trees.get(top, (number, DIR_ITEM, btrfs_name_hash(name)))
        for location, file_type, stored, _ in _dir_entries(item or b""):
            if stored == name:
                return self._found(node, name, location, file_type)
        return None

    def _found(self, node: NodeId, name: bytes, location: tuple[int, int, int], file_type: int) -> Found:
        subvolume, number = _numbers(node)
        if location[1] == INODE_ITEM:
            return Found(name, _id(subvolume, location[0]), ENTRY_KINDS.get(file_type, Kind.UNKNOWN))
        if location[1] != ROOT_ITEM:
            raise CorruptDataError(f"a directory entry of inode {number} of subvolume {subvolume} leads nowhere")
        # In a snapshot the entries of subvolumes were copied, but those are not in it (fixup_tree_root_location).
        child = location[0]
        reference = self._tree.trees.get(self._tree.sb.root, (subvolume, _ROOT_REF, child))
        if reference is None or len(reference) < _ROOT_REF_HEAD.size:
            return Found(name, _id(subvolume, EMPTY_SUBVOL_DIR_OBJECTID), Kind.DIRECTORY)
        directory, _, length = _ROOT_REF_HEAD.unpack_from(reference)
        if (directory, reference[_ROOT_REF_HEAD.size :][:length]) != (number, name):
            return Found(name, _id(subvolume, EMPTY_SUBVOL_DIR_OBJECTID), Kind.DIRECTORY)
        return Found(name, _id(child, self._tree.subvol_root(child)[1]), Kind.DIRECTORY)

    def _stat(self, node: NodeId) -> NodeStat:
        subvolume, number = _numbers(node)
        inode = self._inode(node)
        kind = KINDS.get(inode.type)
        if kind is None:
            raise GuestDamaged(f"inode {number} of subvolume {subvolume} has mode {inode.mode:#o}")
        device = kind in (Kind.BLOCK_DEVICE, Kind.CHARACTER_DEVICE)
        return NodeStat(
            inode=number if subvolume == FS_TREE_OBJECTID else (number ^ subvolume << 40) & (1 << 64) - 1,
            kind=kind,
            mode=inode.mode & 0o7777,
            uid=inode.uid,
            gid=inode.gid,
            nlink=inode.nlink,
            size_bytes=inode.size if kind in (Kind.FILE, Kind.DIRECTORY, Kind.SYMLINK) else 0,
            allocated_bytes=inode.nbytes + -inode.nbytes % self._tree.sb.sectorsize,
            mtime_ns=inode.mtime,
            atime_ns=inode.atime,
            ctime_ns=inode.ctime,
            btime_ns=inode.otime,
            # As in the kernel's memory: 12 bits and 20.
            rdev_major=inode.rdev >> 20 & 0xFFF if device else 0,
            rdev_minor=inode.rdev & 0xFFFFF if device else 0,
        )

    def _open(self, node: NodeId) -> Opened:
        data = self._tree.open_file(Node("", EntryType.FILE, ref=_numbers(node)))
        assert not callable(getattr(data, "open", None))
        return Opened(data, data.data_ranges())  # type: ignore[union-attr, arg-type]

    def _readlink(self, node: NodeId) -> bytes:
        subvolume, number = _numbers(node)
        if self._inode(node).type != EntryType.SYMLINK:
            raise GuestWrongKind(f"inode {number} of subvolume {subvolume} is no symlink")
        return self._tree._symlink(subvolume, number).encode("utf-8", "surrogateescape")

    def _xattrs(self, node: NodeId) -> Iterator[Xattr]:
        if _numbers(node)[1] == EMPTY_SUBVOL_DIR_OBJECTID:
            return
        for name, value in self._tree.xattrs(Node("", EntryType.OTHER, ref=_numbers(node))).items():
            # btrfs.* are its own properties, which Linux shows as they are; access control lists are in its layout.
            yield Xattr(name.encode("utf-8", "surrogateescape"), value)

    def _inode(self, node: NodeId) -> _Inode:
        return self._tree.inode(*_numbers(node))


def _id(subvolume: int, number: int) -> NodeId:
    return NodeId(subvolume.to_bytes(8, "big") + number.to_bytes(8, "big"))


def _numbers(node: NodeId) -> tuple[int, int]:
    return int.from_bytes(node[:8], "big"), int.from_bytes(node[8:], "big")


class _Tree(BtrfsFS):
    """The library's reader that checks what it reads, with a zstd that is not in Python."""

    def __init__(self, ra: VolumeBytes, ctx: Context) -> None:
        super().__init__(ra, ctx)
        # What was read so far, unchecked, is read again: nodes are cached by the token of their trees.
        self.trees, self.lra = checked(self)
        self.trees.node(self.sb.root, self.sb.root_level)
        self._last: tuple[int, BNode] | None = None

    def inode(self, tree_id: int, ino: int) -> _Inode:
        """An inode, looked for first in the leaf of the one before: a directory's files mostly lie side by side."""
        key = (ino, INODE_ITEM, 0)
        if self._last is not None and self._last[0] == tree_id:
            keys = self._last[1].keys
            if keys[0] <= key <= keys[-1]:
                return self._inode_in(self._last[1], key, tree_id)
        leaf = self.trees.node(self.subvol_root(tree_id)[0])
        while leaf.level:
            leaf = self.trees.node(leaf.ptrs[max(0, bisect_right(leaf.keys, key) - 1)], leaf.level - 1)
        if leaf.keys:
            self._last = tree_id, leaf
        return self._inode_in(leaf, key, tree_id)

    def _inode_in(self, leaf: BNode, key: tuple[int, int, int], tree_id: int) -> _Inode:
        index = bisect_left(leaf.keys, key)
        if index < len(leaf.keys) and leaf.keys[index] == key:
            return _parse_inode(leaf.item(index))
        return super().inode(tree_id, key[0])  # the empty directory of a subvolume that is not there, or nothing

    def decompress(self, comp: int, raw: bytes, ram_bytes: int) -> bytes:
        if comp not in (COMPRESS_ZLIB, COMPRESS_ZSTD):
            return super().decompress(comp, raw, ram_bytes)
        if ram_bytes > MAX_COMPRESSED_EXTENT:
            raise CorruptDataError(f"btrfs: a compressed extent of {ram_bytes} bytes")
        if comp == COMPRESS_ZLIB:
            inflate = zlib.decompressobj()
            out = inflate.decompress(raw, ram_bytes)
            whole = inflate.eof
        else:
            # Decoded piece by piece: what the frame claims to hold is not believed.
            reader = zstandard.ZstdDecompressor(max_window_size=MAX_COMPRESSED_EXTENT).stream_reader(raw)
            out = reader.read(ram_bytes)
            claimed = zstandard.get_frame_parameters(raw).content_size
            whole = len(out) == claimed or claimed == zstandard.CONTENTSIZE_UNKNOWN
        if len(out) < ram_bytes and not whole:
            raise CorruptDataError("btrfs: a compressed extent ends early")
        return out.ljust(ram_bytes, b"\0")
