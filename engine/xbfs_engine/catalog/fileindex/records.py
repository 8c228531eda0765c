"""What a file index says of a restore point. Records only; their bytes are ``root``'s."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from xbfs_engine.core.ids import ChunkRef, PointId


class SegmentRef(NamedTuple):
    """A segment: where it lies, how many entries it has and the path of the first."""

    ref: ChunkRef
    entries: int
    first: bytes


class DiskReads(NamedTuple):
    """Which chunks of a disk were read: ``ranges`` are (first chunk, chunks), ascending and apart."""

    disk: int
    size_bytes: int
    chunk_size: int
    ranges: tuple[tuple[int, int], ...]


class Problem(NamedTuple):
    """What could not be read: a directory or file by its path within the volume, empty for the volume, and why."""

    path: bytes
    message: str


@dataclass(frozen=True, slots=True)
class VolumeIndex:
    """A volume of a restore point and its entries.

    ``status`` and ``reason`` are those of the search for volumes, ``state`` and ``state_reason`` the filesystem's,
    empty if there is none. ``settled``: reading it again would give the same; not so if the repository or the reader
    failed. ``reads``: every chunk that was read to find, open and list it.
    """

    name: str
    kind: str
    label: str
    uuid: str
    size_bytes: int
    status: str
    reason: str
    state: str
    state_reason: str
    root: bytes
    settled: bool
    entries: int
    problems: tuple[Problem, ...]
    problems_omitted: int
    segments: tuple[SegmentRef, ...]
    reads: tuple[DiskReads, ...]


class IndexMount(NamedTuple):
    """A directory that the guest shows at ``path`` (absolute).

    ``inside``: its path within the volume, empty for its root; None if the index of the volume does not have it.
    ``node`` is the reader's id of it.
    """

    path: bytes
    volume: str
    node: bytes
    inside: bytes | None
    source: str


@dataclass(frozen=True, slots=True)
class IndexTree:
    """How the guest puts its volumes together; see ``guestfs.guest.GuestTree``."""

    kind: str
    mounts: tuple[IndexMount, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class FileIndex:
    """The file index of a restore point. ``reads``: what was read to find its volumes and its tree."""

    point: PointId
    program: str
    made_ns: int
    notes: tuple[str, ...]
    tree: IndexTree
    volumes: tuple[VolumeIndex, ...]
    reads: tuple[DiskReads, ...]

    @property
    def entries(self) -> int:
        """Entries of all volumes."""
        return sum(volume.entries for volume in self.volumes)

    def volume(self, name: str) -> VolumeIndex | None:
        """The volume of that name."""
        return next((volume for volume in self.volumes if volume.name == name), None)
