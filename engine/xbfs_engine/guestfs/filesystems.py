"""Which reader opens which kind of filesystem."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from xbfs_engine.core.errors import GuestUnsupported
from xbfs_engine.guestfs.explorer.btrfs import open_btrfs
from xbfs_engine.guestfs.explorer.exfat import open_exfat
from xbfs_engine.guestfs.explorer.ext import open_ext
from xbfs_engine.guestfs.explorer.fat import open_fat
from xbfs_engine.guestfs.explorer.ntfs import open_ntfs
from xbfs_engine.guestfs.xfs.reader import open_xfs

if TYPE_CHECKING:
    from collections.abc import Callable

    from xbfs_engine.formats.source import BlockSource
    from xbfs_engine.guestfs.base import GuestFilesystem

_READERS: Final[dict[str, Callable[[BlockSource], GuestFilesystem]]] = {
    "btrfs": open_btrfs,
    "exfat": open_exfat,
    "ext2": open_ext,
    "ext3": open_ext,
    "ext4": open_ext,
    "ntfs": open_ntfs,
    "vfat": open_fat,
    "xfs": open_xfs,
}


def open_filesystem(kind: str, source: BlockSource) -> GuestFilesystem:
    """A reader of a volume of that kind, named as ``blkid`` does. Raises GuestUnsupported, GuestDamaged."""
    reader = _READERS.get(kind)
    if reader is None:
        raise GuestUnsupported(f"filesystems of type {kind} are not read here")
    return reader(source)
