"""The file indexes of a repository: found by point, read, put; and their segments, decoded.

A root is ``files/<point id>/<generation>``; the highest generation counts, so that a damaged or outdated one is
replaced without overwriting. Any thread may use it; decoded segments are kept by id, bounded in bytes, so that what
points share is decoded once.
"""

from __future__ import annotations

import re
import threading
from collections import OrderedDict
from contextlib import suppress
from typing import TYPE_CHECKING, Final, NamedTuple

from xbfs_engine.catalog.fileindex.root import open_file_index, seal_file_index
from xbfs_engine.catalog.fileindex.segment import Segment
from xbfs_engine.codec.envelope import ObjectKind
from xbfs_engine.core.errors import BlobExists, BlobNotFound, IndexCorrupt, IntegrityError, StorageError
from xbfs_engine.core.ids import PointId
from xbfs_engine.core.limits import MIB, OBJECT_SIZE_MAX
from xbfs_engine.store.metadata import metadata_body

if TYPE_CHECKING:
    from collections.abc import Iterator

    from xbfs_engine.catalog.fileindex.records import FileIndex, SegmentRef
    from xbfs_engine.storage.base import BlobInfo, Storage
    from xbfs_engine.store.reader import ChunkReader
    from xbfs_engine.store.repository import Repository

PREFIX: Final = "files/"
NAME: Final = re.compile(r"files/([0-9a-f]{64})/([0-9]{8})")
CACHE_BYTES: Final = 48 * MIB
"""Decoded segments that are kept: some hundred of usual size."""
_TRIES: Final = 8


class Root(NamedTuple):
    """A root as listed."""

    name: str
    size_bytes: int


class FileIndexes:
    """Reads and puts file indexes. ``reader``'s locator finds segments whose place has become stale."""

    def __init__(self, repository: Repository, reader: ChunkReader) -> None:
        self._repository = repository
        self._reader = reader
        self._cache: OrderedDict[bytes, Segment] = OrderedDict()
        self._cached_bytes = 0
        self._lock = threading.Lock()

    def points(self) -> set[PointId]:
        """The points that have an index, whole or damaged: one listing. Raises StorageError."""
        return set(listed_roots(self._repository.storage))

    def get(self, point: PointId) -> FileIndex | None:
        """The index of a point, or None. Raises IndexCorrupt, FormatTooNew, StorageError."""
        for _ in range(_TRIES):
            generations = self._generations(point)
            if not generations:
                return None
            number = max(generations)
            try:
                return read_root(self._repository, point, Root(_name(point, number), generations[number]))
            except BlobNotFound:
                continue  # replaced since it was listed
        raise IndexCorrupt(f"the file index of {point[:12]} is being replaced over and over")

    def put(self, index: FileIndex) -> int:
        """Make an index that of its point: all its segments must be durable. Returns its bytes.

        What it replaces is removed where the storage allows it. Several may put at once: the last one counts.
        Raises IndexCorrupt, StorageError.
        """
        blob = seal_file_index(self._repository.keys, self._repository.runtime.random, index)
        open_file_index(self._repository.keys, index.point, blob)
        storage = self._repository.storage
        older = self._generations(index.point)
        number = max(older, default=0) + 1
        for _ in range(_TRIES):
            try:
                storage.put(_name(index.point, number), [blob])
                break
            except BlobExists:
                number += 1
        else:
            raise IndexCorrupt(f"the file index of {index.point[:12]} is being replaced over and over")
        for generation in older:
            with suppress(StorageError):
                storage.delete(_name(index.point, generation))
        return len(blob)

    def segment(self, ref: SegmentRef) -> Segment:
        """A decoded segment. Raises IndexCorrupt, BlobLost, FormatTooNew, StorageError."""
        with self._lock:
            known = self._cache.get(ref.ref.id)
            if known is not None:
                self._cache.move_to_end(ref.ref.id)
                return known
        try:
            segment = Segment(metadata_body(self._reader.fetch([ref.ref], ObjectKind.METADATA_PACK)[0]))
        except IndexCorrupt:
            raise
        except IntegrityError as exc:
            raise IndexCorrupt(f"a segment of a file index can not be read: {exc.message}") from exc
        if len(segment) != ref.entries or segment.paths[0] != ref.first:
            raise IndexCorrupt("a segment of a file index is not the one that the index names")
        with self._lock:
            if ref.ref.id not in self._cache:
                self._cache[ref.ref.id] = segment
                self._cached_bytes += segment.memory_bytes
            while self._cached_bytes > CACHE_BYTES and len(self._cache) > 1:
                _, dropped = self._cache.popitem(last=False)
                self._cached_bytes -= dropped.memory_bytes
        return segment

    def _generations(self, point: PointId) -> dict[int, int]:
        """Number to size of every generation there is."""
        named = _named(self._repository.storage.list_blobs(f"{PREFIX}{point}/"))
        return {int(match[2]): blob.size_bytes for match, blob in named}


def listed_roots(storage: Storage) -> dict[PointId, Root]:
    """The newest root of every point that has one, by one listing. Raises StorageError."""
    found: dict[PointId, Root] = {}
    for match, blob in _named(storage.list_blobs(PREFIX)):
        point, root = PointId(match[1]), Root(blob.name, blob.size_bytes)
        if point not in found or found[point] < root:
            found[point] = root
    return found


def read_root(repository: Repository, point: PointId, root: Root) -> FileIndex:
    """One root. Raises IndexCorrupt, FormatTooNew; BlobNotFound if it was replaced; StorageError."""
    if root.size_bytes > OBJECT_SIZE_MAX:
        raise IndexCorrupt(f"the file index of {point[:12]} has {root.size_bytes} bytes: more than {OBJECT_SIZE_MAX}")
    return open_file_index(repository.keys, point, repository.storage.read(root.name, 0, root.size_bytes))


def _named(blobs: Iterator[BlobInfo]) -> Iterator[tuple[re.Match[str], BlobInfo]]:
    for blob in blobs:
        match = NAME.fullmatch(blob.name)
        if match:
            yield match, blob


def _name(point: PointId, generation: int) -> str:
    return f"{PREFIX}{point}/{generation:08d}"
