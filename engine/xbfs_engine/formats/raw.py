"""The raw image: the disk itself, byte for byte. Stateless and immutable: any thread may call it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from xbfs_engine.formats.segments import DiskExtent, Segment

if TYPE_CHECKING:
    from collections.abc import Iterator


class RawLayout:
    """A disk of ``disk_size`` bytes (any size, also 0) shown as it is."""

    __slots__ = ("_disk_size",)

    def __init__(self, disk_size: int) -> None:
        self._disk_size = disk_size

    @property
    def size_bytes(self) -> int:
        """Size of the image file: that of the disk."""
        return self._disk_size

    def segments(self, offset: int, length: int) -> Iterator[Segment]:
        """At most one disk extent: [offset, offset+length) clipped to the disk."""
        end = min(offset + length, self._disk_size)
        if offset < end:
            yield DiskExtent(offset, end - offset)
