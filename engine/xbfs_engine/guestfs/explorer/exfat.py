"""exFAT. A node is the place of its directory entry: where the directory lies, and a number.

Times without a zone are shown as if they were UTC; exFAT knows no owners.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final

from fs_explorer.errors import CorruptDataError
from fs_explorer.filesystems.exfat import ExFATTree, _Ref, _set_at, parse_boot

from xbfs_engine.core.errors import GuestWrongKind
from xbfs_engine.guestfs.base import Kind, NodeId, NodeStat, VolumeInfo, VolumeState
from xbfs_engine.guestfs.explorer.library import VolumeBytes, guarded, make_context
from xbfs_engine.guestfs.explorer.volume import ExplorerVolume, Found, Opened, plain_stat, wtf8

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fs_explorer.tree import Node

    from xbfs_engine.formats.source import BlockSource

_ENTRY_BYTES: Final = 32
_FILE_ENTRY: Final = 0x85
_IN_USE: Final = 0x80
_VOLUME_DIRTY: Final = 0x2
"""VolumeFlags (Microsoft's exFAT specification, 3.1.13.2)."""

_PLACE: Final = struct.Struct(">IQ?I")
"""First cluster, length and contiguity of the directory; number of the entry."""
_ROOT: Final = NodeId(b"\xff" * _PLACE.size)
_ROOT_INODE: Final = 1
_ENTRIES_MAX: Final = (256 << 20) // _ENTRY_BYTES
"""Of a directory (7.1)."""


def open_exfat(source: BlockSource) -> ExfatVolume:
    """Opens the volume. GuestDamaged: it can not be read as a whole."""
    context = make_context()
    with guarded():
        volume = VolumeBytes(source, context.cache)
        raw = volume.read_exact(0, 512)
        boot = parse_boot(raw)
        if boot is None:
            raise CorruptDataError("exfat: no boot sector")
        tree = ExFATTree(volume, boot, context)
        sectors, flags = struct.unpack_from("<Q", raw, 72)[0], struct.unpack_from("<H", raw, 106)[0]
        dirty = bool(flags & _VOLUME_DIRTY)
        tree.root()
        return ExfatVolume(
            tree,
            VolumeInfo(
                type="exfat",
                label=tree.volume_label() or "",
                uuid=f"{boot.serial >> 16:04X}-{boot.serial & 0xFFFF:04X}",
                size_bytes=sectors * boot.bps,
                state=VolumeState.DIRTY if dirty else VolumeState.CLEAN,
                reason="it was mounted: what the guest had not written yet is missing" if dirty else "",
            ),
        )


class ExfatVolume(ExplorerVolume):
    """An exFAT filesystem."""

    def __init__(self, tree: ExFATTree, info: VolumeInfo) -> None:
        super().__init__(info, _ROOT)
        self._tree = tree

    def _entries(self, node: NodeId) -> Iterator[Found]:
        directory: _Ref = self._node(node).ref
        if not directory.is_dir:
            raise GuestWrongKind("no directory")
        damaged = 0
        for index, entries in self._sets(directory):
            found = self._tree._node(entries)
            if found is None:
                damaged += 1
                continue
            kind = Kind.DIRECTORY if found.ref.is_dir else Kind.FILE
            place = _PLACE.pack(directory.cluster, directory.size, directory.contiguous, index)
            yield Found(wtf8(found.name), NodeId(place), kind)
        if damaged:
            raise CorruptDataError(f"exfat: {damaged} entries of a directory have wrong checksums")

    def _sets(self, directory: _Ref) -> Iterator[tuple[int, memoryview]]:
        data = memoryview(self._tree._dir_bytes(directory))
        count = len(data) // _ENTRY_BYTES
        index = 0
        while index < count and data[index * _ENTRY_BYTES]:
            kind = data[index * _ENTRY_BYTES]
            entries = _set_at(data, index, count)
            if kind == _FILE_ENTRY:
                yield index, entries
            index += len(entries) // _ENTRY_BYTES if kind & _IN_USE else 1

    def _stat(self, node: NodeId) -> NodeStat:
        inode = _ROOT_INODE
        if node != _ROOT:
            cluster, _, _, index = _PLACE.unpack(node)
            inode = 2 + cluster * _ENTRIES_MAX + index
        return plain_stat(self._node(node), inode)

    def _open(self, node: NodeId) -> Opened:
        data = self._tree.open_file(self._node(node))
        return Opened(data, data.data_ranges())  # type: ignore[union-attr, arg-type]

    def _node(self, node: NodeId) -> Node:
        if node == _ROOT:
            return self._tree.root()
        cluster, size, contiguous, index = _PLACE.unpack(node)
        data = memoryview(self._tree._dir_bytes(_Ref(cluster, size, size, contiguous, is_dir=True)))
        count = len(data) // _ENTRY_BYTES
        if index >= count or data[index * _ENTRY_BYTES] != _FILE_ENTRY:
            raise CorruptDataError(f"exfat: no entry {index} in the directory at cluster {cluster}")
        found = self._tree._node(_set_at(data, index, count))
        if found is None:
            raise CorruptDataError(f"exfat: entry {index} in the directory at cluster {cluster} is damaged")
        return found
