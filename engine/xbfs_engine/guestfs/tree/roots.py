"""Which directory of which volume is a Unix guest's root.

A volume whose fstab says that this very volume is ``/`` is believed; else what looks most like a system counts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

from xbfs_engine.core.errors import XbfsError
from xbfs_engine.guestfs.tree.devices import Devices
from xbfs_engine.guestfs.tree.fstab import TABLE_BYTES_MAX, Entry, parse_crypttab, parse_fstab
from xbfs_engine.guestfs.tree.spots import Space, Step, passable, words
from xbfs_engine.guestfs.tree.subvolumes import candidates, mounted
from xbfs_engine.guestfs.volumes import VolumeStatus

if TYPE_CHECKING:
    from collections.abc import Sequence

    from xbfs_engine.guestfs.guest import Guest, VolumeRow

_KINDS: Final = frozenset({"ext2", "ext3", "ext4", "xfs", "btrfs"})
"""Filesystems that the root of a Unix system can be on."""

VOLUMES_MAX: Final = 256
"""Filesystems that are opened in search of a system."""

_RELEASES: Final = ("/etc/os-release", "/usr/lib/os-release", "/etc/redhat-release", "/etc/debian_version")
_INITS: Final = ("/sbin/init", "/usr/lib/systemd/systemd", "/lib/systemd/systemd", "/bin/busybox")
_PARTS: Final = ("/etc/passwd", "/bin", "/usr/bin", "/lib", "/usr/lib", "/var/lib", "/home", "/root")


class Root(NamedTuple):
    """A directory that may be a guest's root, and what its tables say."""

    row: VolumeRow
    step: Step
    title: str
    """The volume's name and, if it is not that volume's root, which directory."""
    is_named: bool
    """Its fstab says that this very directory is the root."""
    source: str
    """What its fstab calls the volume; empty without such a line."""
    marks: int
    """How much of a system is there."""
    fstab: tuple[Entry, ...]
    devices: Devices
    notes: tuple[str, ...]


def find_roots(guest: Guest, rows: Sequence[VolumeRow]) -> list[Root]:
    """The directories that may be it, the likeliest first."""
    found: list[Root] = []
    able = [row for row in rows if row.status is VolumeStatus.FILESYSTEM and row.kind in _KINDS]
    for row in able[:VOLUMES_MAX]:
        try:
            for path, step in candidates(guest, row):
                root = _look(guest, rows, row, step, f"{row.name} ({words(path)})" if path else row.name)
                if root is not None:
                    found.append(root)
        except XbfsError as error:
            passable(error)
    found.sort(key=lambda root: (not root.is_named, -root.marks))
    return found


def _look(guest: Guest, rows: Sequence[VolumeRow], row: VolumeRow, step: Step, title: str) -> Root | None:
    """What a directory has of a system, None if that is too little."""
    space = Space(guest, step)
    if not _is_there(space, "/etc"):
        return None
    notes: list[str] = []
    tables = {}
    for name in ("fstab", "crypttab"):
        try:
            tables[name] = space.read(f"/etc/{name}".encode(), TABLE_BYTES_MAX) or b""
        except XbfsError as error:
            tables[name] = b""
            notes.append(f"/etc/{name} can not be read: {passable(error)}")
    fstab = parse_fstab(tables["fstab"])
    devices = Devices(rows, parse_crypttab(tables["crypttab"]))
    line = next((entry for entry in fstab if entry.target == b"/"), None)
    is_named = line is not None and _names(guest, devices, line, row, step)
    marks = [any(_is_there(space, path) for path in group) for group in (_RELEASES, _INITS)]
    parts = [_is_there(space, path) for path in _PARTS]
    if not is_named and not (any(marks) and (parts[1] or parts[3] or _is_there(space, "/usr"))):
        return None
    if not fstab and not notes:
        notes.append("/etc/fstab names nothing")
    source = line.source.decode("utf-8", "replace") if line is not None and is_named else ""
    return Root(row, step, title, is_named, source, sum(marks + parts), tuple(fstab), devices, tuple(notes))


def _names(guest: Guest, devices: Devices, line: Entry, row: VolumeRow, step: Step) -> bool:
    """Whether a line of fstab means that directory."""
    if row not in devices.find(line.source).rows:
        return False
    try:
        shown = mounted(guest, row, line.options)
    except XbfsError as error:
        passable(error)
        return False
    return shown is not None and shown.spot == step.spot


def _is_there(space: Space, path: str) -> bool:
    try:
        return space.find(path.encode()) is not None
    except XbfsError as error:
        passable(error)
        return False
