"""Which directory a mount of a volume shows: on btrfs a subvolume, by path, by number or by default.

The seam `Guest` names subvolumes by their paths only. A guest that also is `Subvolumes` can tell the default one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Protocol, runtime_checkable

from xbfs_engine.core.errors import XbfsError
from xbfs_engine.guestfs.base import Kind
from xbfs_engine.guestfs.tree.fstab import components
from xbfs_engine.guestfs.tree.spots import Spot, Step, entries, kind_of, passable

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from xbfs_engine.guestfs.base import NodeId
    from xbfs_engine.guestfs.guest import Guest, VolumeRow

_TRIED_MAX: Final = 64
_TOPMOST: Final = 5
"""Number of the subvolume that holds all others (BTRFS_FS_TREE_OBJECTID)."""

_SNAPPER: Final = (b".snapshots", b"@/.snapshots")
"""Where snapper keeps its subvolumes, as ``<number>/snapshot``; openSUSE's root is one of them."""


@runtime_checkable
class Subvolumes(Protocol):
    """What a guest may offer besides `Guest`."""

    def subvolume(self, volume: str, number: int) -> NodeId:
        """The topmost directory of a btrfs' subvolume; number 0 is the one that is mounted when none is named."""
        ...


def mounted(guest: Guest, row: VolumeRow, options: Mapping[bytes, bytes]) -> Step | None:
    """The directory that mounting a volume with these options shows, None if there is none."""
    top = Step(Spot(row.name, guest.root(row.name)))
    if row.kind != "btrfs":
        return top
    path = options.get(b"subvol")
    if path is not None:
        return below(guest, top, path)
    try:
        number = int(options.get(b"subvolid", b"0"), 0)
    except ValueError:
        return None
    if number == _TOPMOST:
        return top
    if isinstance(guest, Subvolumes):
        return _numbered(guest, guest, top, number)
    return None if number else top


def candidates(guest: Guest, row: VolumeRow) -> Iterator[tuple[str, Step]]:
    """Directories of a volume that a system may be in, with their paths: on btrfs also subvolumes."""
    top = Step(Spot(row.name, guest.root(row.name)))
    if row.kind != "btrfs":
        yield "", top
        return
    try:
        default = mounted(guest, row, {}) or top
    except XbfsError as error:
        passable(error)
        default = top
    yield "" if default is top else "its default subvolume", default
    for name, step in [(b"", top), *_children(guest, top)]:
        if step.spot != default.spot:
            yield name.decode("utf-8", "replace"), step


def below(guest: Guest, top: Step, path: bytes) -> Step | None:
    """A directory by its path in a volume, without following links."""
    step = top
    for name in components(path):
        listed = guest.lookup(*step.spot, name)
        if listed is None or kind_of(listed) is not Kind.DIRECTORY:
            return None
        step = Step(Spot(step.spot.volume, listed.entry.node), step)
    return step


def _numbered(guest: Guest, subvolumes: Subvolumes, top: Step, number: int) -> Step | None:
    """A subvolume by its number; if it is where subvolumes usually are, with the directories that it lies in."""
    if not 0 <= number < 1 << 63:
        return None
    spot = Spot(top.spot.volume, subvolumes.subvolume(top.spot.volume, number))
    if spot == top.spot:
        return top
    for _, step in _usual(guest, top):
        if step.spot == spot:
            return step
    return Step(spot, top)


def _usual(guest: Guest, top: Step) -> Iterator[tuple[bytes, Step]]:
    yield from _children(guest, top)
    for path in _SNAPPER:
        try:
            folder = below(guest, top, path)
        except XbfsError as error:
            passable(error)
            continue
        for name, step in _children(guest, folder) if folder is not None else ():
            snapshot = below(guest, step, b"snapshot") if name.isdigit() else None
            if snapshot is not None:
                yield name, snapshot


def _children(guest: Guest, above: Step) -> list[tuple[bytes, Step]]:
    """The first directories in a directory, as far as it can be read."""
    volume = above.spot.volume
    try:
        found = [listed for listed in entries(guest, above.spot, _TRIED_MAX) if kind_of(listed) is Kind.DIRECTORY]
    except XbfsError as error:
        passable(error)
        return []
    return [(listed.entry.name, Step(Spot(volume, listed.entry.node), above)) for listed in found]
