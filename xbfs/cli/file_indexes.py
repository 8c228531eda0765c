"""What the verbs about files of guests start from: indexes of restore points, read or built.

Guests are read in sandboxed processes only. One thread.
"""

from __future__ import annotations

from contextlib import closing, contextmanager
from typing import TYPE_CHECKING, Final

from xbfs import __version__
from xbfs.cli import text
from xbfs.cli.context import index_of
from xbfs.cli.file_text import path_text
from xbfs.cli.points import ID_DIGITS
from xbfs.cli.progress import ProgressLine
from xbfs.cli.volume_keys import given_keys
from xbfs_engine.catalog.fileindex.indexes import FileIndexes
from xbfs_engine.core.errors import Cancelled, FormatTooNew, GuestError, IntegrityError, XbfsError
from xbfs_engine.core.limits import MIB
from xbfs_engine.store.reader import ChunkReader

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from contextlib import AbstractContextManager

    from xbfs.cli.output import Output
    from xbfs_engine.catalog.blockmap import NodeStore
    from xbfs_engine.catalog.catalog import Catalog
    from xbfs_engine.catalog.fileindex.records import FileIndex
    from xbfs_engine.catalog.restore_point import RestorePoint
    from xbfs_engine.guestfs.guest import Guest
    from xbfs_engine.guestfs.volumes import Disk
    from xbfs_engine.ingest.fileindex.build import IndexedPoint, IndexProgress, OpenGuest
    from xbfs_engine.store.cache import ChunkCache
    from xbfs_engine.store.repository import Repository

CACHE_BYTES: Final = 64 * MIB
"""Decoded chunks that are kept while guests are read: metadata is read in many small pieces."""
_NAMED_MAX: Final = 8


class Indexing:
    """Builds and reads file indexes for one command."""

    def __init__(self, repository: Repository, catalog: Catalog, output: Output) -> None:
        self._repository = repository
        self._catalog = catalog
        self._output = output
        self._chunk_index = index_of(repository)
        self._reader = ChunkReader(repository.storage, repository.keys, self._chunk_index)
        self._keys = given_keys()
        self._caches: tuple[NodeStore, ChunkCache] | None = None
        self.indexes = FileIndexes(repository, self._reader)

    def roots(
        self, points: Sequence[RestorePoint], held: list[RestorePoint], *, build: bool = False
    ) -> Iterator[FileIndex]:
        """The indexes of ``points``; each point that has one is appended to ``held``, the others are a warning."""
        if build:
            indexed = self.indexes.points()
            self.build([point for point in points if point.id not in indexed])
        missing = []
        for point in points:
            root = self._root(point)
            if root is None:
                missing.append(point)
            else:
                held.append(point)
                yield root
        if missing:
            ids = ", ".join(point.id[:ID_DIGITS] for point in missing[:_NAMED_MAX])
            more = f" and {len(missing) - _NAMED_MAX} more" if len(missing) > _NAMED_MAX else ""
            self._output.warn(
                f"left out for want of a file index: {len(missing)} of {text.count(len(points), 'restore point')} of"
                f" {missing[0].vm_name}: {ids}{more}",
                f"run `xbfs index {missing[0].vm_name} --all`, or this command with --build",
            )

    def root(self, point: RestorePoint, *, build: bool = False) -> FileIndex | None:
        """The index of one point, or None with a warning."""
        return next(self.roots([point], [], build=build), None)

    def _root(self, point: RestorePoint) -> FileIndex | None:
        try:
            return self.indexes.get(point.id)
        except (IntegrityError, FormatTooNew) as exc:
            self._output.warn(
                f"the file index of {point.id[:ID_DIGITS]} can not be used: {exc.message}",
                f"build it anew: xbfs index {point.id[:ID_DIGITS]} --force",
            )
            return None

    def build(
        self,
        points: Sequence[RestorePoint],
        *,
        force: bool = False,
        done: Callable[[RestorePoint, IndexedPoint], None] = lambda point, built: None,
    ) -> int:
        """Build the indexes of ``points``, oldest first; what fails is a warning. Returns how many were built.

        Raises StorageError, KeyError_, Cancelled.
        """
        built = 0
        if points:
            with self._guests() as opened, ProgressLine(self._output, self._repository.runtime.clock) as line:
                for point in sorted(points, key=lambda each: each.time_ns):
                    indexed = self._build_one(point, opened, line, force=force)
                    if indexed is not None:
                        built += 1
                        done(point, indexed)
        return built

    def _build_one(
        self, point: RestorePoint, open_guest: OpenGuest, line: ProgressLine, *, force: bool
    ) -> IndexedPoint | None:
        from xbfs_engine.ingest.fileindex.build import index_point

        def report(now: IndexProgress) -> None:
            label = f"index {point.vm_name} {text.when(point.time_ns)} volume {path_text(now.volume.encode())}"
            line.update(label, now.entries, 0, items=True, note="files")

        try:
            return index_point(
                self._repository,
                self._catalog,
                self._chunk_index,
                point,
                self._disks(point),
                open_guest,
                program=f"xbfs {__version__}",
                has_keys=bool(self._keys),
                force=force,
                report=report,
            )
        except (GuestError, IntegrityError) as exc:
            self._output.warn(
                f"restore point {point.id[:ID_DIGITS]} of {point.vm_name} was not indexed: {exc.message}", exc.hint
            )
            return None

    def _disks(self, point: RestorePoint) -> list[Disk]:
        """The point's disks, over caches that all points share."""
        from xbfs.view.guests import guest_disks
        from xbfs_engine.catalog.blockmap import NodeStore
        from xbfs_engine.store.cache import ChunkCache

        if self._caches is None:
            self._caches = (NodeStore(self._reader), ChunkCache(self._reader, CACHE_BYTES))
        return guest_disks(point, *self._caches)

    @contextmanager
    def _guests(self) -> Iterator[OpenGuest]:
        """A way to open guests, each in a sandboxed process of its own."""
        from xbfs_engine.guestfs.worker.client import GuestWorkers

        with GuestWorkers(self._repository.runtime.clock, workers_max=1) as workers:

            def opened(disks: Sequence[Disk]) -> AbstractContextManager[Guest]:
                return closing(workers.open("file index", disks, self._keys))

            yield opened


def index_new(repository: Repository, catalog: Catalog, points: Sequence[RestorePoint], output: Output) -> None:
    """Index points that a backup has just made. They are complete without: what goes wrong is a warning."""
    try:
        catalog.refresh()
        built = Indexing(repository, catalog, output).build(points)
    except Cancelled:
        raise
    except XbfsError as exc:
        output.warn(f"no file index was built: {exc.message}", exc.hint)
    else:
        output.say(f"{text.count(built, 'restore point')} indexed for find, history and diff --files")
