"""A Unix guest's tree: what its fstab and its mount units show where.

Mounts are made as the guest would at its start, in an order in which what lies below another mount comes after it.
What can not be is said in a sentence and left out: a tree that leads back into itself, too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

from xbfs_engine.core.errors import XbfsError
from xbfs_engine.guestfs.base import NAME_BYTES_MAX, Kind
from xbfs_engine.guestfs.guest import GuestMount, GuestTree
from xbfs_engine.guestfs.tree.fstab import ENTRIES_MAX, TABLE_BYTES_MAX, Entry, components, parse_mount_unit
from xbfs_engine.guestfs.tree.spots import Space, Spot, Step, entries, passable, words
from xbfs_engine.guestfs.tree.subvolumes import mounted
from xbfs_engine.guestfs.volumes import VolumeStatus

if TYPE_CHECKING:
    from collections.abc import Iterable

    from xbfs_engine.guestfs.guest import Guest
    from xbfs_engine.guestfs.tree.roots import Root

_MOUNTS_MAX: Final = 256
_PATH_BYTES_MAX: Final = 4096
_FOLDERS_MAX: Final = 64
_UNITS: Final = b"/etc/systemd/system"
_OF_THE_KERNEL: Final = frozenset(
    {
        "swap", "tmpfs", "ramfs", "proc", "sysfs", "devtmpfs", "devpts", "cgroup", "cgroup2", "mqueue",
        "hugetlbfs", "debugfs", "tracefs", "securityfs", "configfs", "fusectl", "binfmt_misc", "efivarfs",
        "rpc_pipefs", "nfsd", "autofs", "selinuxfs", "xenfs", "bpf", "pstore", "usbfs", "ignore",
    }
)  # fmt: skip
"""Types that hold no files of the guest's disks; nobody misses them."""

_NETWORK: Final = frozenset(
    {
        "nfs", "nfs4", "cifs", "smb3", "smbfs", "ncpfs", "sshfs", "davfs", "glusterfs", "ceph", "lustre",
        "beegfs", "afs", "9p", "virtiofs", "ocfs2", "gfs2",
    }
)  # fmt: skip
_LAYERED: Final = frozenset({"overlay", "aufs", "unionfs", "mergerfs", "ecryptfs"})


def unix_tree(guest: Guest, root: Root) -> GuestTree:
    """The tree below ``root``. Raises only what may pass when it is tried again."""
    building = _Building(guest, root)
    building.mount_all([entry for entry in root.fstab if entry.target] + building.units())
    return GuestTree("unix", tuple(made.mount for made in building.made), (*root.notes, *building.notes))


class _Made(NamedTuple):
    mount: GuestMount
    step: Step
    lies_in: frozenset[Spot]
    """The directories of its volume that the mount point lies in, itself too."""


class _Building:
    """The state of putting one tree together."""

    def __init__(self, guest: Guest, root: Root) -> None:
        self._guest = guest
        self._root = root
        self._space = Space(guest, root.step)
        first = GuestMount(b"/", *root.step.spot, None, words(root.source))
        self.made = [_Made(first, root.step, frozenset())]
        self.notes: list[str] = []

    def units(self) -> list[Entry]:
        """Mount units of the administrator that the guest starts."""
        found: list[Entry] = []
        try:
            place = self._space.find(_UNITS)
            if place is None or place.kind is not Kind.DIRECTORY:
                return found
            names = [listed.entry.name for listed in entries(self._guest, place.step.spot, ENTRIES_MAX)]
            folders = [name for name in names if name.endswith((b".wants", b".requires"))][:_FOLDERS_MAX]
            wanted = {name for folder in folders for name in self._names(_UNITS + b"/" + folder)}
            for name in sorted(wanted.intersection(names)):
                text = self._space.read(_UNITS + b"/" + name, TABLE_BYTES_MAX) if name.endswith(b".mount") else None
                entry = parse_mount_unit(text or b"")
                if entry is not None and entry.target:
                    found.append(entry)
        except XbfsError as error:
            self.notes.append(f"mount units of systemd can not be read: {passable(error)}")
        return found

    def _names(self, path: bytes) -> list[bytes]:
        place = self._space.find(path)
        if place is None or place.kind is not Kind.DIRECTORY:
            return []
        return [listed.entry.name for listed in entries(self._guest, place.step.spot, ENTRIES_MAX)]

    def mount_all(self, lines: Iterable[Entry]) -> None:
        """Mount what can be; of two lines for one path the last one counts."""
        last: dict[bytes, Entry] = {}
        for line in lines:
            if line.target == b"/" or self._is_skipped(line):
                continue
            if last.pop(line.target, None) is not None:
                self._note(line, "several lines mount it; the last one counts")
            last[line.target] = line
        waiting = sorted(last.values(), key=lambda line: line.target.count(b"/"))
        if len(waiting) > _MOUNTS_MAX:
            self.notes.append(f"only the first {_MOUNTS_MAX} mounts are shown")
            del waiting[_MOUNTS_MAX:]
        while waiting:
            targets = [line.target for line in waiting]
            ready = next((line for line in waiting if not _waits(line, targets)), waiting[0])
            waiting.remove(ready)
            try:
                self._mount(ready)
            except XbfsError as error:
                self._note(ready, passable(error))

    def _note(self, line: Entry, problem: str) -> None:
        self.notes.append(f"{words(line.target)} ({words(line.source)}): {problem}")

    def _is_skipped(self, line: Entry) -> bool:
        """Whether nothing on the disks is mounted by that line; told if somebody may miss it."""
        if line.kind in _OF_THE_KERNEL or b"remount" in line.options:
            return True
        problem = ""
        if b"noauto" in line.options and b"x-systemd.automount" not in line.options:
            problem = "it is not mounted when the guest starts"
        elif line.kind in _NETWORK or line.source.startswith(b"//") or b":/" in line.source:
            problem = "it is on the network"
        elif line.kind in _LAYERED or line.kind.startswith("fuse"):
            problem = f"{words(line.kind)} is not shown, what lies below it is"
        elif not _is_bind(line) and (
            b"loop" in line.options or (line.source.startswith(b"/") and not line.source.startswith(b"/dev/"))
        ):
            problem = "images in files are not mounted"
        if problem:
            self._note(line, problem)
        return bool(problem)

    def _mount(self, line: Entry) -> None:
        step = self._shown(line)
        if step is None:
            return
        place = self._space.find(line.target)
        if place is None:
            if not self._may_add(components(line.target)):
                self._note(line, "the directory to mount it on is not there")
                return
            path, over = line.target, None
        else:
            path, over = place.path, place.step
            if place.kind is not Kind.DIRECTORY or len(path) > _PATH_BYTES_MAX:
                self._note(line, "what it is to be mounted on is no directory")
                return
        if over and over.spot == step.spot:
            return
        if self._is_taken(path, step, over):
            self._note(line, "something else is mounted there")
            return
        mount = GuestMount(path, *step.spot, over.spot if over else None, words(line.source))
        made = _Made(mount, step, frozenset((over or self._root.step).lineage()))
        if self._leads_back(made):
            self._note(line, "it holds the directory that it is mounted on, and is not shown within itself")
            return
        self.made.append(made)
        if over:
            self._space.cover(over.spot, step)
        else:
            self._space.add(path[1:], step)

    def _is_taken(self, path: bytes, step: Step, over: Step | None) -> bool:
        """Whether a mount would hide another, or it could not be told by spots what is shown where."""
        if any(made.mount.path == path or made.mount.path.startswith(path + b"/") for made in self.made):
            return True
        if over and (self._space.is_covered(over.spot) or any(made.step.spot == over.spot for made in self.made)):
            return True
        return self._space.is_covered(step.spot)

    def _may_add(self, names: list[bytes]) -> bool:
        """Whether the topmost directory can be shown with one more name; a link that leads nowhere has its own."""
        if len(names) != 1 or len(names[0]) > NAME_BYTES_MAX or b"\0" in names[0]:
            return False
        return self._guest.lookup(*self._root.step.spot, names[0]) is None

    def _shown(self, line: Entry) -> Step | None:
        """The directory that a line mounts."""
        if _is_bind(line):
            place = self._space.find(line.source)
            if place is None or place.kind is not Kind.DIRECTORY:
                self._note(line, "there is no such directory")
                return None
            return place.step
        rows, problem = self._root.devices.find(line.source)
        if not rows:
            self._note(line, problem)
            return None
        # Both halves of a mirror have one UUID, and so has a copy of a volume: the root's own volume goes first.
        row = self._root.row if self._root.row in rows else rows[0]
        if row.status is not VolumeStatus.FILESYSTEM:
            self._note(line, f"volume {row.name} can not be read: {words(row.reason) or row.status.value}")
            return None
        if len([other for other in rows if other.status is VolumeStatus.FILESYSTEM]) > 1:
            self._note(
                line, f"several volumes are called so: {', '.join(r.name for r in rows[:8])}; {row.name} is shown"
            )
        step = mounted(self._guest, row, line.options)
        if step is None:
            self._note(line, f"volume {row.name} has no such subvolume")
        return step

    def _leads_back(self, new: _Made) -> bool:
        """Whether one could come from the new mount to its own mount point."""
        made = [*self.made, new]
        seen: set[int] = set()
        waiting = [new]
        while waiting:
            spot = waiting.pop().step.spot
            for index, other in enumerate(made):
                if index not in seen and spot in other.lies_in:
                    if other is new:
                        return True
                    seen.add(index)
                    waiting.append(other)
        return False


def _is_bind(line: Entry) -> bool:
    return b"bind" in line.options or b"rbind" in line.options


def _waits(line: Entry, targets: list[bytes]) -> bool:
    """Whether something that is still to be mounted has to be there first."""
    source = line.source + b"/" if _is_bind(line) else b""
    return any(
        target != line.target and (line.target.startswith(target + b"/") or source.startswith(target + b"/"))
        for target in targets
    )
