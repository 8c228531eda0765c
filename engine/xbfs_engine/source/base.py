"""What a backup reads from: the size of a disk, where it may hold data, and its bytes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterator

Extent = tuple[int, int]
"""(offset, length) in bytes."""


class DiskSource(Protocol):
    """One disk as it stands still while it is read. Calls block; any thread may call."""

    @property
    def size_bytes(self) -> int:
        """Virtual size."""
        ...

    def data_extents(self) -> Iterator[Extent]:
        """Ascending, disjoint extents outside of which the disk is zero. Raises SourceUnreadable."""
        ...

    def read_ahead(self, reads: Iterator[Extent]) -> None:
        """Hear what will be read: exactly these calls of ``read_into``, ascending, disjoint, begun in this order.

        A source may fetch ahead of its readers, or ignore it. Called once before reading, or never; does not block.
        """
        ...

    def read_into(self, offset: int, view: memoryview) -> None:
        """Fill ``view`` from ``offset``; never short. Raises SourceUnreadable, SourceChanged, TransferFailed."""
        ...

    def check_unchanged(self) -> None:
        """Raise SourceChanged if the size is not what it was."""
        ...

    def close(self) -> None:
        """Let go of the disk."""
        ...
