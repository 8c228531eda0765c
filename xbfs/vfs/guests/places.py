"""What the kernel knows of guests' files: inode numbers, and what each stands for. For the event loop's thread.

A number has bits 62 and 61 set and a hash below them, so it is the same at every mount. A file's number is that of
its node: all its names share it. A directory's number, and that of a symlink, depends on the directory it is in, too:
the kernel then has exactly one path for it, so that its depth, which decides where links may lead, is certain even if
a hostile volume names one directory twice.

The table holds what the kernel knows: about 300 bytes for each file it has in its cache, given back by ``forget``.
"""

from __future__ import annotations

from enum import IntEnum
from itertools import count
from typing import TYPE_CHECKING, Final

from blake3 import blake3

from xbfs_engine.guestfs.base import Kind

if TYPE_CHECKING:
    from collections.abc import Iterator

    from xbfs.vfs.guests.point import PointGuest
    from xbfs_engine.guestfs.base import NodeId

TAG: Final = 3 << 61
_HASH_MASK: Final = (1 << 61) - 1
_INODE_BYTES: Final = 8
_TEXT: Final = b"text"


class View(IntEnum):
    """Where a guest's files are shown. Numbers are part of inode numbers: never reused."""

    FILES = 0
    """Each volume for itself, in `files/`."""
    ROOT = 1
    """As the guest puts them together, in `root/`."""


class VolumeView:
    """A volume of a point in one view."""

    __slots__ = ("guest", "name", "seed", "view")

    def __init__(self, guest: PointGuest, view: View, name: str) -> None:
        self.guest = guest
        self.view = view
        self.name = name
        self.seed = blake3(f"{guest.point.id}/{view.value}/{name}".encode(errors="surrogatepass")).digest()


class Known:
    """What an inode number stands for; ``lookups`` is how often the kernel was told of it and has not forgotten it."""

    __slots__ = ("inode", "lookups")

    def __init__(self, inode: int) -> None:
        self.inode = inode
        self.lookups = 0


class Top(Known):
    """`files/` or `root/` itself; its number is the tree's, and it is not in the table."""

    __slots__ = ("guest", "view")

    def __init__(self, inode: int, guest: PointGuest, view: View) -> None:
        super().__init__(inode)
        self.guest = guest
        self.view = view


class VolumeText(Known):
    """`files/<volume>.json`."""

    __slots__ = ("volume",)

    def __init__(self, inode: int, volume: VolumeView) -> None:
        super().__init__(inode)
        self.volume = volume

    @property
    def guest(self) -> PointGuest:
        """Whose it is."""
        return self.volume.guest


class Node(Known):
    """A file or directory of a guest. ``node`` is empty for the topmost directory of a volume in `files/`.

    Directories have their ``name`` and the directory they are in (``parent``), symlinks the latter; files, which may
    have several, neither.
    """

    __slots__ = ("kind", "name", "node", "parent", "volume")

    def __init__(
        self, inode: int, volume: VolumeView, node: NodeId, kind: Kind, parent: Directory | None, name: bytes
    ) -> None:
        super().__init__(inode)
        self.volume = volume
        self.node = node
        self.kind = kind
        self.parent = parent
        self.name = name

    @property
    def guest(self) -> PointGuest:
        """Whose it is."""
        return self.volume.guest

    def stands_for(self, volume: VolumeView, node: NodeId, parent: Directory | None) -> bool:
        """Whether it is this node, as seen in this directory."""
        same_place = self.parent is parent or (
            self.parent is not None and parent is not None and self.parent.inode == parent.inode
        )
        return self.volume is volume and self.node == node and same_place


Directory = Top | Node
Place = Top | VolumeText | Node

HAVE_ONE_PLACE: Final = frozenset((Kind.DIRECTORY, Kind.SYMLINK))
"""What is shown under one name only, so that its number depends on where it is."""


def trail(directory: Directory) -> list[Node]:
    """The directories from below the topmost one, which links never leave, down to this one."""
    found: list[Node] = []
    at: Directory | None = directory
    while isinstance(at, Node) and at.node:
        found.append(at)
        at = at.parent
    found.reverse()
    return found


def path_of(place: Place) -> str:
    """Where it is, below the point's directory, as far as that is known."""
    if isinstance(place, VolumeText):
        return f"files/{place.volume.name}.json"
    names: list[str] = []
    at: Directory | None = place
    while isinstance(at, Node):
        names.append(at.name.decode(errors="backslashreplace") or f"<{at.node.hex()}>")
        if at.parent is None:
            return f"{at.volume.view.name.lower()}/…/{at.volume.name}/{names[0]}"
        at = at.parent
    assert at is not None
    return "/".join([at.view.name.lower(), *reversed(names)])


class Places:
    """All places the kernel knows."""

    def __init__(self) -> None:
        self._known: dict[int, VolumeText | Node] = {}

    def __len__(self) -> int:
        return len(self._known)

    def get(self, inode: int) -> VolumeText | Node | None:
        """What a number stands for, if the kernel was told."""
        return self._known.get(inode)

    def links(self) -> list[int]:
        """The numbers of all guests' symlinks."""
        return [inode for inode, place in self._known.items() if isinstance(place, Node) and place.kind is Kind.SYMLINK]

    def node(self, volume: VolumeView, node: NodeId, kind: Kind, parent: Directory, name: bytes) -> Node:
        """The place of a node that has this name in this directory; known already, or new and not entered yet."""
        one_place = parent if kind in HAVE_ONE_PLACE else None
        where = b"" if one_place is None else one_place.inode.to_bytes(_INODE_BYTES, "big")
        for inode in _numbers(volume.seed + where + node):
            known = self._known.get(inode)
            if known is None:
                return Node(inode, volume, node, kind, one_place, name if kind is Kind.DIRECTORY else b"")
            if isinstance(known, Node) and known.stands_for(volume, node, one_place):
                return known
        raise AssertionError

    def text(self, volume: VolumeView) -> VolumeText:
        """The place of a volume's text."""
        for inode in _numbers(volume.seed + _TEXT):
            known = self._known.get(inode)
            if known is None:
                return VolumeText(inode, volume)
            if isinstance(known, VolumeText) and known.volume is volume:
                return known
        raise AssertionError

    def enter(self, place: VolumeText | Node) -> None:
        """The kernel is told of a place, once more."""
        place.lookups += 1
        self._known[place.inode] = place

    def forget(self, inode: int, lookups: int) -> None:
        """The kernel has forgotten so many of the times it was told."""
        known = self._known.get(inode)
        if known is not None:
            known.lookups -= lookups
            if known.lookups <= 0:
                del self._known[inode]


def _numbers(identity: bytes) -> Iterator[int]:
    """The number of something, and those to take where other things have it."""
    first = int.from_bytes(blake3(identity).digest(length=8), "big")
    return (TAG | (first + step) & _HASH_MASK for step in count())
