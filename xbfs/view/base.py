"""What a view reads from, and what it is: blocking, thread-safe random access.

``read_cached`` never waits, so an event loop may call it; ``read_at`` may wait for storage and decode many chunks,
so it is called from worker threads. This pair is the seam between the mount's control plane and any data plane.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence


Part = bytes | memoryview
"""A piece of an answer: a view of cached bytes where possible."""


def joined(parts: Sequence[Part]) -> bytes:
    """The pieces as one."""
    return bytes(parts[0]) if len(parts) == 1 else b"".join(parts)


def joined_cached(parts: Sequence[Part] | None) -> Part | None:
    """The pieces as one, without a copy of a single one; None if there are none to be had without waiting."""
    if parts is None:
        return None
    return parts[0] if len(parts) == 1 else b"".join(parts)


class Extent(NamedTuple):
    """A range of an image: data that must be read, or a hole that reads as zeros."""

    offset: int
    length: int
    is_data: bool


class RandomAccess(Protocol):
    """Immutable random-access bytes: a disk of a restore point, or an image file made of it."""

    @property
    def size_bytes(self) -> int:
        """Size in bytes; constant."""
        ...

    def read_at(self, offset: int, length: int) -> bytes:
        """The bytes of [offset, offset+length), clipped at the end. May block.

        Raises IntegrityError (never wrong bytes) or StorageError.
        """
        ...

    def read_cached(self, offset: int, length: int) -> bytes | memoryview | None:
        """The same bytes if no storage access and no decoding is needed, else None. Never blocks, never raises."""
        ...

    def parts_at(self, offset: int, length: int) -> Sequence[Part]:
        """``read_at`` in pieces, not copied together: what writev(2) takes. At most one for each chunk or segment."""
        ...

    def parts_cached(self, offset: int, length: int) -> Sequence[Part] | None:
        """``read_cached`` in pieces."""
        ...

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        """Alternating data and hole extents that cover [offset, offset+length), clipped at the end. May block."""
        ...
