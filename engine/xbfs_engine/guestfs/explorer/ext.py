"""ext2, ext3 and ext4, with the journal replayed. A node is its inode number."""

from __future__ import annotations

import struct
import uuid
from typing import TYPE_CHECKING, Final

from fs_explorer.entry import EntryType
from fs_explorer.errors import CorruptDataError
from fs_explorer.filesystems.ext import FL_ENCRYPT, FL_INLINE_DATA, INCOMPAT_META_BG, ROOT_INO, ExtFS
from fs_explorer.tree import Node

from xbfs_engine.core.errors import GuestDamaged, GuestWrongKind
from xbfs_engine.guestfs import acl
from xbfs_engine.guestfs.base import XATTR_BYTES_MAX, Kind, NodeId, NodeStat, VolumeInfo, Xattr
from xbfs_engine.guestfs.explorer.library import VolumeBytes, encrypted, guarded, make_context
from xbfs_engine.guestfs.explorer.volume import ENTRY_KINDS, KINDS, ExplorerVolume, Found, Opened
from xbfs_engine.guestfs.ext.replay import replay

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fs_explorer.filesystems.ext import _Inode

    from xbfs_engine.formats.source import BlockSource

_SUPERBLOCK_OFFSET: Final = 1024
_LOG_BLOCK_AT: Final = 0x18
_LOG_CLUSTER_AT: Final = 0x1C
_BLOCKS_PER_GROUP_AT: Final = 0x20
_RO_COMPAT_AT: Final = 0x64
"""Fields of the superblock (super.rst)."""
_RO_COMPAT_BIGALLOC: Final = 0x200
_LOG_CLUSTER_MAX: Final = 20
"""Clusters have up to 2^29 bytes (EXT2_MAX_CLUSTER_LOG_SIZE), blocks at least 2^10; more is refused by groups' size."""

_ACL_VERSION: Final = 1


class _Tree(ExtFS):
    """The library's reader, which allocates what an attribute claims and takes groups of clusters for impossible."""

    def _parse_super(self, sb: bytes) -> None:
        """With bigalloc only bitmaps count in clusters; a group has as many blocks as its clusters hold."""
        group_blocks, _, group_inodes = struct.unpack_from("<3I", sb, _BLOCKS_PER_GROUP_AT)
        cluster = struct.unpack_from("<I", sb, _LOG_CLUSTER_AT)[0] - struct.unpack_from("<I", sb, _LOG_BLOCK_AT)[0]
        bigalloc = struct.unpack_from("<I", sb, _RO_COMPAT_AT)[0] & _RO_COMPAT_BIGALLOC
        if not bigalloc:
            super()._parse_super(sb)
            return
        if not 0 <= cluster <= _LOG_CLUSTER_MAX or group_blocks & (1 << cluster) - 1:
            raise CorruptDataError(f"ext: groups of {group_blocks} blocks in clusters of {1 << max(0, cluster)}")
        # The library checks the size of a group against that of a bitmap: it has as many bits as there are clusters.
        clusters = struct.pack("<I", group_blocks >> cluster)
        super()._parse_super(sb[:_BLOCKS_PER_GROUP_AT] + clusters + sb[_BLOCKS_PER_GROUP_AT + 4 :])
        self.blocks_per_group = group_blocks
        self.groups = -(-(self.blocks_count - self.first_data_block) // group_blocks)
        if self.inodes_count > self.groups * group_inodes:
            raise CorruptDataError("ext: there are more inodes than the groups hold")

    def _desc_block_no(self, idx: int) -> int:
        """With clusters and blocks of 1 KiB groups begin at block 0, although the superblock is in block 1."""
        number = super()._desc_block_no(idx)
        in_meta_group = self.incompat & INCOMPAT_META_BG and idx >= self.first_meta_bg
        shifted = self.bs == _SUPERBLOCK_OFFSET and not self.first_data_block and (idx == 0 or not in_meta_group)
        return number + shifted

    def _xattr_value(self, v: bytes | tuple[str, int, int]) -> bytes:
        if not isinstance(v, bytes) and v[2] > XATTR_BYTES_MAX:
            raise CorruptDataError(f"ext: an attribute of {v[2]} bytes in inode {v[1]}")
        return super()._xattr_value(v)


def open_ext(source: BlockSource) -> ExtVolume:
    """Opens the volume. GuestDamaged, GuestUnsupported: it can not be read as a whole."""
    replayed = replay(source)
    context = make_context()
    with guarded():
        volume = VolumeBytes(replayed.source, context.cache)
        tree = _Tree(volume, context)
        tree.root()
        return ExtVolume(
            tree,
            VolumeInfo(
                type=tree.format,
                label=tree.volume_label() or "",
                uuid=str(uuid.UUID(bytes=tree.uuid)) if any(tree.uuid) else "",
                size_bytes=tree.blocks_count * tree.bs,
                state=replayed.state,
                reason=replayed.reason,
            ),
        )


class ExtVolume(ExplorerVolume):
    """An ext filesystem as its guest would see it after a mount."""

    def __init__(self, tree: ExtFS, info: VolumeInfo) -> None:
        super().__init__(info, _id(ROOT_INO))
        self._tree = tree

    def _entries(self, node: NodeId) -> Iterator[Found]:
        inode = self._inode(node)
        if inode.type != EntryType.DIR:
            raise GuestWrongKind(f"inode {inode.ino} is no directory")
        _refuse_encrypted(inode)
        if inode.size > self._info.size_bytes:
            # Directories have no holes; one of 2^40 bytes that are all one block would be listed for hours.
            raise CorruptDataError(f"ext: directory {inode.ino} claims {inode.size} bytes")
        for name, number, file_type in self._tree._dirents(inode):
            yield Found(name, _id(number), ENTRY_KINDS.get(file_type, Kind.UNKNOWN))

    def _find(self, node: NodeId, name: bytes) -> Found | None:
        directory = Node("", EntryType.DIR, ref=_number(node))
        found = self._tree.lookup(directory, name.decode("utf-8", "surrogateescape"))
        # The library also finds names that are the same in another Unicode form or case.
        if found is None or found.name.encode("utf-8", "surrogateescape") != name:
            return None
        return Found(name, _id(found.ref), KINDS.get(found.type, Kind.UNKNOWN))

    def _stat(self, node: NodeId) -> NodeStat:
        inode = self._inode(node)
        kind = KINDS.get(inode.type)
        if kind is None:
            raise GuestDamaged(f"inode {inode.ino} has mode {inode.mode:#o}")
        if not inode.links:
            raise GuestDamaged(f"inode {inode.ino} is deleted")
        major, minor = _device(inode) if kind in (Kind.BLOCK_DEVICE, Kind.CHARACTER_DEVICE) else (0, 0)
        # As Linux counts what lies in the inode itself (ext4_getattr).
        inline = -(-inode.size // 512) if kind is Kind.FILE and inode.flags & FL_INLINE_DATA else 0
        return NodeStat(
            inode=inode.ino,
            kind=kind,
            mode=inode.mode & 0o7777,
            uid=inode.uid,
            gid=inode.gid,
            nlink=inode.links,
            size_bytes=inode.size if kind in (Kind.FILE, Kind.DIRECTORY, Kind.SYMLINK) else 0,
            allocated_bytes=(inode.blocks + inline) * 512,
            mtime_ns=inode.mtime,
            atime_ns=inode.atime,
            ctime_ns=inode.ctime,
            btime_ns=inode.btime,
            rdev_major=major,
            rdev_minor=minor,
        )

    def _open(self, node: NodeId) -> Opened:
        inode = self._inode(node)
        if inode.type != EntryType.FILE:
            raise GuestWrongKind(f"inode {inode.ino} is no file")
        _refuse_encrypted(inode)
        data = self._tree._data_ra(inode)
        if data.size != inode.size:
            raise GuestDamaged(f"inode {inode.ino} of {inode.size} bytes holds {data.size}")
        return Opened(data, data.data_ranges())

    def _readlink(self, node: NodeId) -> bytes:
        inode = self._inode(node)
        if inode.type != EntryType.SYMLINK:
            raise GuestWrongKind(f"inode {inode.ino} is no symlink")
        _refuse_encrypted(inode)
        return self._tree._symlink(inode).encode("utf-8", "surrogateescape")

    def _xattrs(self, node: NodeId) -> Iterator[Xattr]:
        for text, stored in self._tree._xattrs_raw(self._inode(node)).items():
            # What inline files and encryption keep for themselves; Linux does not show it either.
            if text == "system.data" or text.startswith("unknown"):
                continue
            name = text.encode("utf-8", "surrogateescape")
            value = self._tree._xattr_value(stored)
            yield Xattr(name, _acl(value) if name in (acl.ACCESS_NAME, acl.DEFAULT_NAME) else value)

    def _inode(self, node: NodeId) -> _Inode:
        return self._tree.inode(_number(node))


def _id(number: int) -> NodeId:
    return NodeId(number.to_bytes(4, "big"))


def _number(node: NodeId) -> int:
    return int.from_bytes(node, "big")


def _refuse_encrypted(inode: _Inode) -> None:
    if inode.flags & FL_ENCRYPT:
        raise encrypted(f"inode {inode.ino} is encrypted by fscrypt")


def _device(inode: _Inode) -> tuple[int, int]:
    """Old numbers stand in the first word of the block map, new ones in the second (ifork.rst)."""
    old, new = struct.unpack_from("<II", inode.i_block)
    if old:
        return old >> 8 & 0xFF, old & 0xFF
    return new >> 8 & 0xFFF, new & 0xFF | new >> 12 & 0xFFF00


def _acl(value: bytes) -> bytes:
    """From ext's layout, whose entries leave out ids that say nothing (ext4_acl_entry_short)."""
    if len(value) < 4 or int.from_bytes(value[:4], "little") != _ACL_VERSION:
        raise GuestDamaged("an access control list of an unknown version")
    at, entries = 4, []
    while at < len(value):
        if at + 4 > len(value):
            raise GuestDamaged("an access control list ends within an entry")
        tag, permissions = struct.unpack_from("<HH", value, at)
        at += 4
        who = acl.UNDEFINED_ID
        if tag in (acl.TAG_USER, acl.TAG_GROUP):
            if at + 4 > len(value):
                raise GuestDamaged("an access control list ends within an entry")
            who = int.from_bytes(value[at : at + 4], "little")
            at += 4
        if tag not in acl.TAGS:
            raise GuestDamaged(f"an access control list has a tag {tag:#x}")
        entries.append(acl.AclEntry(tag, permissions, who))
    return acl.encode(entries)
