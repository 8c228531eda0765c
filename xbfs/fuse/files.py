"""Open files by handle: what both planes of the mount read from. Handles are never reused. Any thread may look."""

from __future__ import annotations

from itertools import count
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from xbfs.vfs.handles import OpenFile
    from xbfs.vfs.live.handles import WritableFile


class OpenFiles:
    """Images and guests' files (``images``), and texts: files whose content was fixed when they were opened.

    Those images that can be written to are in ``writable`` too.
    ``open_settled`` opens a directory, by inode, that lists the same for ever; None if it is no such directory.
    ``link_target`` is where one of the mount's own links leads; None if it is none of them.
    """

    def __init__(self) -> None:
        self.open_settled: Callable[[int], int | None] = lambda _: None
        self.link_target: Callable[[int], bytes | None] = lambda _: None
        self._numbers = count(1)
        self.images: dict[int, OpenFile] = {}
        self.texts: dict[int, bytes] = {}
        self.writable: dict[int, WritableFile] = {}

    def add_image(self, image: OpenFile) -> int:
        """The handle of a newly opened image."""
        number = next(self._numbers)
        self.images[number] = image
        return number

    def add_writable(self, file: WritableFile) -> int:
        """The handle of a newly opened file that can be written to."""
        number = self.add_image(file)
        self.writable[number] = file
        return number

    def add_text(self, text: bytes) -> int:
        """The handle of a newly opened text."""
        number = next(self._numbers)
        self.texts[number] = text
        return number

    def drop(self, number: int) -> None:
        """The file was closed; the kernel has no more requests for it."""
        self.images.pop(number, None)
        self.texts.pop(number, None)
        self.writable.pop(number, None)
