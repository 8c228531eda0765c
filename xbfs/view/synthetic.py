"""An image file that exists nowhere: a layout resolved over a disk.

Owns the answer to reads and to the question where holes are; what lies where is the layout's, bytes are the disk's.
Holds no state of its own, so any number of threads may call it at once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from xbfs.view.base import Extent, joined, joined_cached
from xbfs_engine.formats.segments import DiskExtent, Literal, Segment

if TYPE_CHECKING:
    from collections.abc import Iterator

    from xbfs.view.base import Part, RandomAccess
    from xbfs_engine.formats.segments import Layout


class SyntheticImage:
    """The image file that ``layout`` makes of ``disk``; the layout was made for a disk of this size."""

    __slots__ = ("_disk", "_layout")

    def __init__(self, layout: Layout, disk: RandomAccess) -> None:
        self._layout = layout
        self._disk = disk

    @property
    def size_bytes(self) -> int:
        """Size of the image file."""
        return self._layout.size_bytes

    def read_at(self, offset: int, length: int) -> bytes:
        """The bytes of [offset, offset+length), clipped at the end. May block.

        Raises what reading the disk raises.
        """
        return joined(self.parts_at(offset, length))

    def read_cached(self, offset: int, length: int) -> bytes | memoryview | None:
        """The same bytes if the disk has all it must give cached, else None. Never blocks, never raises."""
        return joined_cached(self.parts_cached(offset, length))

    def parts_at(self, offset: int, length: int) -> list[Part]:
        """``read_at`` in pieces: the disk's own, and one for each other segment."""
        parts: list[Part] = []
        for segment in self._layout.segments(offset, length):
            if isinstance(segment, DiskExtent):
                found = self._disk.parts_at(segment.offset, segment.length)
                assert sum(map(len, found)) == segment.length
                parts += found
            else:
                parts.append(_own_bytes(segment))
        return parts

    def parts_cached(self, offset: int, length: int) -> list[Part] | None:
        """``read_cached`` in pieces."""
        parts: list[Part] = []
        for segment in self._layout.segments(offset, length):
            if isinstance(segment, DiskExtent):
                found = self._disk.parts_cached(segment.offset, segment.length)
                if found is None:
                    return None
                parts += found
            else:
                parts.append(_own_bytes(segment))
        return parts

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        """Alternating data and hole extents that cover [offset, offset+length), clipped at the end. May block."""
        current: Extent | None = None
        for piece in self._pieces(offset, length):
            if current is None:
                current = piece
            elif current.is_data == piece.is_data:
                current = Extent(current.offset, current.length + piece.length, current.is_data)
            else:
                yield current
                current = piece
        if current is not None:
            yield current

    def _pieces(self, offset: int, length: int) -> Iterator[Extent]:
        """Extents as they come; neighbours may be of one kind."""
        for segment in self._layout.segments(offset, length):
            if isinstance(segment, DiskExtent):
                for extent in self._disk.extents(segment.offset, segment.length):
                    yield Extent(offset, extent.length, extent.is_data)
                    offset += extent.length
            else:
                is_data = isinstance(segment, Literal)
                size = len(segment.data) if isinstance(segment, Literal) else segment.length
                yield Extent(offset, size, is_data)
                offset += size


def _own_bytes(segment: Segment) -> bytes:
    return segment.data if isinstance(segment, Literal) else bytes(segment.length)
