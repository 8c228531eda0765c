"""A guest's disk in a repository, and its file index."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from tests.support.engine import CHUNK, Engine, MemorySource
from xbfs.view.disk import PointDisk
from xbfs_engine.catalog.blockmap import BlockMap, NodeStore
from xbfs_engine.catalog.fileindex.indexes import FileIndexes
from xbfs_engine.guestfs.reading import GuestReading
from xbfs_engine.guestfs.volumes import Disk
from xbfs_engine.ingest.fileindex.build import IndexedPoint, index_point
from xbfs_engine.store.cache import ChunkCache
from xbfs_engine.store.reader import ChunkReader

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from tests.support.guest_sources import SparseSource
    from xbfs_engine.catalog.restore_point import RestorePoint
    from xbfs_engine.guestfs.guest import Guest


def source_of(image: SparseSource) -> MemorySource:
    """An image to be backed up."""
    pieces = {}
    for at in range(0, image.size_bytes, CHUNK):
        data = image.read_at(at, min(CHUNK, image.size_bytes - at))
        if data.strip(b"\0"):
            pieces[at] = data
    return MemorySource(image.size_bytes, pieces)


class Indexing:
    """An engine that builds and reads file indexes; ``opened`` counts the guests that were opened."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.opened = 0
        self.wrap: Callable[[Guest], Guest] = lambda guest: guest

    def disks(self, point: RestorePoint) -> list[Disk]:
        reader = ChunkReader(self.engine.storage, self.engine.repository.keys, self.engine.index)
        nodes, cache = NodeStore(reader), ChunkCache(reader)
        return [
            Disk(
                str(disk.number),
                PointDisk(
                    BlockMap(nodes, disk.root, disk.chunks),
                    cache,
                    size_bytes=disk.size_bytes,
                    chunk_size=disk.chunk_size,
                ),
            )
            for disk in point.disks
        ]

    @contextmanager
    def guest(self, disks: Sequence[Disk]) -> Iterator[Guest]:
        self.opened += 1
        yield self.wrap(GuestReading(disks))

    def build(self, point: RestorePoint, *, program: str = "test 1", force: bool = False) -> IndexedPoint:
        return index_point(
            self.engine.repository,
            self.engine.catalog,
            self.engine.index,
            point,
            self.disks(point),
            self.guest,
            program=program,
            force=force,
        )

    @property
    def indexes(self) -> FileIndexes:
        reader = ChunkReader(self.engine.storage, self.engine.repository.keys, self.engine.index)
        return FileIndexes(self.engine.repository, reader)
