"""Changes of names: making, linking, renaming and removing files of sessions. The backing file system does them.

A new file belongs to whoever asked for it. Nothing goes from one session to another, and no device is made. Keeps no
state but the tree's; event-loop thread only. OSErrors are answers for the client.
"""

from __future__ import annotations

import errno
import os
import stat
from contextlib import suppress
from typing import TYPE_CHECKING, Final, NamedTuple

from xbfs.vfs.live import calls
from xbfs.vfs.live.attributes import OWN, ROOT, Attributes
from xbfs.vfs.live.calls import refused

if TYPE_CHECKING:
    from xbfs.vfs.live.nodes import Node, Nodes

_KINDS: Final = frozenset({stat.S_IFREG, stat.S_IFIFO, stat.S_IFSOCK})


class Asker(NamedTuple):
    """Who makes a file."""

    uid: int
    gid: int


class Changes:
    """Of one tree."""

    def __init__(self, nodes: Nodes) -> None:
        self._nodes = nodes

    def make(self, parent: int, name: bytes, mode: int, asker: Asker) -> Attributes:
        """mknod(2), mkdir(2): ``mode`` says which; the client's umask is in it. Raises OSError."""
        directory = self._directory(parent)
        kind = stat.S_IFMT(mode) or stat.S_IFREG
        if kind == stat.S_IFDIR:
            os.mkdir(name, 0o700, dir_fd=directory.fd)
        elif kind in _KINDS:
            os.mknod(name, kind | 0o600, dir_fd=directory.fd)
        else:
            raise refused(errno.EPERM)
        return self._given(directory, name, stat.S_IMODE(mode), asker)

    def symlink(self, parent: int, name: bytes, target: bytes, asker: Asker) -> Attributes:
        """symlink(2): ``target`` is kept, and followed by nobody here. Raises OSError."""
        directory = self._directory(parent)
        os.symlink(target, name, dir_fd=directory.fd)
        return self._given(directory, name, None, asker)

    def link(self, inode: int, parent: int, name: bytes) -> Attributes:
        """link(2). Raises OSError."""
        node, directory = self._nodes.get(inode), self._directory(parent)
        if node.session is not directory.session:
            raise refused(errno.EXDEV)
        os.link(node.path, name, dst_dir_fd=directory.fd, follow_symlinks=True)  # /proc's links, not the file's
        return self._nodes.entered(node)

    def rename(self, parent: int, name: bytes, new_parent: int, new_name: bytes, flags: int) -> None:
        """renameat2(2). Raises OSError."""
        old, new = self._directory(parent), self._directory(new_parent)
        if old.session is not new.session:
            raise refused(errno.EXDEV)
        calls.rename(old.fd, name, new.fd, new_name, flags)

    def unlink(self, parent: int, name: bytes) -> None:
        """unlink(2). Raises OSError."""
        os.unlink(name, dir_fd=self._directory(parent).fd)

    def rmdir(self, parent: int, name: bytes) -> None:
        """rmdir(2). Raises OSError."""
        os.rmdir(name, dir_fd=self._directory(parent).fd)

    def _directory(self, inode: int) -> Node:
        """A directory in which names can be changed: none of those that only this mount has. Raises Refused."""
        if inode == ROOT or inode >= OWN:
            raise refused(errno.EPERM if inode == ROOT else errno.EROFS)
        return self._nodes.get(inode)

    def _given(self, directory: Node, name: bytes, mode: int | None, asker: Asker) -> Attributes:
        """A new file, given to who asked for it; a file that can not be given away is taken back. Raises OSError."""
        node = self._nodes.find(directory.session, directory.fd, name)
        try:
            status = os.fstat(node.fd)
            inherited = os.fstat(directory.fd)
            is_directory = stat.S_ISDIR(status.st_mode)
            gid = asker.gid
            if inherited.st_mode & stat.S_ISGID:
                gid = inherited.st_gid
                mode = mode | stat.S_ISGID if is_directory and mode is not None else mode
            if (status.st_uid, status.st_gid) != (asker.uid, gid):
                os.chown(node.path, asker.uid, gid)
            if mode is not None:
                os.chmod(node.path, mode)  # noqa: PTH101 - a path of no file
        except OSError:
            self._nodes.release(node)
            with suppress(OSError):
                (self.rmdir if is_directory else self.unlink)(directory.inode, name)
            raise
        return self._nodes.entered(node)
