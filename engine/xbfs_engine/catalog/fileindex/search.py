"""Finds files by name over many restore points of one VM, in about the time that one takes. Blocks its thread.

Segments that points share are decoded and matched once: what differs between points is all that more points cost.
Memory: the references to all distinct segments, and the matches in segments that overlap; not all matches.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from xbfs_engine.catalog.fileindex.places import VolumeView, view_of
from xbfs_engine.catalog.fileindex.segment import order
from xbfs_engine.core.errors import IntegrityError

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator

    from xbfs_engine.catalog.fileindex.glob import Pattern
    from xbfs_engine.catalog.fileindex.indexes import FileIndexes
    from xbfs_engine.catalog.fileindex.places import Shown
    from xbfs_engine.catalog.fileindex.records import FileIndex, SegmentRef
    from xbfs_engine.guestfs.base import Kind


class FoundVersion(NamedTuple):
    """A version of a file. ``points``: numbers of the indexes that hold it, ascending.

    ``gone``: the number of the first index after the last version of this path in which it is no more; None if the
    newest one that tells has it, in this or another version.
    """

    shown: Shown
    inside: bytes
    kind: Kind
    size_bytes: int
    mtime_ns: int
    points: tuple[int, ...]
    gone: int | None


class _Shared:
    """A segment and the indexes that have it, as bits."""

    __slots__ = ("mask", "ref")

    def __init__(self, ref: SegmentRef) -> None:
        self.ref = ref
        self.mask = 0


@dataclass(slots=True)
class _Volume:
    """A volume over all points. ``silent``: indexes in which it is, but could not be listed."""

    segments: dict[bytes, _Shared] = field(default_factory=dict)
    views: dict[VolumeView, int] = field(default_factory=dict)
    silent: int = 0


_Version = tuple["Kind", int, int]


class Search:
    """One search over the indexes of one VM, given oldest first and numbered from 0; each is looked at and let go."""

    def __init__(
        self,
        indexes: FileIndexes,
        roots: Iterable[FileIndex],
        pattern: Pattern,
        *,
        volume: str | None = None,
        kinds: Collection[Kind] = (),
    ) -> None:
        self._indexes = indexes
        self._pattern = pattern
        self._kinds = kinds
        self._volumes: dict[str, _Volume] = {}
        self._count = 0
        for number, root in enumerate(roots):
            self._count += 1
            for held in root.volumes:
                if volume is None or held.name == volume:
                    known = self._volumes.setdefault(held.name, _Volume())
                    view = view_of(root, held.name, in_tree=volume is None)
                    known.views[view] = known.views.get(view, 0) | 1 << number
                    known.silent |= (not held.root) << number
                    for segment in held.segments:
                        known.segments.setdefault(segment.ref.id, _Shared(segment)).mask |= 1 << number

    @property
    def volumes(self) -> list[str]:
        """The volumes that are searched."""
        return sorted(self._volumes)

    def versions(self, damaged: Callable[[SegmentRef, IntegrityError], None]) -> Iterator[FoundVersion]:
        """All versions by volume and path, of one path from old to new; ``damaged`` is told what can not be read."""
        for name in self.volumes:
            volume = self._volumes[name]
            shared = sorted(volume.segments.values(), key=lambda item: order(item.ref.first))
            pending: dict[bytes, dict[_Version, int]] = {}
            for item in shared:
                yield from self._flush(volume, pending, order(item.ref.first))
                try:
                    self._match(volume, item, pending)
                except IntegrityError as exc:
                    volume.silent |= item.mask
                    damaged(item.ref, exc)
            yield from self._flush(volume, pending, None)

    def _match(self, volume: _Volume, item: _Shared, pending: dict[bytes, dict[_Version, int]]) -> None:
        segment = self._indexes.segment(item.ref)
        may_match, on_path = self._pattern.may_match, self._pattern.on_path
        for number, name in enumerate(segment.names):
            if not may_match(name):
                continue
            path = segment.paths[number]
            views = (view for view, mask in volume.views.items() if mask & item.mask)
            if on_path and not any(self._pattern.matches(view.show(path).path) for view in views):
                continue
            entry = segment.entry(number)
            versions = pending.setdefault(segment.keys[number], {})
            version = (entry.kind, entry.size_bytes, entry.mtime_ns)
            versions[version] = versions.get(version, 0) | item.mask

    def _flush(
        self, volume: _Volume, pending: dict[bytes, dict[_Version, int]], before: bytes | None
    ) -> Iterator[FoundVersion]:
        """Tell the paths that no later segment can hold."""
        for key in sorted(key for key in pending if before is None or key < before):
            versions = pending.pop(key)
            held = 0
            for mask in versions.values():
                held |= mask
            gone = self._gone(volume, held)
            inside = key.replace(b"\0", b"/")
            for (kind, size, mtime_ns), mask in sorted(versions.items(), key=lambda item: item[1] & -item[1]):
                if self._kinds and kind not in self._kinds:
                    continue
                for view, seen in volume.views.items():
                    shown = view.show(inside)
                    if mask & seen and (not self._pattern.on_path or self._pattern.matches(shown.path)):
                        yield FoundVersion(shown, inside, kind, size, mtime_ns, _bits(mask & seen), gone)

    def _gone(self, volume: _Volume, held: int) -> int | None:
        after = held.bit_length()
        return next((number for number in range(after, self._count) if not volume.silent >> number & 1), None)


def _bits(mask: int) -> tuple[int, ...]:
    return tuple(number for number in range(mask.bit_length()) if mask >> number & 1)
