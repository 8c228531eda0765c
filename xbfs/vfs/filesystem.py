"""The mounted repository as a protocol adapter sees it: tree, open files, refresh, and the state of the mount.

Owns the caches, the pool and the handles of one mount. For the event loop's thread, but for handles, which any thread
may read; storage is touched only in other threads. Everything it keeps is bounded: chunks and map nodes by bytes,
problems by number, handles by the kernel.
"""

from __future__ import annotations

import threading
from collections import deque
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Final, NamedTuple
from weakref import WeakValueDictionary

import trio

from xbfs.vfs import inodes
from xbfs.vfs.boottests import look_for_tests
from xbfs.vfs.gate import Gate
from xbfs.vfs.guests.disks import PooledDisk
from xbfs.vfs.guests.views import GuestOptions, GuestViews
from xbfs.vfs.handles import ImageHandle
from xbfs.vfs.images import DiskImage, ImageFormat, open_image
from xbfs.vfs.points import Points
from xbfs.vfs.pool import ReadPool
from xbfs.vfs.report import MountReport
from xbfs.vfs.tree import Attributes, Tree, damage_name
from xbfs_engine.catalog.blockmap import NodeStore
from xbfs_engine.core.errors import IntegrityError, PointNotFound, XbfsError
from xbfs_engine.core.ids import PointId
from xbfs_engine.core.limits import MIB
from xbfs_engine.core.log import Logger
from xbfs_engine.guestfs.volumes.records import Disk
from xbfs_engine.store.cache import ChunkCache
from xbfs_engine.store.reader import ChunkReader

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from xbfs.vfs.guests.places import Place
    from xbfs.vfs.guests.source import Guests, KeyedGuest
    from xbfs.vfs.points import ShownPoint
    from xbfs.vfs.tree import ImageFile
    from xbfs_engine.catalog.catalog import Catalog
    from xbfs_engine.guestfs.volumes.records import VolumeKey
    from xbfs_engine.store.reader import Locator
    from xbfs_engine.store.repository import Repository

MISS_REFRESH_S: Final = 1.0
"""A name that is not there makes us look for new points, but not more often than this: shells ask for many names."""
MISS_WAIT_S: Final = 2.0
"""What such a look may take before the name counts as missing."""
PROBLEMS_MAX: Final = 64

_log = Logger("xbfs.mount")


@dataclass(frozen=True, slots=True)
class ViewOptions:
    """``cache_bytes`` of decoded chunks; a read is answered within ``deadline_s``; new points are looked for every
    ``refresh_s``; ``for_others``: other users may read too; ``sessions`` tells where each is shown. It may block."""

    cache_bytes: int = 128 * MIB
    deadline_s: float = 30.0
    refresh_s: float = 5.0
    for_others: bool = False
    guests: GuestOptions = field(default_factory=GuestOptions)
    sessions: Callable[[], Mapping[str, str]] = dict


class Changes(NamedTuple):
    """What is not as the kernel knows it: names that are gone, with their directory, directories with new ones, and
    links and texts that are others."""

    gone: Sequence[tuple[int, str]] = ()
    grown: Sequence[int] = ()
    turned: Sequence[int] = ()


class FileSystem:
    """One mount of one repository; made inside the event loop, with ``tend`` running.

    ``guests`` reads guests' files; ``locator`` finds chunks that compaction moved. ``tell`` is called, before anybody
    gets to see them, with changes of what the kernel may have kept.
    """

    def __init__(
        self,
        repository: Repository,
        catalog: Catalog,
        options: ViewOptions,
        guests: Guests,
        locator: Locator | None = None,
    ) -> None:
        self.options = options
        self.tell: Callable[[Changes], None] = lambda _: None
        self.clock = repository.runtime.clock
        self._repository = repository
        self._catalog = catalog
        self._gate = Gate(repository.storage, self.clock, deadline_s=options.deadline_s)
        reader = ChunkReader(self._gate, repository.keys, locator)
        self._nodes = NodeStore(reader)
        self._cache = ChunkCache(reader, options.cache_bytes)
        self._pool = ReadPool()
        # Its threads wait for guests' readers, which wait for reads of disks: those must find threads elsewhere.
        self._guest_pool = ReadPool()
        self._token = trio.lowlevel.current_trio_token()
        self._images: WeakValueDictionary[int, DiskImage] = WeakValueDictionary()
        self._seen: deque[tuple[str, str]] = deque(maxlen=PROBLEMS_MAX)
        self._problems_lock = threading.Lock()
        self._refresh_lock = trio.Lock()
        self._missed_s = self.clock.monotonic_s() - MISS_REFRESH_S
        # One at a time: a refresh that hangs keeps the catalog locked, others would only queue up behind it.
        self._refresh_limit = trio.CapacityLimiter(1)
        self.report = MountReport(repository, self._cache, self._gate, self._pool, guests)
        self._open_guest = guests.open
        self.guests = GuestViews(
            self._guest,
            self._guest_pool,
            options.guests,
            for_others=options.for_others,
            deadline_s=options.deadline_s,
            failed=self._guest_failed,
        )
        self.tree = Tree(
            lambda: self.report.status_json(self.tree.points, self.guests.confinement()),
            lambda: self.report.metrics(self.tree.points),
        )

    async def lookup(self, directory: int, name: str) -> Attributes | None:
        """As ``Tree.lookup``, but looks for new points before it says that a name is missing."""
        found = self.tree.lookup(directory, name)
        if found is None and self.tree.grows(directory):
            now_s = self.clock.monotonic_s()
            if now_s - self._missed_s >= MISS_REFRESH_S:
                self._missed_s = now_s
                with trio.move_on_after(MISS_WAIT_S), suppress(XbfsError):
                    await self.refresh()
            found = self.tree.lookup(directory, name)
        return found

    def place(self, inode: int) -> Place | None:
        """What of guests' files a number stands for; None if it is none of them, or the kernel was never told."""
        top = self.tree.guest(inode)
        if top is None:
            return self.guests.places.get(inode)
        return self.guests.top(*top, inode)

    def open_image(self, file: ImageFile, inode: int) -> ImageHandle:
        """Open an image; reads nothing. Raises MapCorrupt."""
        image = self._images.get(inode)
        if image is None:
            try:
                image = open_image(file.shown.point, file.disk, file.format, self._nodes, self._cache)
            except XbfsError as exc:
                self._read_failed(file, 0, 0, exc)
                raise
            self._images[inode] = image

        def failed(offset: int, size: int, problem: XbfsError) -> None:
            self._read_failed(file, offset, size, problem)

        return ImageHandle(image, self._pool, timeout_s=self.options.deadline_s, failed=failed)

    async def unlock(self, point: str, key: VolumeKey) -> list[str]:
        """Try a key on the locked volumes of a point's guest: see ``GuestViews.unlock``. Raises PointNotFound too."""
        shown = self.tree.points.by_id.get(PointId(point))
        if shown is None:
            raise PointNotFound(f"no restore point {point} is mounted")
        opened = await self.guests.unlock(shown, key)
        if opened:
            # A link's target with ``..`` in it may go through what could not be looked at before.
            self.tell(Changes(turned=self.guests.places.links()))
        return opened

    async def refresh(self) -> None:
        """Look for restore points and boot tests that are new or gone, and tell of them. Raises StorageError."""
        async with self._refresh_lock:
            before = self.tree.points
            places, fresh = await trio.to_thread.run_sync(
                self._load, before, abandon_on_cancel=True, limiter=self._refresh_limit
            )
            self._show_sessions(places)
            if fresh is not None:
                self.tree.points = fresh
                self.guests.drop_all_but(fresh.by_id.keys())
                self.tell(_changes(before, fresh))
            await self._refresh_tests()

    async def look_again(self) -> None:
        """``refresh`` that never raises: what goes wrong is logged when it begins and shown in the status."""
        try:
            await self.refresh()
        except XbfsError as exc:
            if self.report.refresh_problem is None:
                _log.warning("new restore points can not be looked for", problem=exc.message, hint=exc.hint)
            self.report.refresh_problem = exc.message
        except Exception as exc:  # noqa: BLE001 - a bug there must not end the mount
            if self.report.refresh_problem is None:
                _log.error("looking for new restore points failed for a reason of our own", exc_info=exc)
            self.report.refresh_problem = repr(exc)
        else:
            self.report.refresh_problem = None

    async def tend(self) -> None:
        """Keep the deadlines of reads, for as long as the mount is served."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._guest_pool.tend)
            await self._pool.tend()

    def close(self) -> None:
        """End the threads; blocks for two seconds at most."""
        self._guest_pool.close()
        self._pool.close()

    def _load(self, before: Points) -> tuple[Mapping[str, str], Points | None]:
        """The sessions, and the new state or None if nothing changed. Runs in a thread."""
        places = self.options.sessions()
        self._catalog.refresh()
        points, damaged = self._catalog.points(), self._catalog.damaged()
        return places, None if before.same_as(points, damaged) else Points(points, damaged, before)

    async def _refresh_tests(self) -> None:
        before, points = self.tree.reports, self.tree.points.by_id
        look = partial(look_for_tests, self._repository, points, before)
        self.tree.reports = after = await trio.to_thread.run_sync(
            look, abandon_on_cancel=True, limiter=self._refresh_limit
        )
        other = [
            inodes.make(points[point_id].owner, inodes.POINT_REPORT)
            for point_id in (before.keys() | after.keys()) & points.keys()
            if before.get(point_id) != after.get(point_id)
        ]
        if other:
            self.tell(Changes(turned=other))

    def _show_sessions(self, places: Mapping[str, str]) -> None:
        before = self.tree.sessions
        if places != before:
            self.tree.show_sessions(places)
            gone = [(inodes.LIVE, name) for name, place in before.items() if places.get(name) != place]
            self.tell(Changes(gone, [inodes.LIVE]))

    def _guest(self, shown: ShownPoint, keys: Sequence[VolumeKey]) -> KeyedGuest:
        """The guest of a point; reads nothing."""
        disks: list[Disk] = []
        for disk in sorted(shown.point.disks, key=lambda disk: disk.number):
            image = open_image(shown.point, disk, ImageFormat.RAW, self._nodes, self._cache)
            source = PooledDisk(image, self._pool, self._token, timeout_s=self.options.deadline_s)
            disks.append(Disk(str(disk.number), source))
        return self._open_guest(shown.path, disks, keys)

    def _guest_failed(self, place: str, facts: dict[str, object], problem: XbfsError) -> None:
        if self._is_new(place, problem):
            self.report.guest_problems.append({**facts, "problem": problem.message})
            _log.warning("a guest's file can not be read", hint=problem.hint, **facts, problem=problem.message)

    def _is_new(self, place: str, problem: XbfsError) -> bool:
        """Whether this is not known of the place yet; any thread may ask."""
        known = (place, problem.message)
        with self._problems_lock:
            if known in self._seen:
                return False
            self._seen.append(known)
            return True

    def _read_failed(self, file: ImageFile, offset: int, size: int, problem: XbfsError) -> None:
        facts: dict[str, object] = {
            "image": file.path,
            "point": file.shown.point.id,
            "disk": file.disk.number,
            "offset": offset,
            "size": size,
            "problem": problem.message,
        }
        with self._problems_lock:
            self.report.failed_reads += 1
        if not self._is_new(file.path, problem):
            return  # the kernel repeats a read page by page
        self.report.problems.append({"damage": isinstance(problem, IntegrityError), **facts})
        _log.warning("read failed", hint=problem.hint, **facts)


def _changes(before: Points, after: Points) -> Changes:
    gone: list[tuple[int, str]] = []
    grown = {inodes.VMS, inodes.BY_ID, inodes.AT}
    for point_id, shown in before.by_id.items():
        if point_id not in after.by_id:
            gone.append((inodes.make(shown.vm.owner, inodes.VM_DIRECTORY), shown.name))
            gone.append((inodes.BY_ID, str(point_id)))
    gone.extend((inodes.BY_ID, damage_name(point_id)) for point_id in before.damaged.keys() - after.damaged.keys())
    gone.extend((inodes.VMS, name) for name in before.vms.keys() - after.vms.keys())
    for point_id, shown in after.by_id.items():
        if point_id not in before.by_id:
            grown.add(inodes.make(shown.vm.owner, inodes.VM_DIRECTORY))
    turned = [
        inodes.make(vm.owner, inodes.VM_LATEST)
        for name, vm in after.vms.items()
        if name in before.vms and vm.latest.name != before.vms[name].latest.name
    ]
    return Changes(gone, sorted(grown), turned)
