"""A guest in memory: volumes with trees made of dictionaries, for tests of what puts them together.

A tree's values: a dict is a directory, bytes are a file, a str is a symlink, an exception is raised by whatever touches
that entry. It is strict: a call that does not fit raises as a real one does. `Shown` looks at a tree as the mount does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias, Union

from xbfs_engine.core.errors import GuestError, GuestLocked, GuestNotFound, GuestWrongKind
from xbfs_engine.guestfs.base import READ_BYTES_MAX, DirEntry, Kind, NodeId, NodeStat, VolumeInfo, VolumeState, Xattr
from xbfs_engine.guestfs.guest import ExtentPage, GuestTree, Listed, Page, VolumeRow, VolumeRows
from xbfs_engine.guestfs.tree import put_together
from xbfs_engine.guestfs.volumes import VolumeStatus

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from xbfs_engine.guestfs.guest import Guest

Entry: TypeAlias = Union["Mapping[str, Entry]", bytes, str, Exception]

PAGE = 3
"""Entries in one answer: few, so that listings have several pages."""

SYSTEM: dict[str, Entry] = {
    "etc": {"os-release": "../usr/lib/os-release", "passwd": b"root:x:0:0::/root:/bin/sh\n"},
    "usr": {"bin": {"sh": b""}, "lib": {"os-release": b"NAME=test\n", "systemd": {"systemd": b""}}},
    "bin": "usr/bin",
    "root": {},
    "var": {"lib": {}},
}
"""What makes a volume look like a system."""


@dataclass(frozen=True, slots=True)
class FakeVolume:
    row: VolumeRow
    tree: Entry


def volume(name: str, tree: Entry = b"", kind: str = "ext4", **more: object) -> FakeVolume:
    """A filesystem, unless ``status`` says otherwise."""
    fields: dict[str, object] = {
        "label": "", "uuid": "", "size_bytes": 1 << 30, "place": "", "within": (), "reason": "",
        "status": VolumeStatus.FILESYSTEM,
    }  # fmt: skip
    return FakeVolume(VolumeRow(name=name, kind=kind, **(fields | more)), tree)  # type: ignore[arg-type]


def system(fstab: str = "", **more: Entry) -> dict[str, Entry]:
    """The tree of a system with that fstab and more entries; ``etc`` is added to."""
    tree = dict(SYSTEM)
    etc = tree["etc"]
    extra = more.pop("etc", {})
    assert isinstance(etc, dict)
    assert isinstance(extra, dict)
    return {**tree, **more, "etc": {**etc, "fstab": fstab.encode("utf-8", "surrogateescape"), **extra}}


class FakeGuest:
    """Implements guestfs.guest.Guest."""

    def __init__(self, *volumes: FakeVolume) -> None:
        self._rows = tuple(volume.row for volume in volumes)
        self._nodes: dict[str, list[Entry]] = {volume.row.name: [volume.tree] for volume in volumes}
        self._ids: dict[tuple[str, int], NodeId] = {}
        self.calls = 0
        self.bytes_read = 0

    def volumes(self) -> VolumeRows:
        return VolumeRows(self._rows, ())

    def tree(self) -> GuestTree:
        return put_together(self)

    def info(self, volume: str) -> VolumeInfo:
        row = self._row(volume)
        return VolumeInfo(row.kind, row.label, row.uuid, row.size_bytes, VolumeState.CLEAN, "")

    def root(self, volume: str) -> NodeId:
        self._row(volume)
        self._entry(volume, NodeId(b"\0\0\0\0"))
        return NodeId(b"\0\0\0\0")

    def lookup(self, volume: str, node: NodeId, name: bytes) -> Listed | None:
        entries = self._directory(volume, node)
        text = name.decode("utf-8", "surrogateescape")
        if text not in entries:
            return None
        index = list(entries).index(text)
        return self._listed(volume, text, entries[text], index)

    def list(self, volume: str, node: NodeId, cookie: int = 0) -> Page:
        entries = list(self._directory(volume, node).items())
        rows = enumerate(entries[cookie : cookie + PAGE], cookie)
        found = tuple(self._listed(volume, name, entry, index) for index, (name, entry) in rows)
        return Page(found, cookie + PAGE >= len(entries))

    def stat(self, volume: str, node: NodeId) -> NodeStat:
        entry = self._entry(volume, node)
        size = len(entry) if isinstance(entry, (bytes, str)) else 0
        number = int.from_bytes(node, "big") + 1
        return NodeStat(number, _kind(entry), 0o755, 0, 0, 1, size, size, 0, None, None, None, 0, 0)

    def read(self, volume: str, node: NodeId, offset: int, length: int) -> bytes:
        assert 0 <= length <= READ_BYTES_MAX
        entry = self._entry(volume, node)
        if not isinstance(entry, bytes):
            raise GuestWrongKind("it is no file")
        self.bytes_read += length
        return entry[offset : offset + length]

    def extents(self, volume: str, node: NodeId, offset: int = 0) -> ExtentPage:
        raise NotImplementedError

    def readlink(self, volume: str, node: NodeId) -> bytes:
        entry = self._entry(volume, node)
        if not isinstance(entry, str):
            raise GuestWrongKind("it is no link")
        return entry.encode("utf-8", "surrogateescape")

    def xattrs(self, volume: str, node: NodeId) -> Sequence[Xattr]:
        raise NotImplementedError

    def _row(self, name: str) -> VolumeRow:
        self.calls += 1
        row = next((row for row in self._rows if row.name == name), None)
        if row is None:
            raise GuestNotFound(f"there is no volume {name}")
        if row.status is not VolumeStatus.FILESYSTEM:
            raise GuestLocked(f"volume {name} is not readable")
        return row

    def _entry(self, volume: str, node: NodeId) -> Entry:
        self._row(volume)
        entry = self._nodes[volume][int.from_bytes(node, "big")]
        if isinstance(entry, Exception):
            raise entry
        return entry

    def _directory(self, volume: str, node: NodeId) -> Mapping[str, Entry]:
        entry = self._entry(volume, node)
        if isinstance(entry, (bytes, str, Exception)):
            raise GuestWrongKind("it is no directory")
        return entry

    def _listed(self, volume: str, name: str, entry: Entry, index: int) -> Listed:
        """One object is one node, wherever it is found."""
        node = self._ids.get((volume, id(entry)))
        if node is None:
            nodes = self._nodes[volume]
            node = self._ids[volume, id(entry)] = NodeId(len(nodes).to_bytes(4, "big"))
            nodes.append(entry)
        stat = None if isinstance(entry, Exception) else self.stat(volume, node)
        return Listed(DirEntry(name.encode("utf-8", "surrogateescape"), node, _kind(entry), index + 1), stat)


class FakeBtrfsGuest(FakeGuest):
    """A guest that also tells subvolumes by number; 0 is the default one."""

    def __init__(self, subvolumes: Mapping[int, str], *volumes: FakeVolume) -> None:
        super().__init__(*volumes)
        self._subvolumes = subvolumes

    def subvolume(self, volume: str, number: int) -> NodeId:
        if number not in self._subvolumes:
            raise GuestNotFound(f"there is no subvolume {number}")
        node = self.root(volume)
        for name in filter(None, self._subvolumes[number].split("/")):
            found = self.lookup(volume, node, name.encode())
            assert found is not None
            node = found.entry.node
        return node


class Shown:
    """A guest's tree as whoever crosses its mounts by volume and node sees it."""

    def __init__(self, guest: FakeGuest) -> None:
        self.guest = guest
        self.tree = tree = guest.tree()
        self.mounts = {mount.path.decode("utf-8", "surrogateescape"): mount.volume for mount in tree.mounts}
        self.notes = "\n".join(tree.notes)
        self._over = {mount.over: (mount.volume, mount.node) for mount in tree.mounts if mount.over}
        self._more = {
            mount.path[1:]: (mount.volume, mount.node)
            for mount in tree.mounts
            if mount.over is None and mount.path != b"/"
        }

    def find(self, path: str) -> tuple[str, NodeId] | None:
        names = [name.encode() for name in path.split("/") if name]
        first = self.tree.mounts[0]
        here: tuple[str, NodeId] | None = (first.volume, first.node)
        if self.tree.kind == "windows":
            here, names = self._more.get(names[0]), names[1:]
        for depth, name in enumerate(names):
            if here is None:
                return None
            found = self.guest.lookup(*here, name)
            if found is None:
                here = self._more.get(name) if depth == 0 else None
            else:
                below = (here[0], found.entry.node)
                here = self._over.get(below, below)
        return here

    def names(self, path: str) -> set[str]:
        place = self.find(path)
        assert place is not None, path
        found = set(self.guest._directory(*place))
        return found | {name.decode() for name in self._more} if path == "/" else found

    def directories(self, count_max: int = 5000) -> int:
        """How many there are, by walking as find(1) does; it fails if there is no end."""
        first = self.tree.mounts[0]
        waiting = [(first.volume, first.node), *self._more.values()]
        count = 0
        while waiting:
            count += 1
            assert count < count_max, "the tree has no end"
            here = waiting.pop()
            for found in self._entries(here):
                if found.entry.kind is Kind.DIRECTORY:
                    below = (here[0], found.entry.node)
                    waiting.append(self._over.get(below, below))
        return count

    def _entries(self, here: tuple[str, NodeId]) -> Iterator[Listed]:
        cookie = 0
        while True:
            try:
                page = self.guest.list(*here, cookie)
            except GuestError:
                return
            yield from page.entries
            if page.is_last:
                return
            cookie = page.entries[-1].entry.cookie


def _kind(entry: Entry) -> Kind:
    if isinstance(entry, Exception):
        return Kind.UNKNOWN
    return Kind.FILE if isinstance(entry, bytes) else Kind.SYMLINK if isinstance(entry, str) else Kind.DIRECTORY


def walk_tree(guest: Guest, tree: GuestTree) -> dict[str, str | None]:
    """Every path of a tree with the text of its file or the target of its link, as find(1) walks it."""
    over = {mount.over: (mount.volume, mount.node) for mount in tree.mounts if mount.over}
    found: dict[str, str | None] = {}
    waiting = [("", tree.mounts[0].volume, tree.mounts[0].node)]
    while waiting:
        path, volume, node = waiting.pop()
        for listed in guest.list(volume, node).entries:
            below = f"{path}/{listed.entry.name.decode()}"
            assert listed.stat is not None
            if listed.stat.kind is Kind.DIRECTORY:
                found[below] = None
                waiting.append((below, *over.get((volume, listed.entry.node), (volume, listed.entry.node))))
            elif listed.stat.kind is Kind.SYMLINK:
                found[below] = guest.readlink(volume, listed.entry.node).decode()
            else:
                found[below] = guest.read(volume, listed.entry.node, 0, READ_BYTES_MAX).decode()
    return found
