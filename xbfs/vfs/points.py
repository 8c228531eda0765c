"""All restore points as the tree shows them, at one moment: which names they have and who owns which inodes.

Immutable once built: the event loop swaps one for the next. Building takes time in proportion to the number of points
and reads nothing.

Names never change once a point is there: whoever was committed first has the plain name, later ones of the same name
get a suffix; and what an earlier state named keeps its name as long as it exists. A VM that was renamed appears under
each of its names with the points of that time.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from xbfs.vfs.inodes import Owners
from xbfs.vfs.names import free_name, safe_component
from xbfs.vfs.times import SECOND_NS, time_name

if TYPE_CHECKING:
    from collections.abc import Sequence

    from xbfs_engine.catalog.catalog import DamagedPoint
    from xbfs_engine.catalog.restore_point import RestorePoint
    from xbfs_engine.core.ids import PointId

_MS_NS: Final = 1_000_000


@dataclass(eq=False, slots=True)
class VmDirectory:
    """``vms/<name>``: the points one VM made under one name, by name and in order of time."""

    key: tuple[str, str]
    name: str
    owner: int
    points: dict[str, ShownPoint] = field(default_factory=dict)

    @property
    def latest(self) -> ShownPoint:
        """The newest point."""
        return next(reversed(self.points.values()))


@dataclass(frozen=True, eq=False, slots=True)
class ShownPoint:
    """``vms/<vm name>/<name>``."""

    point: RestorePoint
    vm: VmDirectory
    name: str
    owner: int

    @property
    def path(self) -> str:
        """Path below the root."""
        return f"vms/{self.vm.name}/{self.name}"


@dataclass(frozen=True, eq=False, slots=True)
class ShownDamage:
    """``by-id/<id>.error.txt``: a manifest that can not be used, and why."""

    id: PointId
    text: str
    owner: int


Shown = VmDirectory | ShownPoint | ShownDamage


class Points:
    """One state of the repository. ``vms``, ``by_id`` and ``damaged`` are by name or id."""

    def __init__(
        self, points: Sequence[RestorePoint] = (), damaged: Sequence[DamagedPoint] = (), before: Points | None = None
    ) -> None:
        self.vms: dict[str, VmDirectory] = {}
        self.by_id: dict[PointId, ShownPoint] = {}
        self.damaged: dict[PointId, ShownDamage] = {}
        self.owners: dict[int, Shown] = {}
        self.newest_ns = max((point.time_ns for point in points), default=0)
        self.size_bytes = sum(disk.size_bytes for point in points for disk in point.disks)
        owners = Owners(self.owners)
        committed = sorted(points, key=_committed)
        self._name_vms(committed, owners, before)
        self._name_points(committed, owners, before)
        for broken in damaged:
            text = f"{broken.problem.message}\n{broken.problem.hint}\n".rstrip("\n") + "\n"
            shown = ShownDamage(broken.id, text, owners.take(f"point {broken.id}"))
            self.damaged[broken.id] = self.owners[shown.owner] = shown
        self._by_vm: dict[str, list[ShownPoint]] = {}
        for entry in sorted(self.by_id.values(), key=lambda entry: (entry.point.time_ns, entry.point.id)):
            entry.vm.points[entry.name] = entry
            self._by_vm.setdefault(entry.point.vm_uuid, []).append(entry)

    def same_as(self, points: Sequence[RestorePoint], damaged: Sequence[DamagedPoint]) -> bool:
        """Whether these points and no others are shown."""
        return self.by_id.keys() == {point.id for point in points} and self.damaged.keys() == {d.id for d in damaged}

    def at(self, seconds: int) -> dict[str, ShownPoint]:
        """For each VM its last point at or before the end of that second, by the VM's name then."""
        limit = (seconds + 1) * SECOND_NS - 1
        found: dict[str, ShownPoint] = {}
        for entries in self._by_vm.values():
            number = bisect_right(entries, limit, key=lambda entry: entry.point.time_ns)
            if number:
                found[entries[number - 1].vm.name] = entries[number - 1]
        return found

    def times(self) -> list[int]:
        """All seconds in which there is a point, ascending."""
        return sorted({entry.point.time_ns // SECOND_NS for entry in self.by_id.values()})

    def _name_vms(self, committed: Sequence[RestorePoint], owners: Owners, before: Points | None) -> None:
        keys = dict.fromkeys(_key(point) for point in committed)
        known = {vm.key: vm.name for vm in before.vms.values() if vm.key in keys} if before else {}
        taken = set(known.values())
        for key in keys:
            uuid, wanted = key
            name = known.get(key) or free_name(wanted, uuid, taken)
            taken.add(name)
            vm = VmDirectory(key, name, owners.take(f"vm {uuid} {wanted}"))
            self.vms[name] = self.owners[vm.owner] = vm

    def _name_points(self, committed: Sequence[RestorePoint], owners: Owners, before: Points | None) -> None:
        vms = {vm.key: vm for vm in self.vms.values()}
        present = {point.id for point in committed}
        known = {entry.point.id: entry.name for entry in before.by_id.values()} if before else {}
        taken: dict[int, set[str]] = {vm.owner: set() for vm in vms.values()}
        for entry in before.by_id.values() if before else ():
            if entry.point.id in present:
                taken[vms[_key(entry.point)].owner].add(entry.name)
        for point in committed:
            vm = vms[_key(point)]
            wanted = time_name(point.time_ns // SECOND_NS)
            name = known.get(point.id) or free_name(wanted, point.id, taken[vm.owner])
            taken[vm.owner].add(name)
            shown = ShownPoint(point, vm, name, owners.take(f"point {point.id}"))
            self.by_id[point.id] = self.owners[shown.owner] = shown


def _key(point: RestorePoint) -> tuple[str, str]:
    return point.vm_uuid, safe_component(point.vm_name)


def _committed(point: RestorePoint) -> tuple[int, str]:
    """When the point was committed, by the clock of who did it."""
    return point.run.started_ns + point.run.elapsed_ms * _MS_NS, point.id
