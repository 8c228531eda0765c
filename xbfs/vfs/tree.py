"""The one definition of how restore points look as a tree: names, inodes, attributes, link targets and small files.

Owns no data: ``points`` is a whole immutable state that the event loop replaces by the next. Every answer comes from
manifests in memory, never from storage. For the event loop's thread.

    vms/<vm>/<time>/vm.json  report.json  disks/<n>.raw  <n>.vhd  files/  root/
    vms/<vm>/latest -> <time>        by-id/<id> -> ../vms/...        at/<time>/<vm> -> ../../vms/...
    live/<session> -> the session's directory in the live mount        .xbfs/status.json  metrics

What is in `files` and `root` is ``guests.views``' business.
"""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING, Final, NamedTuple

from xbfs.vfs import inodes
from xbfs.vfs.guests.places import View
from xbfs.vfs.images import ImageFormat, image_formats, image_size, vhd_refusal
from xbfs.vfs.points import Points, ShownDamage, ShownPoint, VmDirectory
from xbfs.vfs.texts import report_json, vm_json
from xbfs.vfs.times import SECOND_NS, parse_time, time_name
from xbfs_engine.core.ids import PointId

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from xbfs.vfs.boottests import Report
    from xbfs_engine.catalog.restore_point import DiskRecord

Entry = tuple[str, int]
"""Name and inode number."""

_FIXED: Final[dict[int, tuple[Entry, ...]]] = {
    inodes.ROOT: (
        *(("vms", inodes.VMS), ("by-id", inodes.BY_ID), ("at", inodes.AT)),
        *(("live", inodes.LIVE), (".xbfs", inodes.META)),
    ),
    inodes.META: (("status.json", inodes.STATUS), ("metrics", inodes.METRICS)),
}
_POINT: Final = (
    ("disks", inodes.POINT_DISKS),
    ("files", inodes.POINT_FILES),
    ("root", inodes.POINT_ROOT),
    ("report.json", inodes.POINT_REPORT),
    ("vm.json", inodes.POINT_VM),
)
_IN_POINT: Final = frozenset(code for _, code in _POINT)
_VIEWS: Final = {inodes.POINT_FILES: View.FILES, inodes.POINT_ROOT: View.ROOT}
_LATEST: Final = "latest"
_DAMAGE_SUFFIX: Final = ".error.txt"


class Kind(Enum):
    """What an inode is."""

    DIRECTORY = "directory"
    FILE = "file"
    LINK = "link"


class Attributes(NamedTuple):
    """What ``stat`` shows. ``settled``: never changes as long as it exists. ``live``: made anew at every open."""

    inode: int
    kind: Kind
    size_bytes: int
    allocated_bytes: int
    mtime_ns: int
    settled: bool
    live: bool = False


class ImageFile(NamedTuple):
    """An image that can be opened."""

    shown: ShownPoint
    disk: DiskRecord
    format: ImageFormat

    @property
    def path(self) -> str:
        """Path below the root."""
        return f"{self.shown.path}/disks/{self.disk.number}{self.format.suffix}"


class Tree:
    """The tree over ``points`` and the ``reports`` of those that were tested.

    ``status`` and ``metrics`` make the two files that describe the mount itself.
    """

    def __init__(self, status: Callable[[], bytes], metrics: Callable[[], bytes]) -> None:
        self.points = Points()
        self.reports: Mapping[PointId, Report] = {}
        self.show_sessions({})
        self._live = {inodes.STATUS: status, inodes.METRICS: metrics}

    def show_sessions(self, places: Mapping[str, str]) -> None:
        """Have links in ``live`` to these places, by name, and no others."""
        self.sessions = places
        self._sessions = {inodes.session_link(name): place for name, place in places.items()}

    def attributes(self, inode: int) -> Attributes | None:
        """What ``stat`` shows, or None if there is nothing of that number (any more)."""
        text = self.text(inode)
        if text is not None:
            live = inode in self._live or inodes.split(inode).code == inodes.POINT_REPORT
            mtime_ns = self.points.newest_ns if inode in self._live else self._mtime_ns(inode)
            return Attributes(inode, Kind.FILE, len(text), len(text), mtime_ns, not live, live)
        target = self.target(inode)
        if target is not None:
            settled = inodes.split(inode).code != inodes.VM_LATEST or inode & inodes.TIME_TAG != 0
            size = len(target.encode())
            return Attributes(inode, Kind.LINK, size, 0, self._mtime_ns(inode), settled)
        image = self.image(inode)
        if image is not None:
            size, allocated = image_size(image.disk, image.format)
            return Attributes(inode, Kind.FILE, size, allocated, image.shown.point.time_ns, True)
        if self.parent(inode) is None:
            return None
        settled = isinstance(self.points.owners.get(inodes.split(inode).owner), ShownPoint)
        return Attributes(inode, Kind.DIRECTORY, 0, 0, self._mtime_ns(inode), settled)

    def lookup(self, directory: int, name: str) -> Attributes | None:
        """What a name in a directory stands for; "." and ".." of any inode. None if there is no such name."""
        if name == ".":
            return self.attributes(directory)
        inode = self.parent(directory) if name == ".." else self._find(directory, name)
        return None if inode is None else self.attributes(inode)

    def entries(self, directory: int) -> list[Entry] | None:
        """All names in a directory in a fixed order, without "." and ".."; None if it is no directory."""
        if directory in _FIXED:
            return list(_FIXED[directory])
        points = self.points
        if directory == inodes.VMS:
            return [(vm.name, inodes.make(vm.owner, inodes.VM_DIRECTORY)) for vm in points.vms.values()]
        if directory == inodes.BY_ID:
            links = [(str(i), inodes.make(shown.owner, inodes.POINT_BY_ID)) for i, shown in points.by_id.items()]
            return links + [
                (damage_name(i), inodes.make(damage.owner, inodes.DAMAGE_TEXT)) for i, damage in points.damaged.items()
            ]
        if directory == inodes.LIVE:
            return [(name, inodes.session_link(name)) for name in self.sessions]
        if directory == inodes.AT:
            return [(time_name(at), inodes.time_inode(at, inodes.TIME_DIRECTORY)) for at in points.times()]
        timed = inodes.split_time(directory)
        if timed is not None:
            found = points.at(timed.owner).items() if timed.code == inodes.TIME_DIRECTORY else None
            return None if found is None else [(vm, inodes.make(s.owner, inodes.POINT_AT)) for vm, s in found]
        owner, code = inodes.split(directory)
        shown = points.owners.get(owner)
        if isinstance(shown, VmDirectory) and code == inodes.VM_DIRECTORY:
            inside = [(name, inodes.make(s.owner, inodes.POINT_DIRECTORY)) for name, s in shown.points.items()]
            return [*inside, (_LATEST, inodes.make(owner, inodes.VM_LATEST))]
        if isinstance(shown, ShownPoint) and code == inodes.POINT_DIRECTORY:
            return [(name, inodes.make(owner, child)) for name, child in _POINT]
        if isinstance(shown, ShownPoint) and code == inodes.POINT_DISKS:
            return list(_images(shown))
        return None if self.guest(directory) is None else []

    def parent(self, inode: int) -> int | None:
        """The directory of an inode (that of the root is itself), or None if there is no such inode."""
        if inode in (inodes.ROOT, inodes.VMS, inodes.BY_ID, inodes.AT, inodes.LIVE, inodes.META):
            return inodes.ROOT
        if inode in self._sessions:
            return inodes.LIVE
        if inode in self._live:
            return inodes.META
        if inodes.split_time(inode) is not None:
            return inodes.AT
        owner, code = inodes.split(inode)
        shown = self.points.owners.get(owner)
        if isinstance(shown, VmDirectory):
            return {inodes.VM_DIRECTORY: inodes.VMS, inodes.VM_LATEST: inodes.make(owner, inodes.VM_DIRECTORY)}.get(
                code
            )
        if isinstance(shown, ShownDamage):
            return inodes.BY_ID if code == inodes.DAMAGE_TEXT else None
        if isinstance(shown, ShownPoint):
            return self._point_parent(shown, code)
        return None

    def target(self, inode: int) -> str | None:
        """Where a symbolic link leads, or None if it is none."""
        timed = inodes.split_time(inode)
        if timed is not None:
            return time_name(timed.owner) if timed.code == inodes.TIME_LINK else None
        if inode in self._sessions:
            return self._sessions[inode]
        owner, code = inodes.split(inode)
        shown = self.points.owners.get(owner)
        if isinstance(shown, VmDirectory) and code == inodes.VM_LATEST:
            return shown.latest.name
        if isinstance(shown, ShownPoint) and code == inodes.POINT_BY_ID:
            return f"../{shown.path}"
        if isinstance(shown, ShownPoint) and code == inodes.POINT_AT:
            return f"../../{shown.path}"
        return None

    def text(self, inode: int) -> bytes | None:
        """The content of a small file, or None if it is none."""
        live = self._live.get(inode)
        if live is not None:
            return live()
        owner, code = inodes.split(inode)
        shown = self.points.owners.get(owner)
        if isinstance(shown, ShownDamage) and code == inodes.DAMAGE_TEXT:
            return shown.text.encode(errors="backslashreplace")
        if not isinstance(shown, ShownPoint):
            return None
        if code == inodes.POINT_VM:
            return vm_json(shown.point)
        if code == inodes.POINT_REPORT:
            report = self.reports.get(shown.point.id)
            return report_json(shown.point) if report is None else report.text
        found = self._image(inode)
        if found is not None and found.format is ImageFormat.VHD_REFUSED:
            return (vhd_refusal(found.disk) or "").encode()
        return None

    def image(self, inode: int) -> ImageFile | None:
        """The image of that inode, or None if it is none."""
        found = self._image(inode)
        return None if found is None or found.format is ImageFormat.VHD_REFUSED else found

    def guest(self, inode: int) -> tuple[ShownPoint, View] | None:
        """The point whose guest a directory shows, and how; None if it shows none."""
        owner, code = inodes.split(inode)
        shown = self.points.owners.get(owner)
        return (shown, _VIEWS[code]) if isinstance(shown, ShownPoint) and code in _VIEWS else None

    def extended(self, inode: int) -> dict[str, str]:
        """Extended attributes, none if there is no such inode."""
        shown = self.points.owners.get(inodes.split(inode).owner)
        if not isinstance(shown, ShownPoint):
            return {}
        found = {"user.xbfs.point": str(shown.point.id)}
        image = self.image(inode)
        if image is not None:
            found |= {"user.xbfs.disk": str(image.disk.number), "user.xbfs.format": image.format.name.lower()}
        return found

    def grows(self, directory: int) -> bool:
        """Whether new restore points or sessions appear as new names in this directory."""
        return directory in (inodes.VMS, inodes.BY_ID, inodes.LIVE) or isinstance(
            self.points.owners.get(inodes.split(directory).owner), VmDirectory
        )

    def _find(self, directory: int, name: str) -> int | None:
        """The inode of a name; only the big directories need more than a walk over their entries."""
        points = self.points
        if directory == inodes.VMS:
            vm = points.vms.get(name)
            return None if vm is None else inodes.make(vm.owner, inodes.VM_DIRECTORY)
        if directory == inodes.BY_ID:
            shown = points.by_id.get(PointId(name))
            if shown is not None:
                return inodes.make(shown.owner, inodes.POINT_BY_ID)
            damage = points.damaged.get(PointId(name.removesuffix(_DAMAGE_SUFFIX)))
            if damage is None or name != damage_name(damage.id):
                return None
            return inodes.make(damage.owner, inodes.DAMAGE_TEXT)
        if directory == inodes.AT:
            seconds = parse_time(name)
            if seconds is None:
                return None
            code = inodes.TIME_DIRECTORY if name == time_name(seconds) else inodes.TIME_LINK
            return inodes.time_inode(seconds, code)
        owner, code = inodes.split(directory)
        vm_directory = points.owners.get(owner)
        if isinstance(vm_directory, VmDirectory) and code == inodes.VM_DIRECTORY and name != _LATEST:
            shown = vm_directory.points.get(name)
            return None if shown is None else inodes.make(shown.owner, inodes.POINT_DIRECTORY)
        return dict(self.entries(directory) or ()).get(name)

    def _image(self, inode: int) -> ImageFile | None:
        owner, code = inodes.split(inode)
        shown = self.points.owners.get(owner)
        place = inodes.split_image(code)
        if not isinstance(shown, ShownPoint) or place is None:
            return None
        disk = shown.point.disk(place[0])
        if disk is None or place[1] not in image_formats(disk):
            return None
        return ImageFile(shown, disk, ImageFormat(place[1]))

    def _point_parent(self, shown: ShownPoint, code: int) -> int | None:
        if code == inodes.POINT_DIRECTORY:
            return inodes.make(shown.vm.owner, inodes.VM_DIRECTORY)
        if code in _IN_POINT:
            return inodes.make(shown.owner, inodes.POINT_DIRECTORY)
        if code == inodes.POINT_BY_ID:
            return inodes.BY_ID
        if code == inodes.POINT_AT:
            return inodes.time_inode(shown.point.time_ns // SECOND_NS, inodes.TIME_DIRECTORY)
        is_image = self._image(inodes.make(shown.owner, code)) is not None
        return inodes.make(shown.owner, inodes.POINT_DISKS) if is_image else None

    def _mtime_ns(self, inode: int) -> int:
        timed = inodes.split_time(inode)
        if timed is not None:
            return timed.owner * SECOND_NS
        shown = self.points.owners.get(inodes.split(inode).owner)
        if isinstance(shown, ShownPoint):
            report = self.reports.get(shown.point.id) if inodes.split(inode).code == inodes.POINT_REPORT else None
            return shown.point.time_ns if report is None else report.results[-1].made_ns
        return shown.latest.point.time_ns if isinstance(shown, VmDirectory) else self.points.newest_ns


def damage_name(point_id: PointId) -> str:
    """The name in ``by-id`` of a manifest that can not be used."""
    return point_id + _DAMAGE_SUFFIX


def _images(shown: ShownPoint) -> Iterable[Entry]:
    for disk in sorted(shown.point.disks, key=lambda disk: disk.number):
        for image_format in image_formats(disk):
            code = inodes.image_code(disk.number, image_format)
            yield f"{disk.number}{image_format.suffix}", inodes.make(shown.owner, code)
