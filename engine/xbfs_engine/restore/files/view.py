"""A guest's files as one tree: a volume for itself, or the guest's own tree with its mounts.

Owns what lies where; patterns are ``paths``'s. Keeps nothing that grows. One thread.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final, NamedTuple

from xbfs_engine.core.errors import GuestDamaged, GuestError, GuestNotFound, GuestUnsupported
from xbfs_engine.guestfs.base import Kind, NodeId
from xbfs_engine.guestfs.volumes import VolumeStatus

if TYPE_CHECKING:
    from collections.abc import Iterator

    from xbfs_engine.guestfs.base import NodeStat
    from xbfs_engine.guestfs.guest import Guest, Listed

OWNERLESS: Final = frozenset(("ntfs", "vfat", "exfat"))
"""Filesystems that know no owners in the sense of Unix, and take capitals and small letters for the same."""

_LINKS_MAX: Final = 40
"""Links in one path (Linux: MAXSYMLINKS)."""
_STEPS_MAX: Final = 4096
_NOWHERE: Final = NodeId(b"")
_WINDOWS_TARGET: Final = b"user.ntfs.target"
_DRIVE: Final = re.compile(rb"(?:\\(?:\\|\?)\?\\)?([A-Za-z]:)(?:[\\/]|\Z)")


class Item(NamedTuple):
    """A file of any kind, where it is."""

    name: bytes
    path: bytes
    """As the guest shows it: absolute."""
    volume: str
    """Empty for the topmost directory of Windows, which holds drives and is on none of them."""
    node: NodeId
    kind: Kind
    stat: NodeStat | None
    """None if its metadata can not be read."""
    above: Item | None

    @property
    def spot(self) -> tuple[str, NodeId]:
        """What it is, wherever it lies."""
        return self.volume, self.node

    def lies_in_itself(self) -> bool:
        """Whether it is one of the directories it is in: then there is no end below it."""
        up = self.above
        while up is not None:
            if up.volume == self.volume and up.node == self.node:
                return True
            up = up.above
        return False


class View:
    """One volume if it is named, else the tree as the guest puts it together.

    Raises GuestNotFound, with the volumes there are, if there is no such volume or no such tree.
    """

    def __init__(self, guest: Guest, volume: str | None = None) -> None:
        self.guest = guest
        rows = guest.volumes().rows
        self._ownerless = frozenset(row.name for row in rows if row.kind in OWNERLESS)
        self._without_xattrs = frozenset(row.name for row in rows if row.kind in {"vfat", "exfat"})
        self._over: dict[tuple[str, NodeId], tuple[str, NodeId]] = {}
        self._more: dict[bytes, tuple[str, NodeId]] = {}
        if volume is not None:
            self.top = self._item(b"", volume, guest.root(volume), None)
            self.is_windows = volume in self._ownerless
            return
        tree = guest.tree()
        if not tree.mounts:
            files = (f"{row.name} ({row.kind})" for row in rows if row.status is VolumeStatus.FILESYSTEM)
            raise GuestNotFound(
                f"the guest's own tree is not known: {'; '.join(tree.notes) or 'no reason is told'}",
                hint=f"name one of its volumes with --volume: {', '.join(files) or 'none can be read'}",
            )
        self.is_windows = tree.kind == "windows"
        first = None if self.is_windows else tree.mounts[0]
        for mount in tree.mounts if first is None else tree.mounts[1:]:
            if mount.over is None:
                self._more[mount.path[1:]] = (mount.volume, mount.node)
            else:
                self._over[mount.over] = (mount.volume, mount.node)
        if first is None:
            self.top = Item(b"", b"/", "", _NOWHERE, Kind.DIRECTORY, None, None)
        else:
            self.top = self._item(b"", first.volume, first.node, None)

    def is_ownerless(self, volume: str) -> bool:
        """Whether its files have no owner and no mode; names are then looked for without regard to case, too."""
        return volume in self._ownerless or not volume

    def has_xattrs(self, volume: str) -> bool:
        """Whether its files can have any."""
        return volume not in self._without_xattrs

    def entries(self, directory: Item) -> Iterator[Item]:
        """What is in a directory, page by page. An error comes after the entries before it. Raises GuestError …"""
        if directory.volume:
            cookie = 0
            while True:
                page = self.guest.list(*directory.spot, cookie)
                for listed in page.entries:
                    yield self._shown(directory, listed)
                if page.is_last:
                    break
                if not page.entries or page.entries[-1].entry.cookie == cookie:
                    raise GuestDamaged("the listing does not go on")
                cookie = page.entries[-1].entry.cookie
        if directory.above is None:
            for name, spot in self._more.items():
                yield self._item(name, *spot, directory)

    def lookup(self, directory: Item, name: bytes) -> Item | None:
        """The entry of exactly that name, or None."""
        listed = self.guest.lookup(*directory.spot, name) if directory.volume else None
        if listed is not None:
            return self._shown(directory, listed)
        spot = self._more.get(name) if directory.above is None else None
        return None if spot is None else self._item(name, *spot, directory)

    def followed(self, link: Item) -> Item | None:
        """What a symlink leads to within the guest, None if to nothing. Raises GuestUnsupported for too many links."""
        links = steps = 0
        at: Item | None = link
        waiting: list[bytes] = []
        while at is not None:
            if at.kind is Kind.SYMLINK:
                links += 1
                if links > _LINKS_MAX:
                    raise GuestUnsupported("too many symlinks lead to one another")
                target = self.guest.readlink(*at.spot)
                waiting += reversed(target.split(b"/"))
                at = self._origin(at) if target.startswith(b"/") else at.above
                continue
            name = waiting.pop() if waiting else None
            if name is None:
                return at
            steps += 1
            if at.kind is not Kind.DIRECTORY or steps > _STEPS_MAX:
                return None
            if name == b"..":
                at = at.above or at
            elif name not in (b"", b"."):
                at = self.lookup(at, name)
        return None

    def _origin(self, link: Item) -> Item | None:
        """Where an absolute target begins: at the top, but on Windows at a drive."""
        if self.top.volume:
            return self.top
        for xattr in self.guest.xattrs(*link.spot):
            drive = _DRIVE.match(xattr.value) if xattr.name == _WINDOWS_TARGET else None
            if drive is not None:
                return self.lookup(self.top, drive[1].upper())
        return next((item for item in self.entries(self.top) if item.volume == link.volume), None)

    def _shown(self, directory: Item, listed: Listed) -> Item:
        entry, stat = listed
        over = self._over.get((directory.volume, entry.node))
        if over is not None:
            return self._item(entry.name, *over, directory)
        path = _below(directory, entry.name)
        kind = entry.kind if stat is None else stat.kind
        return Item(entry.name, path, directory.volume, entry.node, kind, stat, directory)

    def _item(self, name: bytes, volume: str, node: NodeId, above: Item | None) -> Item:
        """The topmost directory of a volume, or what a guest has mounted."""
        try:
            stat = self.guest.stat(volume, node)
        except GuestError:
            stat = None
        path = b"/" if above is None else _below(above, name)
        return Item(name, path, volume, node, Kind.DIRECTORY, stat, above)


def _below(directory: Item, name: bytes) -> bytes:
    return b"/" + name if directory.above is None else directory.path + b"/" + name
