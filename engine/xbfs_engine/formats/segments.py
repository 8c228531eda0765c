"""Segments: how any image format is described over a disk.

A layout answers, for any range of an image file, which bytes are literal, which come from the disk and which are
zero. It is computed by arithmetic, never held as a list: a 2040 GiB VHD has a million blocks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterator


class Literal(NamedTuple):
    """Bytes of the format itself: headers, tables, footers."""

    data: bytes


class DiskExtent(NamedTuple):
    """``length`` bytes of the disk from ``offset``; never reaches beyond the end of the disk."""

    offset: int
    length: int


class Zero(NamedTuple):
    """``length`` zero bytes that are in the image but on no disk."""

    length: int


Segment = Literal | DiskExtent | Zero


class Layout(Protocol):
    """An image format laid over one disk."""

    @property
    def size_bytes(self) -> int:
        """Size of the image file."""
        ...

    def segments(self, offset: int, length: int) -> Iterator[Segment]:
        """Segments that cover exactly [offset, offset+length), in order, clipped to the file's end."""
        ...
