"""A guest in memory with everything a restore asks for; one object is one node, wherever it is named."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from xbfs_engine.core.errors import GuestNotFound
from xbfs_engine.guestfs.base import (
    READ_BYTES_MAX,
    DirEntry,
    FileExtent,
    Kind,
    NodeId,
    NodeStat,
    VolumeInfo,
    VolumeState,
    Xattr,
)
from xbfs_engine.guestfs.guest import ExtentPage, GuestMount, GuestTree, Listed, Page, VolumeRow, VolumeRows
from xbfs_engine.guestfs.volumes import VolumeStatus

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

PAGE = 7
SECOND = 10**9


@dataclass(eq=False)
class Node:
    """``holes``: offsets and lengths. ``error``: raised by ``stat``. ``read_error``: by reads behind an offset."""

    kind: Kind = Kind.FILE
    content: bytes = b""
    children: dict[bytes, Node] = field(default_factory=dict)
    target: bytes = b""
    mode: int = 0o644
    uid: int = 0
    gid: int = 0
    nlink: int = 1
    mtime_ns: int = 1_600_000_000 * SECOND
    xattrs: dict[bytes, bytes] = field(default_factory=dict)
    holes: tuple[tuple[int, int], ...] = ()
    device: tuple[int, int] = (0, 0)
    error: Exception | None = None
    list_error: Exception | None = None
    read_error: tuple[int, Exception] | None = None
    generated: int = 0
    """So many empty files more, named by number."""


def directory(**children: Node) -> Node:
    return folder({name.encode(): node for name, node in children.items()})


def folder(children: Mapping[bytes, Node]) -> Node:
    return Node(Kind.DIRECTORY, children=dict(children), mode=0o755)


def file(content: bytes = b"", **more: object) -> Node:
    return Node(content=content, **more)  # type: ignore[arg-type]  # what Node takes


def symlink(target: bytes) -> Node:
    return Node(Kind.SYMLINK, target=target, mode=0o777)


class TreeGuest:
    """Implements guestfs.guest.Guest. ``volumes``: trees by name; ``kinds``: their filesystems, ext4 by default."""

    def __init__(
        self,
        volumes: Mapping[str, Node],
        tree: Callable[[TreeGuest], GuestTree] | None = None,
        kinds: Mapping[str, str] | None = None,
    ) -> None:
        self._tops = dict(volumes)
        self._kinds = dict(kinds or {})
        self._ids: dict[int, NodeId] = {}
        self._nodes: list[Node] = []
        self._tree = tree
        self.read_sizes: list[int] = []

    def id_of(self, node: Node) -> NodeId:
        found = self._ids.get(id(node))
        if found is None:
            found = self._ids[id(node)] = NodeId(len(self._nodes).to_bytes(4, "big"))
            self._nodes.append(node)
        return found

    def volumes(self) -> VolumeRows:
        rows = [
            VolumeRow(name, self._kinds.get(name, "ext4"), "", "", 1 << 30, "", (), VolumeStatus.FILESYSTEM, "")
            for name in self._tops
        ]
        return VolumeRows(tuple(rows), ())

    def tree(self) -> GuestTree:
        if self._tree is not None:
            return self._tree(self)
        if len(self._tops) != 1:
            return GuestTree("", (), ("no system was found",))
        (name,) = self._tops
        return GuestTree("unix", (GuestMount(b"/", name, self.root(name), None, ""),), ())

    def info(self, volume: str) -> VolumeInfo:
        return VolumeInfo(self._kinds.get(volume, "ext4"), "", "", 1 << 30, VolumeState.CLEAN, "")

    def root(self, volume: str) -> NodeId:
        if volume not in self._tops:
            raise GuestNotFound(f"there is no volume {volume}")
        return self.id_of(self._tops[volume])

    def lookup(self, volume: str, node: NodeId, name: bytes) -> Listed | None:
        children = self._node(node).children
        return self._listed(name, children[name], 1) if name in children else None

    def list(self, volume: str, node: NodeId, cookie: int = 0) -> Page:
        here = self._node(node)
        if here.generated:
            last = min(cookie + 1024, here.generated)
            rows = [self._empty(number) for number in range(cookie, last)]
            return Page(tuple(rows), last == here.generated)
        rows = [self._listed(*child, number + 1) for number, child in enumerate(here.children.items())]
        if here.list_error is not None and cookie >= len(rows):
            raise here.list_error
        page = tuple(rows[cookie : cookie + PAGE])
        return Page(page, cookie + len(page) >= len(rows) and here.list_error is None)

    def stat(self, volume: str, node: NodeId) -> NodeStat:
        found = self._node(node)
        if found.error is not None:
            raise found.error
        return self._stat(found)

    def read(self, volume: str, node: NodeId, offset: int, length: int) -> bytes:
        assert 0 <= length <= READ_BYTES_MAX
        found = self._node(node)
        if found.read_error is not None and offset + length > found.read_error[0]:
            raise found.read_error[1]
        self.read_sizes.append(length)
        return found.content[offset : offset + length]

    def extents(self, volume: str, node: NodeId, offset: int = 0) -> ExtentPage:
        found = self._node(node)
        at, extents = 0, []
        for start, length in found.holes:
            if start > at:
                extents.append(FileExtent(at, start - at, is_data=True))
            extents.append(FileExtent(start, length, is_data=False))
            at = start + length
        if at < len(found.content):
            extents.append(FileExtent(at, len(found.content) - at, is_data=True))
        rest = [extent for extent in extents if extent.offset + extent.length > offset]
        return ExtentPage(tuple(rest[:PAGE]), len(rest) <= PAGE)

    def readlink(self, volume: str, node: NodeId) -> bytes:
        return self._node(node).target

    def xattrs(self, volume: str, node: NodeId) -> Sequence[Xattr]:
        return [Xattr(name, value) for name, value in self._node(node).xattrs.items()]

    def _node(self, node: NodeId) -> Node:
        number = int.from_bytes(node, "big")
        return Node() if number >= 1 << 24 else self._nodes[number]

    def _listed(self, name: bytes, node: Node, cookie: int) -> Listed:
        entry = DirEntry(name, self.id_of(node), node.kind, cookie)
        return Listed(entry, None if node.error is not None else self._stat(node))

    def _empty(self, number: int) -> Listed:
        node = NodeId(((1 << 24) + number).to_bytes(4, "big"))
        return Listed(DirEntry(b"%d" % number, node, Kind.FILE, number + 1), self._stat(Node()))

    def _stat(self, node: Node) -> NodeStat:
        size = len(node.content)
        return NodeStat(
            inode=1, kind=node.kind, mode=node.mode, uid=node.uid, gid=node.gid, nlink=node.nlink, size_bytes=size,
            allocated_bytes=size - sum(length for _, length in node.holes), mtime_ns=node.mtime_ns,
            atime_ns=node.mtime_ns, ctime_ns=None, btime_ns=None, rdev_major=node.device[0], rdev_minor=node.device[1],
        )  # fmt: skip
