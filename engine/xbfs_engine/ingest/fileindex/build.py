"""Builds the file index of a restore point; blocks its thread. What it needs of a guest comes over ``guestfs.guest``.

Segments are made durable first and the root is put last: whatever ends a build, half of an index is never seen. Several
may build at once, also of one point: they store the same. An index may be removed at any time and built again.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final, NamedTuple

from xbfs_engine.catalog.blockmap import NodeStore
from xbfs_engine.catalog.fileindex.indexes import FileIndexes
from xbfs_engine.catalog.fileindex.records import FileIndex, IndexMount, IndexTree, Problem, VolumeIndex
from xbfs_engine.catalog.fileindex.root import MOUNTS_MAX, PROBLEMS_MAX, VOLUMES_MAX
from xbfs_engine.codec.keys import Role
from xbfs_engine.core.errors import (
    Cancelled,
    FormatTooNew,
    GuestError,
    GuestReaderFailed,
    IntegrityError,
    KeyNotHeld,
)
from xbfs_engine.guestfs.guest import GuestTree
from xbfs_engine.guestfs.volumes import VolumeStatus
from xbfs_engine.ingest.fileindex.reads import Changes, RecordedReads
from xbfs_engine.ingest.fileindex.segments import SegmentWriter
from xbfs_engine.ingest.fileindex.walk import Walk
from xbfs_engine.store.reader import ChunkReader
from xbfs_engine.store.session import WriteSession

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from contextlib import AbstractContextManager

    from xbfs_engine.catalog.catalog import Catalog
    from xbfs_engine.catalog.fileindex.records import DiskReads
    from xbfs_engine.catalog.fileindex.segment import Entry
    from xbfs_engine.catalog.restore_point import RestorePoint
    from xbfs_engine.guestfs.guest import Guest, VolumeRow
    from xbfs_engine.guestfs.volumes import Disk
    from xbfs_engine.store.index import ChunkIndex
    from xbfs_engine.store.repository import Repository

    OpenGuest = Callable[[Sequence[Disk]], AbstractContextManager[Guest]]
    """Opens a guest on disks, with whatever keys of volumes there are. Called once for every volume that is read."""


REPORT_ENTRIES: Final = 500
"""Entries between two looks at ``stop``: some 20 ms."""


class IndexProgress(NamedTuple):
    """How far a build is: the volume being listed, its entries so far, and volumes done."""

    volume: str
    entries: int
    done: int
    volumes: int


@dataclass(frozen=True, slots=True)
class IndexedPoint:
    """A file index that was built, and what it cost. ``stored_bytes``: new segments and the root.

    ``walked`` and ``taken``: the volumes that were listed, and those that were taken over from the index of ``base``.
    """

    index: FileIndex
    base: str | None
    walked: tuple[str, ...]
    taken: tuple[str, ...]
    segments_stored: int
    segments_shared: int
    stored_bytes: int
    elapsed_s: float


class _Listed(NamedTuple):
    """A volume that was walked; its segments get their places at the end."""

    volume: VolumeIndex
    segments: list[tuple[bytes, int, bytes]]
    places: dict[bytes, bytes]


class _Found(NamedTuple):
    """The volumes and the tree of the point, from its guest (``is_new``) or from the base; no volume is listed yet."""

    is_new: bool
    volumes: tuple[VolumeIndex, ...]
    notes: tuple[str, ...]
    tree: IndexTree
    reads: tuple[DiskReads, ...]


def index_point(
    repository: Repository,
    catalog: Catalog,
    chunk_index: ChunkIndex,
    point: RestorePoint,
    disks: Sequence[Disk],
    open_guest: OpenGuest,
    *,
    program: str,
    has_keys: bool = False,
    force: bool = False,
    report: Callable[[IndexProgress], None] = lambda progress: None,
    stop: Callable[[], bool] = lambda: False,
) -> IndexedPoint:
    """Build and put the file index of ``point``, whose ``disks`` are named by their numbers.

    A volume is taken over, without reading it, from the nearest earlier (else later) indexed point of the VM if no
    chunk has changed that was read to list it there, and the same ``program`` listed it. ``force`` lists everything and
    trusts no stored segment that it has not read. ``has_keys``: ``open_guest`` may open volumes that are locked.

    Memory: some 60 MiB, one directory of 32,768 names at a time, 130 bytes a directory. Raises KeyNotHeld (a node can
    not read stored data), Cancelled, StorageError, and IntegrityError if the point itself can not be read.
    """
    return _Build(
        repository, catalog, chunk_index, point, disks, open_guest, program, has_keys, force, report, stop
    ).run()


class _Build:
    """One build."""

    def __init__(
        self,
        repository: Repository,
        catalog: Catalog,
        chunk_index: ChunkIndex,
        point: RestorePoint,
        disks: Sequence[Disk],
        open_guest: OpenGuest,
        program: str,
        has_keys: bool,
        force: bool,
        report: Callable[[IndexProgress], None],
        stop: Callable[[], bool],
    ) -> None:
        if repository.keys.role is not Role.OWNER:
            raise KeyNotHeld("a file index is made by reading the point's disks, which this role can not")
        self._repository = repository
        self._point = point
        self._disks = disks
        self._open_guest = open_guest
        self._program = program
        self._has_keys = has_keys
        self._report = report
        self._stop = stop
        chunk_index.refresh()
        reader = ChunkReader(repository.storage, repository.keys, chunk_index)
        self._indexes = FileIndexes(repository, reader)
        base = self._nearest(catalog)
        self._base = None if base is None else base[1]
        self._changes = None if base is None or force else Changes(base[0], point, NodeStore(reader))
        self._session = WriteSession(repository, chunk_index)
        known = [segment for volume in self._base.volumes for segment in volume.segments] if self._base else []
        self._writer = SegmentWriter(repository, self._session, known, reader if force else None)

    def run(self) -> IndexedPoint:
        clock = self._repository.runtime.clock
        started = clock.monotonic_s()
        found = self._find()
        names = [volume.name for volume in found.volumes[:VOLUMES_MAX]]
        done: list[VolumeIndex | _Listed] = []
        for number, volume in enumerate(found.volumes[:VOLUMES_MAX]):
            taken = self._taken_over(volume.name, found.tree)
            if taken is not None:
                done.append(taken)
            elif found.is_new and volume.status != VolumeStatus.FILESYSTEM.value:
                done.append(volume)
            else:
                done.append(self._list(volume.name, found.tree, number, len(names)))
        self._writer.finish()
        index = FileIndex(
            point=self._point.id,
            program=self._program,
            made_ns=clock.now_ns(),
            notes=found.notes,
            tree=self._located(found.tree, done),
            volumes=tuple(self._placed(item) if isinstance(item, _Listed) else item for item in done),
            reads=found.reads,
        )
        size = self._indexes.put(index)
        return IndexedPoint(
            index=index,
            base=self._base.point if self._base and self._changes else None,
            walked=tuple(item.volume.name for item in done if isinstance(item, _Listed)),
            taken=tuple(item.name for item in done if isinstance(item, VolumeIndex) and item.segments),
            segments_stored=self._writer.stored,
            segments_shared=self._writer.shared,
            stored_bytes=self._session.metadata_bytes + size,
            elapsed_s=clock.monotonic_s() - started,
        )

    def _nearest(self, catalog: Catalog) -> tuple[RestorePoint, FileIndex] | None:
        """The indexed point of this VM next before this one, else next after it; damaged indexes are passed over."""
        indexed = self._indexes.points()
        others = [
            point
            for point in catalog.points()
            if point.vm_uuid == self._point.vm_uuid and point.id != self._point.id and point.id in indexed
        ]
        before = [point for point in others if point.time_ns <= self._point.time_ns]
        for point in (*reversed(before), *(point for point in others if point not in before)):
            try:
                index = self._indexes.get(point.id)
            except (IntegrityError, FormatTooNew):
                continue
            if index is not None:
                return point, index
        return None

    def _find(self) -> _Found:
        """Volumes and tree, as far as they are known without listing any."""
        base = self._base
        locked = base is not None and any(volume.status == VolumeStatus.LOCKED.value for volume in base.volumes)
        if base is not None and not (locked and self._has_keys) and self._same(base.reads):
            return _Found(False, base.volumes, base.notes, base.tree, base.reads)
        recorded = RecordedReads(self._point, self._disks)
        with self._open_guest(recorded.disks) as guest:
            rows = guest.volumes()
            try:
                tree, settled = guest.tree(), True
            except (GuestError, IntegrityError) as exc:
                tree, settled = GuestTree("", (), (f"the guest's tree can not be put together: {exc.message}",)), False
        reads = recorded.reads()
        volumes = tuple(_volume(row, reads) for row in rows.rows)
        mounts = tuple(
            IndexMount(mount.path, mount.volume, bytes(mount.node), None, mount.source)
            for mount in tree.mounts[:MOUNTS_MAX]
        )
        # Reads of no disk at all are never the same as those of another point.
        return _Found(True, volumes, rows.notes, IndexTree(tree.kind, mounts, tree.notes), reads if settled else ())

    def _same(self, reads: Sequence[DiskReads]) -> bool:
        """Whether this program would read the same again where the base was read."""
        return (
            self._changes is not None
            and self._base is not None
            and self._base.program == self._program
            and not self._changes.hit(reads)
        )

    def _taken_over(self, name: str, tree: IndexTree) -> VolumeIndex | None:
        """The volume as the base has it, if nothing that was read there has changed."""
        volume = None if self._base is None else self._base.volume(name)
        if volume is None or not volume.settled or (self._has_keys and volume.status == VolumeStatus.LOCKED.value):
            return None
        if not self._same(volume.reads):
            return None
        known = self._base_places()
        mounts = [mount for mount in tree.mounts if mount.volume == name]
        if all(mount.node == volume.root or (name, mount.node) in known for mount in mounts):
            return volume
        return None

    def _base_places(self) -> dict[tuple[str, bytes], bytes]:
        mounts = self._base.tree.mounts if self._base is not None else ()
        return {(mount.volume, mount.node): mount.inside for mount in mounts if mount.inside is not None}

    def _list(self, name: str, tree: IndexTree, number: int, total: int) -> _Listed:
        """Walk a volume in a guest opened for it alone, so that what is read is what this volume needs."""
        recorded = RecordedReads(self._point, self._disks)
        with self._open_guest(recorded.disks) as guest:
            row = next((row for row in guest.volumes().rows if row.name == name), None)
            if row is None:
                raise GuestReaderFailed(f"volume {name} was found once, but not a second time")
            walk = Walk(guest, name, [mount.node for mount in tree.mounts if mount.volume == name])
            segments: list[tuple[bytes, int, bytes]] = []
            state = reason = ""
            settled, problems = True, []
            try:
                info = guest.info(name)
                state, reason = info.state.value, info.reason
                segments = self._writer.write(self._watched(walk.entries(), name, number, total))
            except (GuestError, IntegrityError) as exc:
                settled = not isinstance(exc, (IntegrityError, GuestReaderFailed))
                problems = [Problem(b"", exc.message)]
        volume = replace(
            _volume(row, recorded.reads()),
            state=state,
            state_reason=reason,
            root=walk.root,
            settled=settled and walk.settled,
            entries=sum(entries for _, entries, _ in segments),
            problems=(*problems, *walk.problems)[:PROBLEMS_MAX],
            problems_omitted=walk.problems_omitted,
        )
        return _Listed(volume, segments, walk.places)

    def _watched(self, entries: Iterator[Entry], name: str, number: int, total: int) -> Iterator[Entry]:
        for count, entry in enumerate(entries):
            if count % REPORT_ENTRIES == 0:
                if self._stop():
                    raise Cancelled("the file index was not built; what was listed so far is not used")
                self._report(IndexProgress(name, count, number, total))
            yield entry

    def _placed(self, listed: _Listed) -> VolumeIndex:
        segments = tuple(self._writer.ref(segment) for segment in listed.segments)
        return replace(listed.volume, segments=segments)

    def _located(self, tree: IndexTree, done: Sequence[VolumeIndex | _Listed]) -> IndexTree:
        """The tree, its mounts with their paths within their volumes."""
        volumes = [item.volume if isinstance(item, _Listed) else item for item in done]
        places = self._base_places() | {(volume.name, volume.root): b"" for volume in volumes if volume.root}
        for item in done:
            if isinstance(item, _Listed):
                name = item.volume.name
                places = {key: path for key, path in places.items() if key[0] != name or not path}
                places |= {(name, node): path for node, path in item.places.items()}
        mounts = tuple(mount._replace(inside=places.get((mount.volume, mount.node))) for mount in tree.mounts)
        return replace(tree, mounts=mounts)


def _volume(row: VolumeRow, reads: tuple[DiskReads, ...]) -> VolumeIndex:
    """A volume of which nothing is listed."""
    return VolumeIndex(
        name=row.name,
        kind=row.kind,
        label=row.label,
        uuid=row.uuid,
        size_bytes=row.size_bytes,
        status=row.status.value,
        reason=row.reason,
        state="",
        state_reason="",
        root=b"",
        settled=True,
        entries=0,
        problems=(),
        problems_omitted=0,
        segments=(),
        reads=reads,
    )
