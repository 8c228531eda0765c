"""A whole engine on any storage, for tests: cheap repositories, sources that count, and full read back."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING

import trio

from tests.support.runtime import FixedClock, SeededRandom
from xbfs_engine.catalog.blockmap import BlockMap, NodeStore
from xbfs_engine.catalog.catalog import Catalog
from xbfs_engine.codec.config import Parameters
from xbfs_engine.codec.envelope import ObjectKind
from xbfs_engine.codec.slots import KdfParameters
from xbfs_engine.core.errors import SourceChanged
from xbfs_engine.core.limits import KIB, LEAF_FANOUT, MIB, NODE_FANOUT
from xbfs_engine.core.runtime import Runtime, SystemRandom
from xbfs_engine.ingest.backup import BackupRequest, BackupRun, DiskJob
from xbfs_engine.storage.local import LocalStorage
from xbfs_engine.storage.memory import MemoryStorage
from xbfs_engine.store.index import ChunkIndex
from xbfs_engine.store.reader import ChunkReader
from xbfs_engine.store.repository import create_repository, open_repository

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from multiprocessing.connection import Connection

    from xbfs_engine.catalog.restore_point import DiskRecord, RestorePoint
    from xbfs_engine.ingest.statistics import Progress
    from xbfs_engine.source.base import Extent
    from xbfs_engine.storage.base import Storage
    from xbfs_engine.store.repository import Repository

CHUNK = 64 * KIB
LEAF = LEAF_FANOUT * CHUNK
PASSPHRASE = "correct horse"
CHEAP_KDF = KdfParameters(iterations=1, lanes=1, memory_kib=8)
SMALL = Parameters(CHUNK, LEAF_FANOUT, NODE_FANOUT, 1 * MIB, 1)
"""The smallest packs allowed: 16 incompressible chunks fill one."""


class MemorySource:
    """A disk in memory that counts what is read of it. ``pieces``: offset to bytes; everything else is zero."""

    def __init__(self, size_bytes: int, pieces: Mapping[int, bytes], extents: Sequence[Extent] | None = None) -> None:
        self.size_bytes = size_bytes
        self.pieces = dict(sorted(pieces.items()))
        self.extents = list(extents) if extents is not None else [(at, len(data)) for at, data in self.pieces.items()]
        self.reads: list[Extent] = []
        self.announced: Iterator[Extent] = iter(())
        self.changed_size: int | None = None
        self.before_read: Callable[[int], None] = lambda offset: None
        self._lock = Lock()

    @classmethod
    def of(cls, content: bytes | bytearray) -> MemorySource:
        """A disk that says that all of it may hold data."""
        return cls(len(content), {0: bytes(content)} if content else {})

    @property
    def read_bytes(self) -> int:
        return sum(length for _, length in self.reads)

    def data_extents(self) -> Iterator[Extent]:
        return iter(self.extents)

    def read_ahead(self, reads: Iterator[Extent]) -> None:
        self.announced = reads

    def read_into(self, offset: int, view: memoryview) -> None:
        self.before_read(offset)
        end = offset + len(view)
        assert end <= self.size_bytes, "nobody may read beyond the disk"
        with self._lock:
            self.reads.append((offset, len(view)))
        view[:] = bytes(len(view))
        for at, data in self.pieces.items():
            low, high = max(at, offset), min(at + len(data), end)
            if low < high:
                view[low - offset : high - offset] = data[low - at : high - at]

    def check_unchanged(self) -> None:
        if self.changed_size is not None:
            raise SourceChanged(f"the disk had {self.size_bytes} bytes and has {self.changed_size}")

    def close(self) -> None:
        pass


@lru_cache(maxsize=1)
def _fresh_blobs() -> tuple[tuple[str, bytes], ...]:
    storage = MemoryStorage()
    create_repository(
        storage,
        Runtime(FixedClock(), SeededRandom(1)),
        passphrase=PASSPHRASE,
        label="test",
        parameters=SMALL,
        kdf=CHEAP_KDF,
    )
    return tuple((blob.name, storage.get(blob.name)) for blob in storage.list_blobs(""))


def make_repository(storage: Storage) -> None:
    """Make ``storage`` the small repository that all tests share: they differ in what is backed up into it."""
    for name, data in _fresh_blobs():
        storage.put(name, [data])


class Engine:
    """One process's view of a repository: keys, catalog, index cache. Make another for another process."""

    def __init__(self, storage: Storage, cache: Path, *, clock: FixedClock | None = None) -> None:
        self.clock = clock or FixedClock()
        # Pack keys must differ between engines, as those of processes do.
        self._use(open_repository(storage, Runtime(self.clock, SystemRandom()), PASSPHRASE), cache)

    @classmethod
    def of(cls, repository: Repository, cache: Path) -> Engine:
        """On a repository that was opened otherwise."""
        engine = cls.__new__(cls)
        engine._use(repository, cache)
        return engine

    def _use(self, repository: Repository, cache: Path) -> None:
        self.repository = repository
        self.storage = repository.storage
        self.catalog = Catalog(repository)
        self.index = ChunkIndex(repository.storage, repository.keys, cache)

    @classmethod
    def fresh(cls, cache: Path, storage: Storage | None = None) -> Engine:
        """On a new repository."""
        storage = storage or MemoryStorage()
        make_repository(storage)
        return cls(storage, cache)

    def run(
        self,
        disks: Mapping[int, tuple[MemorySource, Sequence[Extent] | None]],
        *,
        vm_uuid: str = "vm-1",
        threads: int = 2,
        new_chain: bool = False,
        report: Callable[[Progress], None] = lambda progress: None,
    ) -> BackupRun:
        jobs = [
            DiskJob(number, f"disk {number}", f"vdi-{number}", source, changed, "test")
            for number, (source, changed) in disks.items()
        ]
        request = BackupRequest(
            "vm", vm_uuid, jobs, node="node", program="test", vm={}, threads=threads, new_chain=new_chain
        )
        return BackupRun(self.repository, self.catalog, self.index, request, report)

    def backup(
        self,
        *sources: MemorySource | bytes | bytearray,
        changed: Sequence[Extent] | None = None,
        vm_uuid: str = "vm-1",
        threads: int = 2,
        new_chain: bool = False,
    ) -> RestorePoint:
        """Back up disks 0, 1, ... of a VM; ``changed`` is that of disk 0."""
        opened = [MemorySource.of(source) if isinstance(source, (bytes, bytearray)) else source for source in sources]
        disks = {number: (source, changed if number == 0 else None) for number, source in enumerate(opened)}
        return trio.run(self.run(disks, vm_uuid=vm_uuid, threads=threads, new_chain=new_chain).run)

    def points(self) -> list[RestorePoint]:
        self.catalog.refresh()
        return self.catalog.points()

    def block_map(self, disk: DiskRecord) -> BlockMap:
        reader = ChunkReader(self.storage, self.repository.keys, self.index)
        return BlockMap(NodeStore(reader), disk.root, disk.chunks)

    def chunks(self, disk: DiskRecord) -> dict[int, bytes]:
        """All chunks that exist, by position."""
        reader = ChunkReader(self.storage, self.repository.keys, self.index)
        found: dict[int, bytes] = {}
        for number, leaf in self.block_map(disk).leaves():
            children = list(leaf.children())
            data = reader.fetch([ref for _, ref in children], ObjectKind.DATA_PACK)
            found |= {number * LEAF_FANOUT + slot: bytes(d) for (slot, _), d in zip(children, data, strict=True)}
        return found

    def read(self, disk: DiskRecord) -> bytes:
        """The whole disk."""
        content = bytearray(disk.size_bytes)
        for position, data in self.chunks(disk).items():
            start = position * disk.chunk_size
            assert len(data) == min(disk.chunk_size, disk.size_bytes - start), "a chunk fills its place"
            content[start : start + len(data)] = data
        return bytes(content)


def pattern(seed: int, size_bytes: int = CHUNK) -> bytes:
    """Incompressible bytes that only ``seed`` and the size decide."""
    return SeededRandom(seed).token(size_bytes)


def blobs(storage: Storage, prefix: str = "") -> dict[str, bytes]:
    """Every blob of a storage."""
    return {blob.name: storage.get(blob.name) for blob in storage.list_blobs(prefix)}


def content_of(seed: int) -> bytes:
    """A disk of a few packs: most of it shared by all seeds, a third their own."""
    return pattern(0, 24 * CHUNK) + pattern(seed, 12 * CHUNK + seed % 1000)


def back_up_repeatedly(root: str, cache: str, first: int, count: int, committed: Connection) -> None:
    """In a process of its own: points of VM "vm-<seed>" for ``count`` seeds from ``first``; sends each one's id."""
    engine = Engine(LocalStorage(Path(root)), Path(cache))
    committed.send("ready")
    for seed in range(first, first + count):
        committed.send(engine.backup(content_of(seed), vm_uuid=f"vm-{seed}").id)
    committed.send("done")
