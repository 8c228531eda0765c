"""A disk in memory backed up and read back through the whole engine."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from tests.support.engine import Engine, MemorySource
from xbfs.view.disk import PointDisk
from xbfs_engine.catalog.blockmap import BlockMap, NodeStore
from xbfs_engine.store.cache import ChunkCache
from xbfs_engine.store.reader import ChunkReader

if TYPE_CHECKING:
    from tests.support.disks import MemoryDisk


def point_disk(disk: MemoryDisk) -> PointDisk:
    """The disk of a new restore point that holds what ``disk`` holds."""
    extents = [(extent.offset, extent.length) for extent in disk.extents(0, disk.size_bytes) if extent.is_data]
    source = MemorySource(disk.size_bytes, {offset: disk.read_at(offset, length) for offset, length in extents})
    with tempfile.TemporaryDirectory() as cache:
        engine = Engine.fresh(Path(cache))
        record = engine.backup(source).disks[0]
    reader = ChunkReader(engine.storage, engine.repository.keys)
    block_map = BlockMap(NodeStore(reader), record.root, record.chunks)
    return PointDisk(block_map, ChunkCache(reader), size_bytes=record.size_bytes, chunk_size=record.chunk_size)
