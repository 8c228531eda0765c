"""The guest of a restore point: its disks by number, exactly read, in a sandboxed worker."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.support.engine import Engine, MemorySource
from tests.support.guest_golden import image
from tests.support.guest_sources import CHUNK
from xbfs.view.guests import guest_disks, open_guest
from xbfs_engine.catalog.blockmap import NodeStore
from xbfs_engine.core.errors import SourceUnreadable
from xbfs_engine.core.runtime import SystemClock
from xbfs_engine.guestfs.worker.client import GuestWorkers
from xbfs_engine.storage.memory import MemoryStorage
from xbfs_engine.store.cache import ChunkCache
from xbfs_engine.store.reader import ChunkReader

if TYPE_CHECKING:
    from pathlib import Path


def test_a_point_is_read_as_a_guest(tmp_path: Path) -> None:
    source = image("ext4")
    engine = Engine.fresh(tmp_path / "cache", MemoryStorage())
    engine.backup(MemorySource(source.size_bytes, {number * CHUNK: data for number, data in source.chunks.items()}))
    (point,) = engine.points()
    reader = ChunkReader(engine.storage, engine.repository.keys)
    nodes, cache = NodeStore(reader), ChunkCache(reader)
    (disk,) = guest_disks(point, nodes, cache)
    assert (disk.name, disk.source.size_bytes) == ("0", source.size_bytes)
    assert disk.source.read_at(1024, 5000) == source.read_at(1024, 5000)
    for offset, length in ((source.size_bytes - 1, 2), (-1, 1), (0, -1)):
        with pytest.raises(SourceUnreadable):
            disk.source.read_at(offset, length)
    with GuestWorkers(SystemClock()) as workers:
        guest = open_guest(workers, point, nodes, cache)
        assert workers.live == 0
        assert [row.kind for row in guest.volumes().rows] == ["ext4"]
        assert guest.lookup("0", guest.root("0"), b"lost+found") is not None
