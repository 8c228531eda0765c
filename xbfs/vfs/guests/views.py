"""`files/` and `root/` of all restore points: what a protocol adapter asks for guests' files.

    files/<volume>/…      each filesystem for itself; lookups and listings fail where it can not be opened
    files/<volume>.json   every volume: what it is, in which state, and why
    root/…                as the guest puts them together; empty if that is not known

`files` and `root` exist in every point, as a listing of points must not start any reader. What is odd about a guest's
volumes as a whole is in the attribute ``user.xbfs.notes`` of `files`, and why `root` is empty, or what it lacks, in
that of `root`. Each file has ``user.xbfs.state`` (of its volume) and ``user.xbfs.btime``; a symlink's own target is in
``security.xbfs.target``. None of these is listed, so no copy carries them.

For the event loop's thread; the guest is asked in threads of the pool.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from functools import partial
from typing import TYPE_CHECKING, Final, TypeVar

from xbfs.vfs.guests.attributes import Appearance, GuestAttributes, Lasting, Ownership
from xbfs.vfs.guests.files import GuestFile
from xbfs.vfs.guests.links import Links
from xbfs.vfs.guests.listing import FilesListing, GuestListing, Listing
from xbfs.vfs.guests.places import Directory, Node, Places, Top, View, VolumeText, path_of, trail
from xbfs.vfs.guests.point import PointGuest, Seen, Spot
from xbfs.vfs.times import iso_time_ns
from xbfs_engine.core.errors import GuestDamaged, GuestError, GuestLocked, GuestNotFound, GuestWrongKind, XbfsError
from xbfs_engine.guestfs.base import Kind, NodeId

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from collections.abc import Set as AbstractSet

    from xbfs.vfs.guests.places import Place
    from xbfs.vfs.guests.source import KeyedGuest
    from xbfs.vfs.points import ShownPoint
    from xbfs.vfs.pool import ReadPool
    from xbfs_engine.catalog.restore_point import RestorePoint
    from xbfs_engine.core.ids import PointId
    from xbfs_engine.guestfs.volumes.records import VolumeKey
    from xbfs_engine.guestfs.worker.confine import Confinement

T = TypeVar("T")

GUEST_S: Final = 90.0
"""What a request to a guest may take beyond what the storage may: a search for volumes that hangs, and its repetition
in a new process, with room for a key to be tried."""
UNLOCK_S: Final = 170.0
"""What trying a key may take: whoever waits for the answer waits a little longer (xbfs.control)."""
DEPTH_MAX: Final = 2048
"""Directories above one another: what fits into the longest path (Linux, PATH_MAX 4096) with names of one byte."""
NOTES: Final = b"user.xbfs.notes"
STATE: Final = b"user.xbfs.state"
BORN: Final = b"user.xbfs.btime"
TARGET: Final = b"security.xbfs.target"
_FOR_ROOT: Final = b"trusted."


class LinkTargets(Enum):
    """Where symlinks of guests are shown to lead."""

    REBASED = "rebased"
    """Where they lead in the guest: never out of what is shown of it."""
    RAW = "raw"
    """What they say: absolute ones lead to files of this machine."""


@dataclass(frozen=True, slots=True)
class GuestOptions:
    """``ownership``: None is the guest's for root, the operator's for others."""

    ownership: Ownership | None = None
    links: LinkTargets = LinkTargets.REBASED
    keys: tuple[VolumeKey, ...] = ()
    """Tried on every encrypted volume."""


class GuestViews:
    """Guests' files of one mount. ``opened`` makes the guest of a point; ``failed`` is told what can not be read."""

    def __init__(
        self,
        opened: Callable[[ShownPoint, Sequence[VolumeKey]], KeyedGuest],
        pool: ReadPool,
        options: GuestOptions,
        *,
        for_others: bool,
        deadline_s: float,
        failed: Callable[[str, dict[str, object], XbfsError], None],
    ) -> None:
        self._opened = opened
        self._pool = pool
        self._options = options
        self._failed = failed
        self._appearance = Appearance(options.ownership, for_others=for_others)
        self._timeout_s = deadline_s + GUEST_S
        self._guests: dict[PointId, PointGuest] = {}
        self._keys: dict[str, tuple[VolumeKey, ...]] = {}
        self.places = Places()

    def top(self, shown: ShownPoint, view: View, inode: int) -> Top:
        """`files/` or `root/` of a point."""
        return self._guest(shown).top(view, inode)

    def drop_all_but(self, points: AbstractSet[PointId]) -> None:
        """Only these points are still there."""
        for point in self._guests.keys() - points:
            self._guests.pop(point).close()

    def confinement(self) -> Confinement | None:
        """What readers of guests are confined by; None before the first one was started."""
        return next(filter(None, (guest.confinement for guest in self._guests.values())), None)

    async def unlock(self, shown: ShownPoint, key: VolumeKey) -> list[str]:
        """Try a key on a point's locked volumes; if it opens one it is kept for the VM. The names of those it opened.

        Raises GuestLocked if it opens none, GuestNotFound if there is no such volume, and what a Guest raises.
        """
        guest = self._guest(shown)
        kept = self._keys_of(shown.point)

        def attempt() -> list[str]:
            before = guest.locked()
            wanted = [row.name for row in before if key.volume in ("", row.name, row.uuid)]
            if not wanted:
                if key.volume and all(key.volume not in (row.name, row.uuid) for row in guest.guest.volumes().rows):
                    raise GuestNotFound(f"there is no volume {key.volume}")
                return []
            guest.use_keys((*kept, key))
            still = {row.name for row in guest.locked()}
            opened = [name for name in wanted if name not in still]
            if not opened:
                guest.use_keys(kept)
                raise GuestLocked(f"the key does not open {', '.join(wanted)}", hint="check it and try again")
            return opened

        opened = await self._pool.run(partial(guest.door.through, attempt), UNLOCK_S)
        if opened:
            vm = guest.point.vm_uuid
            self._keys[vm] = keys = (*kept, key)
            others = [other for other in self._guests.values() if other.point.vm_uuid == vm and other is not guest]
            for other in others:
                await self._pool.run(partial(other.door.through, partial(other.use_keys, keys)), UNLOCK_S)
        return opened

    async def lookup(self, directory: Directory, name: bytes) -> tuple[VolumeText | Node, GuestAttributes] | None:
        """What a name stands for; the caller enters it when it tells the kernel."""
        guest = directory.guest
        if isinstance(directory, Top) and directory.view is View.FILES:
            names = await self._ask(directory, guest.names)
            volume = names.directories.get(name) or names.texts.get(name)
            if volume is None:
                return None
            place = self.in_files(guest, volume.name, name, directory, is_text=name in names.texts)
            return place, await self.attributes(place)
        seen = await self._ask(directory, partial(_find, directory, name), name)
        if seen is None:
            return None
        problem = self._refusal(directory, seen)
        if problem is not None:
            self._tell(directory, name, problem)
            raise problem
        return self.seen(directory, seen)

    def seen(self, directory: Directory, seen: Seen) -> tuple[Node, GuestAttributes]:
        """The place and the attributes of a name that was looked at."""
        guest = directory.guest
        view = directory.view if isinstance(directory, Top) else directory.volume.view
        place = self.places.node(guest.view(view, seen.volume), seen.node, seen.kind, directory, seen.name)
        if seen.stat is None:
            return place, self._appearance.unknown(place.inode, seen.kind, guest.point.time_ns)
        return place, self._appearance.of(place.inode, seen.stat, ownerless=guest.is_ownerless(seen.volume))

    def in_files(
        self, guest: PointGuest, volume: str, name: bytes, directory: Top, *, is_text: bool
    ) -> VolumeText | Node:
        """The place of a name in `files/`."""
        view = guest.view(View.FILES, volume)
        if is_text:
            return self.places.text(view)
        return self.places.node(view, _TOPMOST, Kind.DIRECTORY, directory, name)

    def guess(self, place: VolumeText | Node) -> GuestAttributes:
        """What is known without asking anybody, for listings of `files/`."""
        if isinstance(place, VolumeText):
            known = place.guest.text_known(place.volume.name)
            if known is not None:
                return self._text_attributes(place, *known)
            return self._appearance.unknown(place.inode, Kind.FILE, place.guest.point.time_ns)
        return self._appearance.unknown(place.inode, place.kind, place.guest.point.time_ns)

    async def attributes(self, place: VolumeText | Node) -> GuestAttributes:
        """What ``stat`` shows. A volume that can not be opened is a directory still: its text says why."""
        guest = place.guest
        if isinstance(place, VolumeText):
            return self._text_attributes(place, *await self._text(place))
        try:
            status = await self._ask(place, partial(guest.stat, place))
        except GuestError:
            if place.node:
                raise
            guessed = self._appearance.unknown(place.inode, Kind.DIRECTORY, guest.point.time_ns)
            return guessed._replace(lasting=Lasting.BRIEFLY)
        return self._appearance.of(place.inode, status, ownerless=guest.is_ownerless(place.volume.name))

    async def text(self, place: VolumeText) -> bytes:
        """What `files/<volume>.json` says."""
        return (await self._text(place))[0]

    async def readlink(self, place: Node) -> bytes:
        """Where a symlink leads."""
        return await self._ask(place, partial(_target, place, self._options.links))

    def open(self, place: Node) -> GuestFile:
        """Open a file; reads nothing."""
        if place.kind is not Kind.FILE:
            raise GuestWrongKind(f"{path_of(place)} is no file")

        def failed(offset: int, size: int, problem: XbfsError) -> None:
            self._failed(_name(place, b""), {**_facts(place), "offset": offset, "size": size}, problem)

        spot = Spot(place.volume.name, place.node)
        return GuestFile(place.guest, spot, self._pool, timeout_s=self._timeout_s, failed=failed)

    def opendir(self, directory: Directory) -> Listing:
        """Open a directory; reads nothing."""
        if isinstance(directory, Top) and directory.view is View.FILES:
            return FilesListing(self, directory)
        return GuestListing(self, directory)

    async def xattr_names(self, place: Place, *, is_root: bool) -> Sequence[bytes]:
        """Names of the guest's extended attributes."""
        if not isinstance(place, Node):
            return []
        names = await self._ask(place, partial(_xattrs, place))
        return [name for name in names if is_root or not name.startswith(_FOR_ROOT)]

    async def xattr(self, place: Place, name: bytes, *, is_root: bool) -> bytes | None:
        """The value of an extended attribute, or None."""
        if isinstance(place, Top):
            return "\n".join(await self._ask(place, partial(_notes, place))).encode() if name == NOTES else None
        if isinstance(place, VolumeText) or (name.startswith(_FOR_ROOT) and not is_root):
            return None
        guest, volume = place.guest, place.volume.name
        if name == STATE:
            return (await self._ask(place, partial(guest.state, volume))).value.encode()
        if name == BORN:
            born_ns = (await self._ask(place, partial(guest.stat, place))).btime_ns
            return None if born_ns is None else iso_time_ns(born_ns).encode()
        if name == TARGET and place.kind is Kind.SYMLINK:
            links = Links(guest, place.volume.view, None)
            return await self._ask(place, partial(links.raw, Spot(volume, place.node)))
        known = guest.xattrs_known(Spot(volume, place.node))
        return (await self._ask(place, partial(_xattrs, place)) if known is None else known).get(name)

    async def ask(self, place: Place, call: Callable[[], T], name: bytes = b"") -> T:
        """Have a guest asked in a thread. What goes wrong is told to ``failed``."""
        return await self._ask(place, call, name)

    def above(self, directory: Directory) -> set[Spot]:
        """A directory and those above it, as far as links lead: none of them can be in it."""
        found = {Spot(node.volume.name, node.node) for node in trail(directory)}
        volume = directory.volume.name if isinstance(directory, Node) else ""
        topmost = directory.guest.topmost(_view(directory), volume)
        return found if topmost is None else found | {topmost}

    async def _ask(self, place: Place, call: Callable[[], T], name: bytes = b"") -> T:
        try:
            return await self._pool.run(partial(place.guest.door.through, call), self._timeout_s)
        except XbfsError as exc:
            self._tell(place, name, exc)
            raise

    def _tell(self, place: Place, name: bytes, problem: XbfsError) -> None:
        facts = _facts(place)
        if name:
            facts["path"] = f"{facts['path']}/{name.decode(errors='backslashreplace')}"
        self._failed(_name(place, name), facts, problem)

    def _keys_of(self, point: RestorePoint) -> tuple[VolumeKey, ...]:
        return self._keys.get(point.vm_uuid, self._options.keys)

    def _guest(self, shown: ShownPoint) -> PointGuest:
        guest = self._guests.get(shown.point.id)
        if guest is None:
            guest = PointGuest(shown.point, shown.path, lambda: self._opened(shown, self._keys_of(shown.point)))
            self._guests[shown.point.id] = guest
        return guest

    async def _text(self, place: VolumeText) -> tuple[bytes, bool]:
        known = place.guest.text_known(place.volume.name)
        if known is not None:
            return known
        return await self._ask(place, partial(place.guest.text, place.volume.name))

    def _text_attributes(self, place: VolumeText, text: bytes, final: bool) -> GuestAttributes:
        return self._appearance.text(place.inode, len(text), place.guest.point.time_ns, final=final)

    def _refusal(self, directory: Directory, seen: Seen) -> GuestDamaged | None:
        if seen.stat is None:
            return GuestDamaged(f"{seen.name!r} can not be looked at")
        if seen.kind is Kind.DIRECTORY:
            above = self.above(directory)
            if Spot(seen.volume, seen.node) in above:
                return GuestDamaged(f"the directory {seen.name!r} lies in itself")
            if len(above) > DEPTH_MAX:
                return GuestDamaged(f"the directory {seen.name!r} lies more than {DEPTH_MAX} directories deep")
        return None


_TOPMOST: Final = NodeId(b"")


def _find(directory: Directory, name: bytes) -> Seen | None:
    guest, view = directory.guest, _view(directory)
    here = guest.here(directory)
    found = None if here is None else guest.find(view, here, name)
    return guest.find_more(name) if found is None and isinstance(directory, Top) else found


def _view(directory: Directory) -> View:
    return directory.view if isinstance(directory, Top) else directory.volume.view


def _target(place: Node, targets: LinkTargets) -> bytes:
    guest, view = place.guest, place.volume.view
    spot = Spot(place.volume.name, place.node)
    assert place.parent is not None
    if targets is LinkTargets.RAW:
        return Links(guest, view, None).raw(spot)
    volume = place.volume.name
    top = guest.root_view().top if view is View.ROOT else Spot(volume, guest.guest.root(volume))
    above = [(node.name, Spot(node.volume.name, node.node)) for node in trail(place.parent)]
    return Links(guest, view, top).rebased(spot, above)


def _xattrs(place: Node) -> dict[bytes, bytes]:
    here = place.guest.here(place)
    assert here is not None
    return place.guest.xattrs(here)


def _notes(top: Top) -> Sequence[str]:
    return top.guest.root_view().notes if top.view is View.ROOT else top.guest.guest.volumes().notes


def _name(place: Place, name: bytes) -> str:
    """What a problem is known by, so that it is told once."""
    return f"{place.guest.point.id}/{place.inode}/{name.hex()}"


def _facts(place: Place) -> dict[str, object]:
    facts: dict[str, object] = {"point": place.guest.point.id, "path": f"{place.guest.path}/{path_of(place)}"}
    if not isinstance(place, Top):
        facts["volume"] = place.volume.name
    return facts
