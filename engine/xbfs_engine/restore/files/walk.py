"""The order in which what was asked for is restored: a directory, what is in it, the directory's end.

Memory grows with the depth, which is bounded, and with nothing else. One thread.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from xbfs_engine.core.errors import GuestDamaged, GuestUnsupported
from xbfs_engine.guestfs.base import Kind
from xbfs_engine.restore.files.paths import DEPTH_MAX, UNREADABLE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from xbfs_engine.core.errors import XbfsError
    from xbfs_engine.restore.files.view import Item, View


class Walk:
    """A walk over ``sources`` and all that is below them: each item, and None at the end of each directory.

    ``failed`` is told what can not be read.
    """

    def __init__(self, view: View, sources: Iterator[Item], failed: Callable[[bytes, XbfsError], None]) -> None:
        self._view = view
        self._failed = failed
        self._stack: list[tuple[Item | None, Iterator[Item]]] = [(None, sources)]

    def __iter__(self) -> Iterator[Item | None]:
        while self._stack:
            directory, items = self._stack[-1]
            try:
                item = next(items, None)
            except UNREADABLE as exc:
                # Of sources that are searched for, errors were told before.
                self._failed(b"/" if directory is None else directory.path, exc)
                item = None
            if item is None:
                self._stack.pop()
                if directory is not None:
                    yield None
            elif item.kind is not Kind.DIRECTORY:
                yield item
            elif item.lies_in_itself():
                self._failed(item.path, GuestDamaged("the directory lies in itself"))
            elif len(self._stack) > DEPTH_MAX:
                self._failed(item.path, GuestUnsupported(f"it lies deeper than {DEPTH_MAX} directories"))
            else:
                self._stack.append((item, self._view.entries(item)))
                yield item

    def prune(self) -> None:
        """Leave out what is left in the directory that was entered last; its end comes all the same."""
        directory, _ = self._stack[-1]
        self._stack[-1] = (directory, iter(()))
