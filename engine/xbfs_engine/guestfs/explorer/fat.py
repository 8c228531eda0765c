"""FAT12, FAT16 and FAT32. A node is the place of its directory entry: first cluster of the directory, and a number.

Times are the guest's local time, shown as if it were UTC; FAT knows no owners.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final

from fs_explorer.entry import EntryType
from fs_explorer.errors import CorruptDataError
from fs_explorer.filesystems.fat import (
    _DIRENT,
    ATTR_DIR,
    ATTR_LFN,
    ATTR_VOLUME,
    MAX_DIR_BYTES,
    FATTree,
    _Ref,
    parse_bpb,
)

from xbfs_engine.core.errors import GuestDamaged, GuestWrongKind
from xbfs_engine.guestfs.base import Kind, NodeId, NodeStat, VolumeInfo, VolumeState
from xbfs_engine.guestfs.explorer.library import VolumeBytes, guarded, make_context
from xbfs_engine.guestfs.explorer.volume import ExplorerVolume, Found, Opened, plain_stat, wtf8

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fs_explorer.filesystems.fat import BPB
    from fs_explorer.tree import Node

    from xbfs_engine.formats.source import BlockSource

_ENTRY_BYTES: Final = 32
_ROOT: Final = NodeId(b"\xff" * 8)
_ROOT_INODE: Final = 1
_ENTRIES_MAX: Final = MAX_DIR_BYTES // _ENTRY_BYTES

_CLEAN_BITS: Final = {16: 0x8000, 32: 0x0800_0000}
"""Of the entry of cluster 1: set while it is not mounted (Microsoft's specification 1.03, "FAT[1]"). FAT12 has none."""


def open_fat(source: BlockSource) -> FatVolume:
    """Opens the volume. GuestDamaged: it can not be read as a whole."""
    context = make_context()
    with guarded():
        volume = VolumeBytes(source, context.cache)
        boot = volume.read_exact(0, 512)
        bpb = parse_bpb(boot)
        if bpb is None:
            raise CorruptDataError("fat: no boot sector")
        tree = FATTree(volume, bpb, context)
        dirty = _dirty(tree, boot)
        serial = struct.unpack_from("<I", boot, 67 if bpb.fat_bits == 32 else 39)[0]
        return FatVolume(
            tree,
            VolumeInfo(
                type="vfat",
                label=tree.volume_label() or "",
                uuid=f"{serial >> 16:04X}-{serial & 0xFFFF:04X}",
                size_bytes=bpb.total * bpb.bps,
                state=VolumeState.DIRTY if dirty else VolumeState.CLEAN,
                reason="it was mounted: what the guest had not written yet is missing" if dirty else "",
            ),
        )


def _dirty(tree: FATTree, boot: bytes) -> bool:
    bpb: BPB = tree.bpb
    # Linux and Windows also set the lowest bit of BS_Reserved1.
    if boot[65 if bpb.fat_bits == 32 else 37] & 1:
        return True
    clean = _CLEAN_BITS.get(bpb.fat_bits)
    return clean is not None and not tree.next_cluster(1) & clean


class FatVolume(ExplorerVolume):
    """A FAT filesystem with its long names."""

    def __init__(self, tree: FATTree, info: VolumeInfo) -> None:
        super().__init__(info, _ROOT)
        self._tree = tree

    def _entries(self, node: NodeId) -> Iterator[Found]:
        directory = self._node(node).ref
        if not directory.is_dir:
            raise GuestWrongKind("no directory")
        for offset, name, _, fields in self._tree._scan(self._tree._dir_bytes(directory), 0):
            if not fields[1] & ATTR_VOLUME and name not in (".", ".."):
                kind = Kind.DIRECTORY if fields[1] & ATTR_DIR else Kind.FILE
                yield Found(wtf8(name), _id(directory.cluster, offset // _ENTRY_BYTES), kind)

    def _stat(self, node: NodeId) -> NodeStat:
        found = self._node(node)
        inode = _ROOT_INODE
        if node != _ROOT:
            inode = 2 + int.from_bytes(node[:4], "big") * _ENTRIES_MAX + int.from_bytes(node[4:], "big")
        return plain_stat(found, inode)

    def _open(self, node: NodeId) -> Opened:
        return Opened(self._tree.open_file(self._node(node)), None)  # type: ignore[arg-type]

    def _node(self, node: NodeId) -> Node:
        if node == _ROOT:
            return self._tree.root()
        cluster, index = int.from_bytes(node[:4], "big"), int.from_bytes(node[4:], "big")
        entries = self._tree._dir_bytes(_Ref(cluster, 0, is_dir=True))
        at = index * _ENTRY_BYTES
        if at + _ENTRY_BYTES > len(entries) or entries[at] in (0, 0xE5) or entries[at + 11] & 0x3F == ATTR_LFN:
            raise GuestDamaged(f"fat: no entry {index} in the directory at cluster {cluster}")
        found = self._tree._node("", _DIRENT.unpack_from(entries, at))
        if found.type == EntryType.DIR and not found.ref.cluster:
            raise GuestDamaged("fat: a directory without clusters")
        return found


def _id(cluster: int, index: int) -> NodeId:
    return NodeId(cluster.to_bytes(4, "big") + index.to_bytes(4, "big"))
