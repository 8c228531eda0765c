"""A guest with one volume "v" whose files are a dictionary, and which can be told to be hostile."""

from __future__ import annotations

from typing import TYPE_CHECKING

from xbfs_engine.guestfs.base import DirEntry, Kind, NodeId, NodeStat, VolumeInfo, VolumeState
from xbfs_engine.guestfs.guest import PAGE_ENTRIES_MAX, GuestTree, Listed, Page, VolumeRow, VolumeRows
from xbfs_engine.guestfs.volumes import VolumeStatus

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from xbfs_engine.guestfs.base import Xattr
    from xbfs_engine.guestfs.guest import ExtentPage


class FakeGuest:
    """``files``: path to size; directories are implied. Nodes are paths. Only what an index needs."""

    def __init__(self, files: Mapping[str, int]) -> None:
        self.files = dict(files)
        self.loops: dict[str, str] = {}
        self.twice: set[str] = set()
        self.stuck: set[str] = set()
        self.broken: dict[str, Exception] = {}
        self.endless = ""
        self.shown = GuestTree("", (), ())

    @classmethod
    def of(cls, files: Mapping[str, int]) -> FakeGuest:
        return cls(files)

    def volumes(self) -> VolumeRows:
        row = VolumeRow("v", "fake", "", "", 1 << 20, "disk 0", (), VolumeStatus.FILESYSTEM, "")
        return VolumeRows((row,), ())

    def tree(self) -> GuestTree:
        return self.shown

    def info(self, volume: str) -> VolumeInfo:
        return VolumeInfo("fake", "", "", 1 << 20, VolumeState.CLEAN, "")

    def root(self, volume: str) -> NodeId:
        return NodeId(b".")

    def list(self, volume: str, node: NodeId, cookie: int = 0) -> Page:
        where = node.decode()
        prefix = "" if where == "." else where + "/"
        names = sorted(set(self._names(prefix)), reverse=True)
        names += [name for name in names if prefix + name in self.twice]
        if where in self.broken:
            raise self.broken[where]
        page = [self._listed(prefix, name, number + 1) for number, name in enumerate(names)][cookie:][:PAGE_ENTRIES_MAX]
        if where in self.stuck:
            return Page(tuple(self._listed(prefix, name, 1) for name in names), is_last=False)
        return Page(tuple(page), is_last=cookie + len(page) == len(names))

    def _names(self, prefix: str) -> Iterable[str]:
        if self.endless and (prefix + "/").startswith(self.endless):
            yield "deeper"
        if not prefix and self.endless:
            yield self.endless
        for path in (*self.files, *self.loops):
            if path.startswith(prefix):
                yield path[len(prefix) :].partition("/")[0]

    def _listed(self, prefix: str, name: str, cookie: int) -> Listed:
        path = prefix + name
        size = self.files.get(path)
        kind = Kind.DIRECTORY if size is None else Kind.FILE
        node = NodeId(_short(self.loops.get(path, path)))
        inode = int.from_bytes(node[-6:], "big") + 1
        stat = NodeStat(inode, kind, 0o644, 0, 0, 1, size or 0, 0, 5, None, 7, None, 0, 0)
        return Listed(DirEntry(name.encode(), node, kind, cookie), stat)

    def lookup(self, volume: str, node: NodeId, name: bytes) -> Listed | None:
        raise NotImplementedError

    def stat(self, volume: str, node: NodeId) -> NodeStat:
        raise NotImplementedError

    def read(self, volume: str, node: NodeId, offset: int, length: int) -> bytes:
        raise NotImplementedError

    def extents(self, volume: str, node: NodeId, offset: int = 0) -> ExtentPage:
        raise NotImplementedError

    def readlink(self, volume: str, node: NodeId) -> bytes:
        raise NotImplementedError

    def xattrs(self, volume: str, node: NodeId) -> Sequence[Xattr]:
        raise NotImplementedError


def _short(path: str) -> bytes:
    return path.encode()
