"""``.frozen/<name>/<file>``: images shown read-only for a while, so that another process can read them for a commit.

Inode numbers are never used twice. Event-loop thread only.
"""

from __future__ import annotations

import errno
import stat
from itertools import count
from typing import TYPE_CHECKING, Final, NamedTuple

from xbfs.vfs.live.attributes import OWN, Attributes, made_up
from xbfs.vfs.live.calls import refused

if TYPE_CHECKING:
    from collections.abc import Mapping

    from xbfs.view.base import RandomAccess

NAME: Final = b".frozen"
TOP: Final = OWN
"""The inode number of ``.frozen``."""


class _Shown(NamedTuple):
    """A directory, and its files by name."""

    inode: int
    files: dict[bytes, int]


class Frozen:
    """What is shown under ``.frozen``."""

    def __init__(self, now_ns: int) -> None:
        self._now_ns = now_ns
        self._numbers = count(TOP + 1)
        self._directories: dict[bytes, _Shown] = {}
        self._images: dict[int, tuple[RandomAccess, bytes]] = {}

    def show(self, name: bytes, images: Mapping[str, RandomAccess]) -> None:
        """Show ``images`` by file name; what was shown under ``name`` goes."""
        self.hide(name)
        files = {}
        for file, image in images.items():
            files[file.encode()] = inode = next(self._numbers)
            self._images[inode] = image, name
        self._directories[name] = _Shown(next(self._numbers), files)

    def hide(self, name: bytes) -> None:
        """Show nothing under ``name`` any more."""
        shown = self._directories.pop(name, None)
        for inode in shown.files.values() if shown else ():
            del self._images[inode]

    def image(self, inode: int) -> tuple[RandomAccess, bytes]:
        """An image, and under which name it is shown. Raises Refused."""
        found = self._images.get(inode)
        if found is None:
            raise refused(errno.ESTALE if self._directory(inode) is None else errno.EISDIR)
        return found

    def attributes(self, inode: int) -> Attributes:
        """What stat(2) tells. Raises Refused."""
        found = self._images.get(inode)
        if found is not None:
            return made_up(inode, stat.S_IFREG | 0o400, found[0].size_bytes, self._now_ns)
        if inode == TOP or self._directory(inode) is not None:
            return made_up(inode, stat.S_IFDIR | 0o500, 0, self._now_ns)
        raise refused(errno.ESTALE)

    def lookup(self, parent: int, name: bytes) -> Attributes:
        """A name in one of the directories. Raises Refused."""
        inode = self.names(parent).get(name)
        if inode is None:
            raise refused(errno.ENOENT)
        return self.attributes(inode)

    def names(self, inode: int) -> dict[bytes, int]:
        """What is in a directory. Raises Refused."""
        if inode == TOP:
            return {name: shown.inode for name, shown in self._directories.items()}
        shown = self._directory(inode)
        if shown is None:
            raise refused(errno.ENOTDIR if inode in self._images else errno.ESTALE)
        return shown.files

    def _directory(self, inode: int) -> _Shown | None:
        return next((shown for shown in self._directories.values() if shown.inode == inode), None)
