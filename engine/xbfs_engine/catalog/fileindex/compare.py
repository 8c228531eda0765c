"""What differs between two indexes, and single files of one: only the segments needed are read. Blocks its thread."""

from __future__ import annotations

from bisect import bisect_right
from enum import Enum
from itertools import chain
from typing import TYPE_CHECKING, NamedTuple

from xbfs_engine.catalog.fileindex.segment import order
from xbfs_engine.guestfs.base import Kind

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from xbfs_engine.catalog.fileindex.indexes import FileIndexes
    from xbfs_engine.catalog.fileindex.records import SegmentRef, VolumeIndex
    from xbfs_engine.catalog.fileindex.segment import Entry


class ChangeKind(Enum):
    """What became of a path."""

    ADDED = "added"
    REMOVED = "removed"
    CHANGED = "changed"


class Change(NamedTuple):
    """A path that differs. ``fields``: of a changed one, which of kind, size, mtime, ctime and inode do."""

    kind: ChangeKind
    old: Entry | None
    new: Entry | None
    fields: tuple[str, ...]

    @property
    def path(self) -> bytes:
        """The path within the volume."""
        entry = self.new or self.old
        assert entry is not None
        return entry.path


def lookup(indexes: FileIndexes, volume: VolumeIndex, path: bytes) -> Entry | None:
    """The entry of exactly that path. Raises IndexCorrupt, StorageError."""
    key = order(path)
    number = bisect_right(volume.segments, key, key=lambda segment: order(segment.first)) - 1
    if number < 0:
        return None
    segment = indexes.segment(volume.segments[number])
    at = bisect_right(segment.keys, key) - 1
    return segment.entry(at) if at >= 0 and segment.keys[at] == key else None


def differences(indexes: FileIndexes, old: VolumeIndex | None, new: VolumeIndex | None) -> Iterator[Change]:
    """Paths that differ, ascending; None is a volume that holds nothing. Memory does not grow with the volumes.

    A directory of which only size or times differ is left out: what changed in it is listed itself. Segments that both
    have are not read: no path is in two segments of a volume. Raises IndexCorrupt, StorageError.
    """
    before, after = (volume.segments if volume else () for volume in (old, new))
    shared = {segment.ref.id for segment in before} & {segment.ref.id for segment in after}
    olds, news = (_entries(indexes, segments, shared) for segments in (before, after))
    old_entry, new_entry = next(olds, None), next(news, None)
    while old_entry or new_entry:
        old_key = order(old_entry.path) if old_entry else None
        new_key = order(new_entry.path) if new_entry else None
        if old_entry and (new_key is None or (old_key is not None and old_key < new_key)):
            yield Change(ChangeKind.REMOVED, old_entry, None, ())
            old_entry = next(olds, None)
        elif new_entry and old_key != new_key:
            yield Change(ChangeKind.ADDED, None, new_entry, ())
            new_entry = next(news, None)
        elif old_entry and new_entry:
            fields = _differing(old_entry, new_entry)
            if fields:
                yield Change(ChangeKind.CHANGED, old_entry, new_entry, fields)
            old_entry, new_entry = next(olds, None), next(news, None)


def _entries(indexes: FileIndexes, segments: Iterable[SegmentRef], without: set[bytes]) -> Iterator[Entry]:
    def of(ref: SegmentRef) -> Iterator[Entry]:
        segment = indexes.segment(ref)
        return map(segment.entry, range(len(segment)))

    return chain.from_iterable(of(ref) for ref in segments if ref.ref.id not in without)


def _differing(old: Entry, new: Entry) -> tuple[str, ...]:
    fields = [
        ("kind", old.kind is not new.kind),
        ("size", old.size_bytes != new.size_bytes),
        ("mtime", old.mtime_ns != new.mtime_ns),
        ("ctime", old.ctime_ns != new.ctime_ns),
        ("inode", old.inode != new.inode),
    ]
    found = tuple(name for name, differs in fields if differs)
    if old.kind is new.kind is Kind.DIRECTORY and not set(found) & {"inode"}:
        return ()
    return found
