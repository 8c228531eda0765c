"""What is read of one file of a guest: metadata, extents, content. Keeps nothing; one thread."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from xbfs_engine.core.errors import GuestDamaged, GuestError
from xbfs_engine.guestfs.base import READ_BYTES_MAX, FileExtent, Kind
from xbfs_engine.restore.files.records import Meta

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from xbfs_engine.guestfs.base import NodeStat, Xattr
    from xbfs_engine.restore.files.records import Account
    from xbfs_engine.restore.files.view import Item, View

HOLES_FROM_BYTES: Final = 4096
"""Smaller files have no holes worth asking for."""
_STREAMS: Final = b"user.ntfs.streams"
"""Where the reader of NTFS names the streams that are no attributes: they are too long, or encrypted."""


class Reader:
    """Reads files of one view. ``umask``: of modes of files that have none."""

    def __init__(self, view: View, account: Account, *, umask: int, with_xattrs: bool) -> None:
        self._view = view
        self._guest = view.guest
        self._account = account
        self._umask = umask
        self._with_xattrs = with_xattrs

    def known(self, item: Item) -> tuple[Item, NodeStat]:
        """The file with its metadata. Raises GuestError if it can not be read."""
        stat = item.stat
        if stat is None:
            stat = self._guest.stat(*item.spot)
            if Kind.DIRECTORY in (stat.kind, item.kind) and stat.kind is not item.kind:
                raise GuestDamaged("the directory entry and the file do not agree on what it is")
            item = item._replace(stat=stat, kind=stat.kind)
        return item, stat

    def meta(self, item: Item, stat: NodeStat, *, with_xattrs: bool = True) -> Meta:
        """What is restored of it beside its content."""
        mode, owner = stat.mode, (stat.uid, stat.gid)
        ownerless = self._view.is_ownerless(item.volume)
        if ownerless:
            mode = 0o777 if stat.kind is Kind.DIRECTORY else 0o666
            if not stat.mode & 0o222:
                mode &= ~0o222
            mode &= ~self._umask
        return Meta(
            path=item.path,
            kind=stat.kind,
            mode=mode,
            owner=None if ownerless else owner,
            size_bytes=stat.size_bytes,
            mtime_ns=stat.mtime_ns,
            atime_ns=stat.mtime_ns if stat.atime_ns is None else stat.atime_ns,
            device=(stat.rdev_major, stat.rdev_minor),
            xattrs=self._xattrs(item) if with_xattrs and self._with_xattrs else (),
        )

    def extents(self, item: Item, stat: NodeStat) -> Iterator[FileExtent]:
        """Data and holes up to the size; a file without holes, as far as its metadata tells, is one extent."""
        size = stat.size_bytes
        if size <= HOLES_FROM_BYTES or stat.allocated_bytes >= size:
            if size:
                yield FileExtent(0, size, is_data=True)
            return
        at = 0
        while at < size:
            page = self._guest.extents(*item.spot, at)
            for offset, length, is_data in page.extents:
                end = min(offset + length, size)
                if end > at:
                    yield FileExtent(at, end - at, is_data)
                    at = end
            if page.is_last or not page.extents:
                break
        if at < size:
            raise GuestDamaged(f"the map of the file ends at {at} of its {size} bytes")

    def pieces(self, item: Item, extent: FileExtent) -> Iterator[tuple[int, bytes]]:
        """An extent's content with its offsets. Raises GuestDamaged if the file is shorter."""
        at, end = extent.offset, extent.offset + extent.length
        while at < end:
            data = self._guest.read(*item.spot, at, min(READ_BYTES_MAX, end - at))
            if not data:
                raise GuestDamaged(f"the file ends at {at}, before its size")
            yield at, data
            at += len(data)

    def target(self, item: Item) -> bytes:
        """Where a symlink leads, as it is stored."""
        return self._guest.readlink(*item.spot)

    def _xattrs(self, item: Item) -> Sequence[Xattr]:
        if not self._view.has_xattrs(item.volume):
            return ()
        try:
            found = self._guest.xattrs(*item.spot)
        except GuestError as exc:
            self._account.lose(f"extended attributes, which can not be read: {exc.message}", item.path)
            return ()
        if any(xattr.name == _STREAMS for xattr in found):
            self._account.lose("NTFS streams that are long or encrypted: ask for them as FILE:STREAM", item.path)
        return found
