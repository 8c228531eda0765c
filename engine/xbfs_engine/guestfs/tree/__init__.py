"""How a guest puts its volumes together: what its ``root/`` shows.

`put_together` is the way in. It runs where the readers run, sees only a `Guest`, and believes nothing it reads: tables
and registries are bounded, and what is wrong with them is said in the tree's notes. One thread at a time.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from xbfs_engine.core.errors import XbfsError
from xbfs_engine.guestfs.guest import GuestMount, GuestTree
from xbfs_engine.guestfs.tree.roots import find_roots
from xbfs_engine.guestfs.tree.spots import passable
from xbfs_engine.guestfs.tree.unix import unix_tree
from xbfs_engine.guestfs.tree.windows import find_systems, windows_tree
from xbfs_engine.guestfs.volumes import VolumeStatus

if TYPE_CHECKING:
    from collections.abc import Sequence

    from xbfs_engine.guestfs.guest import Guest, VolumeRow
    from xbfs_engine.guestfs.tree.roots import Root
    from xbfs_engine.guestfs.tree.windows import System

__all__ = ["put_together"]

_NOTES_MAX: Final = 256
_OTHERS_MAX: Final = 16
_DISK: Final = re.compile(r"(\d+)(?:p\d+)?")
_CLOSED: Final = frozenset({VolumeStatus.LOCKED, VolumeStatus.UNREADABLE})


def put_together(guest: Guest) -> GuestTree:
    """The tree of a guest. Raises only what may pass when it is tried again.

    A Unix guest's tree comes from its fstab, a Windows guest's from the drive letters in its registry. A guest without
    a system that has just one filesystem shows that; with several there is no tree.
    """
    rows = guest.volumes().rows
    roots = find_roots(guest, rows)
    systems = find_systems(guest, rows)
    if not roots and not systems:
        tree = _without_system(guest, rows)
        others: list[str] = []
    elif roots and not (systems and _is_windows(roots[0], systems[0])):
        tree = unix_tree(guest, roots[0])
        others = [root.title for root in roots[1:]] + [system.row.name for system in systems]
    else:
        tree = windows_tree(guest, rows, systems[0])
        others = [system.row.name for system in systems[1:]] + [root.title for root in roots]
    notes = list(tree.notes[:_NOTES_MAX])
    if len(tree.notes) > _NOTES_MAX:
        notes.append(f"{len(tree.notes) - _NOTES_MAX} more notes are left out")
    if others:
        notes.append(
            f"other systems are on volumes {', '.join(others[:_OTHERS_MAX])}{' …' * (len(others) > _OTHERS_MAX)}"
        )
    return tree._replace(notes=tuple(notes))


def _is_windows(root: Root, system: System) -> bool:
    """Whether a guest with both runs Windows: a disk of another machine comes after its own."""
    if not root.is_named:
        return True
    unix, windows = _DISK.fullmatch(root.row.name), _DISK.fullmatch(system.row.name)
    return unix is not None and windows is not None and int(windows[1]) < int(unix[1])


def _without_system(guest: Guest, rows: Sequence[VolumeRow]) -> GuestTree:
    """The only filesystem there is, if there is no other that could not be looked into."""
    closed = [row for row in rows if row.status in _CLOSED]
    readable: list[GuestMount] = []
    notes: list[str] = []
    for row in rows:
        if row.status is not VolumeStatus.FILESYSTEM:
            continue
        try:
            readable.append(GuestMount(b"/", row.name, guest.root(row.name), None, ""))
        except XbfsError as error:
            notes.append(f"volume {row.name} can not be read: {passable(error)}")
        if len(readable) > 1:
            break
    if len(readable) == 1 and not closed and not notes:
        return GuestTree("unix", (readable[0],), ("no system was found; this is the only filesystem",))
    if closed:
        listed = ", ".join(row.name for row in closed[:_OTHERS_MAX])
        notes.append(f"a system may be on volumes that can not be looked into: {listed}")
    return GuestTree("", (), ("no system was found on the volumes", *notes))
