"""Where the symlinks of guests lead: never out of what is shown of the guest, whatever a hostile one says.

The kernel follows links in the tree of whoever reads the mount, so an absolute target, or one with too many ``..``,
would lead into the host's files. Such targets are made relative to the topmost directory of the view (of the volume
in `files/`, of the guest in `root/`), where guests' own paths begin. ``..`` behind a name leads where that name leads,
which may be a link itself: it is resolved here, within the guest. What a link says is untouched otherwise.

Blocks; for the pool's threads.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from xbfs.vfs.guests.places import View
from xbfs.vfs.guests.point import Spot
from xbfs_engine.core.errors import GuestUnsupported
from xbfs_engine.guestfs.base import Kind

if TYPE_CHECKING:
    from collections.abc import Sequence

    from xbfs.vfs.guests.point import PointGuest, Seen

FOLLOWED_MAX: Final = 40
"""Links in one path (Linux: MAXSYMLINKS)."""
TARGET_MAX: Final = 4095
"""PATH_MAX without its end."""
STEPS_MAX: Final = 4096
"""Components looked at for one target."""
WINDOWS_TARGET: Final = b"user.ntfs.target"
"""Where the reader of NTFS keeps a target as Windows wrote it; ``readlink`` gives it without its drive."""
_DRIVE: Final = re.compile(rb"(?:\\(?:\\|\?)\?\\)?([A-Za-z]:)(?:[\\/](.*))?\Z", re.DOTALL)
_ROOTED: Final = re.compile(rb"\\(?![\\?])")
"""Begins at the drive the link is on."""

Trail = list[tuple[bytes, Spot]]
"""Names and directories from the topmost one, which has no name here, downwards."""


class Links:
    """Links of one view of a guest; ``top`` is its topmost directory, None if that shows no directory of a volume."""

    def __init__(self, guest: PointGuest, view: View, top: Spot | None) -> None:
        self._guest = guest
        self._view = view
        self._top = top

    def rebased(self, link: Spot, above: Trail) -> bytes:
        """Where a link leads, as it is shown; ``above`` are the directories it is in, without the topmost one.

        Raises what the guest raises, GuestUnsupported if it gets longer than the kernel takes.
        """
        target = self._guest.guest.readlink(link.volume, link.node)
        if target.startswith(b"/"):
            target = self._on_its_drive(link, target)
        shown = self._within(target, above)
        if len(shown) > TARGET_MAX:
            raise GuestUnsupported(f"the link's target is {len(shown)} bytes long: Linux takes {TARGET_MAX}")
        return shown

    def raw(self, link: Spot) -> bytes:
        """The target as it is stored."""
        windows = self._guest.xattrs(link).get(WINDOWS_TARGET)
        return self._guest.guest.readlink(link.volume, link.node) if windows is None else windows

    def _on_its_drive(self, link: Spot, target: bytes) -> bytes:
        """An absolute target on NTFS: of Windows, it begins at a drive, which may be shown or not."""
        windows = self._guest.xattrs(link).get(WINDOWS_TARGET) if self._guest.is_ntfs(link.volume) else None
        if windows is None:
            return target
        drive = self._drive(windows, link.volume)
        if drive is None:
            return windows.replace(b"/", b"\\")  # one name, of something that is not there
        return b"/" + drive + target if self._view is View.ROOT else target

    def _drive(self, target: bytes, volume: str) -> bytes | None:
        """The drive a target of Windows begins at, by its name in `root/`; None if it is not in this view."""
        match = _DRIVE.match(target)
        for name, place in self._guest.root_view().more.items():
            here = place.volume == volume
            if (here and _ROOTED.match(target)) or (match is not None and name.upper() == match[1].upper()):
                return name if here or self._view is View.ROOT else None
        return None

    def _within(self, target: bytes, above: Trail) -> bytes:
        depth = len(above)
        parts = [part for part in target.split(b"/") if part not in (b"", b".")]
        up = next((number for number, part in enumerate(parts) if part != b".."), len(parts))
        absolute = target.startswith(b"/")
        if b".." in parts[up:]:
            return _from_top(depth, self._resolved(parts, [] if absolute else above))
        if absolute or up > depth:
            return _from_top(depth, parts[up:])
        return target

    def _resolved(self, parts: Sequence[bytes], start: Trail) -> list[bytes]:
        """Names from the topmost directory to where the components lead, as far as there is something.

        Behind what is not there, or can not be followed, no ``..`` is kept: one day it may be there.
        """
        at = list(start)
        left = list(reversed(parts))
        followed = steps = 0
        while left:
            part = left.pop()
            steps += 1
            if part in (b"", b"."):
                continue
            if part == b"..":
                del at[-1:]
                continue
            seen = self._find(at, part) if steps <= STEPS_MAX else None
            if seen is not None and seen.kind is Kind.DIRECTORY:
                at.append((part, Spot(seen.volume, seen.node)))
                continue
            if seen is not None and seen.kind is Kind.SYMLINK and followed < FOLLOWED_MAX and b".." in left:
                followed += 1
                link = Spot(seen.volume, seen.node)
                target = self._guest.guest.readlink(*link)
                if target.startswith(b"/"):
                    target = self._on_its_drive(link, target)
                    at = [] if target.startswith(b"/") else at
                left += reversed(target.split(b"/"))
                continue
            return [name for name, _ in at] + [part] + [p for p in reversed(left) if p not in (b"", b".", b"..")]
        return [name for name, _ in at]

    def _find(self, at: Trail, name: bytes) -> Seen | None:
        directory = at[-1][1] if at else self._top
        found = None if directory is None else self._guest.find(self._view, directory, name)
        if found is None and not at and self._view is View.ROOT:
            found = self._guest.find_more(name)
        return found


def _from_top(depth: int, names: Sequence[bytes]) -> bytes:
    return b"/".join([b".."] * depth + list(names)) or b"."
