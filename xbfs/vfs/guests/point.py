"""The guest of one restore point: its volumes and its tree as the mount shows them, asked for once.

Methods block and are for the pool's threads, unless they say otherwise; what they keep is immutable and may be made
twice by two threads at once, which harms nobody. Raises whatever a Guest raises.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Final, NamedTuple

from xbfs.vfs.guests.attributes import OWNERLESS
from xbfs.vfs.guests.door import Door
from xbfs.vfs.guests.places import Node, Top, View, VolumeView
from xbfs.vfs.texts import to_json
from xbfs_engine.core.errors import GuestError, GuestLocked, GuestNotFound, GuestReaderFailed
from xbfs_engine.guestfs.base import Kind, VolumeState
from xbfs_engine.guestfs.volumes.records import VolumeStatus

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from xbfs.vfs.guests.source import KeyedGuest
    from xbfs_engine.catalog.restore_point import RestorePoint
    from xbfs_engine.guestfs.base import NodeId, NodeStat, Xattr
    from xbfs_engine.guestfs.guest import GuestTree, Listed, Page, VolumeRow
    from xbfs_engine.guestfs.volumes.records import VolumeKey
    from xbfs_engine.guestfs.worker.confine import Confinement

_SUFFIX: Final = ".json"
_NTFS: Final = "ntfs"
_XATTRS_KEPT: Final = 16
"""Files whose attributes are kept for the next question: ``cp`` and ``ls`` ask for one attribute after the other."""
_XATTRS_KEPT_BYTES: Final = 64 << 10


class Seen(NamedTuple):
    """A name in a directory. ``volume`` and ``node`` say what is there; ``stat`` is None if that can not be read."""

    name: bytes
    cookie: int
    volume: str
    node: NodeId
    kind: Kind
    stat: NodeStat | None


class VolumeNames(NamedTuple):
    """What `files/` lists: the rows of volumes by the names of their directories and of their texts."""

    directories: dict[bytes, VolumeRow]
    texts: dict[bytes, VolumeRow]


class Spot(NamedTuple):
    """A directory of a volume."""

    volume: str
    node: NodeId


class RootView(NamedTuple):
    """How `root/` is put together."""

    kind: str
    top: Spot | None
    """What the topmost directory shows; None: only what was mounted there."""
    over: dict[Spot, Spot]
    """Directories that are hidden by others."""
    more: dict[bytes, Spot]
    """Further names in the topmost directory."""
    notes: tuple[str, ...]


class PointGuest:
    """``path``: that of the point below the mount, for people. ``opened`` makes the guest; that starts nothing yet."""

    def __init__(self, point: RestorePoint, path: str, opened: Callable[[], KeyedGuest]) -> None:
        self.point = point
        self.path = path
        self.door = Door()
        self._opened = opened
        self._opening = threading.Lock()
        self._guest: KeyedGuest | None = None
        self._tops: dict[View, Top] = {}
        self._views: dict[tuple[View, str], VolumeView] = {}
        self.forget()

    def use_keys(self, keys: Sequence[VolumeKey]) -> None:
        """Give these keys, and no others, to the guest: there may be other volumes now. Waits for who is inside."""
        self.guest.give_keys(keys)
        self.forget()

    def locked(self) -> list[VolumeRow]:
        """Volumes that no key has opened."""
        return [row for row in self.guest.volumes().rows if row.status is VolumeStatus.LOCKED]

    def forget(self) -> None:
        """Volumes may be others now."""
        self._names: VolumeNames | None = None
        self._root: RootView | None = None
        self._rows: dict[str, VolumeRow] = {}
        self._texts: dict[str, tuple[bytes, bool]] = {}
        self._root_ids: dict[str, NodeId] = {}
        self._xattrs: dict[Spot, dict[bytes, bytes]] = {}

    @property
    def guest(self) -> KeyedGuest:
        """The guest itself, opened at the first need. Raises MapCorrupt."""
        with self._opening:
            if self._guest is None:
                self._guest = self._opened()
            return self._guest

    @property
    def confinement(self) -> Confinement | None:
        """What its reader is confined by; None before it was started. Never blocks."""
        return None if self._guest is None else self._guest.confinement

    def close(self) -> None:
        """It is not asked any more. For the event loop's thread."""
        if self._guest is not None:
            self._guest.close()

    def top(self, view: View, inode: int) -> Top:
        """`files/` or `root/`. For the event loop's thread."""
        found = self._tops.get(view)
        if found is None:
            found = self._tops[view] = Top(inode, self, view)
        return found

    def view(self, view: View, volume: str) -> VolumeView:
        """A volume in a view. For the event loop's thread."""
        found = self._views.get((view, volume))
        if found is None:
            found = self._views[view, volume] = VolumeView(self, view, volume)
        return found

    def names(self) -> VolumeNames:
        """What `files/` lists. A text whose name a volume has gets ``~`` into its own."""
        if self._names is None:
            rows = self.guest.volumes().rows
            self._rows = {row.name: row for row in rows}
            directories = {row.name.encode(): row for row in rows if row.status is VolumeStatus.FILESYSTEM}
            texts: dict[bytes, VolumeRow] = {}
            for row in rows:
                stem = row.name
                while (name := (stem + _SUFFIX).encode()) in directories or name in texts:
                    stem += "~"
                texts[name] = row
            self._names = VolumeNames(directories, texts)
        return self._names

    def is_ntfs(self, volume: str) -> bool:
        """Whether a volume has Windows' own links. Never blocks: false until ``names`` was asked for."""
        row = self._rows.get(volume)
        return row is not None and row.kind == _NTFS

    def is_ownerless(self, volume: str) -> bool:
        """Whether a volume knows no owners. Never blocks: false until ``names`` was asked for."""
        row = self._rows.get(volume)
        return row is not None and row.kind in OWNERLESS

    def text(self, volume: str) -> tuple[bytes, bool]:
        """What `files/<volume>.json` says, and whether that is final. Raises GuestNotFound, and what is no guest's."""
        found = self._texts.get(volume)
        if found is None:
            self.names()
            row = self._rows.get(volume)
            if row is None:
                raise GuestNotFound(f"there is no volume {volume}")
            text, final, keep = self._describe(row)
            found = text, final
            if keep:
                self._texts[volume] = found
        return found

    def text_known(self, volume: str) -> tuple[bytes, bool] | None:
        """``text``, if it was asked for. Never blocks."""
        return self._texts.get(volume)

    def state(self, volume: str) -> VolumeState:
        """The state of a volume that can be opened."""
        return self.guest.info(volume).state

    def root_view(self) -> RootView:
        """How `root/` is put together."""
        if self._root is None:
            self.names()
            self._root = _root_view(self.guest.tree())
        return self._root

    def topmost(self, view: View, volume: str) -> Spot | None:
        """The directory links never leave, if it was looked at. Never blocks."""
        if view is View.ROOT:
            return None if self._root is None else self._root.top
        node = self._root_ids.get(volume)
        return None if node is None else Spot(volume, node)

    def here(self, place: Top | Node) -> Spot | None:
        """The directory of a volume that a place shows; None if it shows none."""
        if isinstance(place, Node):
            return Spot(place.volume.name, place.node or self._root_id(place.volume.name))
        return self.root_view().top if place.view is View.ROOT else None

    def stat(self, place: Node) -> NodeStat:
        """Metadata."""
        return self.guest.stat(place.volume.name, place.node or self._root_id(place.volume.name))

    def find(self, view: View, directory: Spot, name: bytes) -> Seen | None:
        """What a name in a directory stands for."""
        found = self.guest.lookup(directory.volume, directory.node, name)
        return None if found is None else self._seen(view, directory.volume, found)

    def find_more(self, name: bytes) -> Seen | None:
        """What a name in `root/` stands for that no directory of a volume holds."""
        place = self.root_view().more.get(name)
        return None if place is None else self._mounted(name, 0, place)

    def more(self) -> list[Seen]:
        """All such names."""
        return [self._mounted(name, 0, place) for name, place in self.root_view().more.items()]

    def page(self, view: View, directory: Spot, cookie: int) -> tuple[list[Seen], bool]:
        """Names in a directory, and whether they are the last."""
        page: Page = self.guest.list(directory.volume, directory.node, cookie)
        return [self._seen(view, directory.volume, listed) for listed in page.entries], page.is_last

    def xattrs(self, place: Spot) -> dict[bytes, bytes]:
        """Extended attributes of a file."""
        found = self._xattrs.get(place)
        if found is None:
            listed: list[Xattr] = list(self.guest.xattrs(place.volume, place.node))
            found = {xattr.name: xattr.value for xattr in listed}
            if sum(map(len, found.values())) <= _XATTRS_KEPT_BYTES:
                kept = dict(list(self._xattrs.items())[1 - _XATTRS_KEPT :])
                self._xattrs = {**kept, place: found}
        return found

    def xattrs_known(self, spot: Spot) -> dict[bytes, bytes] | None:
        """``xattrs``, if they were asked for a moment ago. Never blocks."""
        return self._xattrs.get(spot)

    def _root_id(self, volume: str) -> NodeId:
        found = self._root_ids.get(volume)
        if found is None:
            found = self._root_ids[volume] = self.guest.root(volume)
        return found

    def _seen(self, view: View, volume: str, listed: Listed) -> Seen:
        entry = listed.entry
        if view is View.ROOT and entry.kind in (Kind.DIRECTORY, Kind.UNKNOWN):
            there = self._crossed(Spot(volume, entry.node))
            if there is not None:
                return self._mounted(entry.name, entry.cookie, there)
        kind = entry.kind if listed.stat is None else listed.stat.kind
        return Seen(entry.name, entry.cookie, volume, entry.node, kind, listed.stat)

    def _crossed(self, place: Spot) -> Spot | None:
        """What is mounted over a directory, if anything."""
        over = self.root_view().over
        there: Spot | None = None
        for _ in range(len(over)):
            above = over.get(there or place)
            if above is None:
                break
            there = above
        return there

    def _mounted(self, name: bytes, cookie: int, there: Spot) -> Seen:
        try:
            stat = self.guest.stat(there.volume, there.node)
        except GuestError:
            stat = None
        return Seen(name, cookie, there.volume, there.node, Kind.DIRECTORY, stat)

    def _describe(self, row: VolumeRow) -> tuple[bytes, bool, bool]:
        """The text, whether no key can change it, and whether it need not be asked for again."""
        found: dict[str, object] = {
            "volume": row.name,
            "type": row.kind,
            "label": row.label,
            "uuid": row.uuid,
            "size_bytes": row.size_bytes,
            "place": row.place,
            "within": list(row.within),
        }
        locked = row.status is VolumeStatus.LOCKED
        keep = True
        if row.status is VolumeStatus.FILESYSTEM:
            try:
                info = self.guest.info(row.name)
            except GuestError as exc:
                keep = not isinstance(exc, GuestReaderFailed)  # it may only have been busy
                state, reason = _state_of(exc), exc.message
            else:
                found |= {"type": info.type, "label": info.label, "uuid": info.uuid}
                found["filesystem_size_bytes"] = info.size_bytes
                state, reason = info.state, "; ".join(filter(None, (info.reason, row.reason)))
        else:
            state, reason = VolumeState.LOCKED if locked else VolumeState.UNSUPPORTED, row.reason
        return to_json({**found, "state": state.value, "reason": reason}), keep and not locked, keep


def _state_of(problem: GuestError) -> VolumeState:
    return VolumeState.LOCKED if isinstance(problem, GuestLocked) else VolumeState.UNSUPPORTED


def _root_view(tree: GuestTree) -> RootView:
    top: Spot | None = None
    over: dict[Spot, Spot] = {}
    more: dict[bytes, Spot] = {}
    for mount in tree.mounts:
        place = Spot(mount.volume, mount.node)
        if mount.over is not None:
            over[Spot(*mount.over)] = place
        elif mount.path == b"/":
            top = place
        else:
            more[mount.path.strip(b"/")] = place
    return RootView(tree.kind, top, over, more, tree.notes)
