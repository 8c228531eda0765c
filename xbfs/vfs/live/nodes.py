"""The backing files that the kernel knows: each held open by O_PATH, so that neither renames nor removals lose it.

A held file also keeps its inode number from being used again. Event-loop thread only; ``held`` any thread.
"""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from xbfs.vfs.live.attributes import OWN, ROOT, Attributes, backed
from xbfs.vfs.live.calls import generation_of, path_of, refused
from xbfs_engine.core.errors import StorageError

if TYPE_CHECKING:
    from pathlib import Path

    from xbfs.vfs.live.disks import LiveDisk
    from xbfs.vfs.live.handles import Opened


@dataclass(slots=True)
class ShownSession:
    """A session. ``inode``: of its directory; ``stubs``: its disks by inode number; ``opened``: its open files."""

    name: str
    inode: int
    device: int
    stubs: dict[int, LiveDisk] = field(default_factory=dict)
    opened: set[Opened] = field(default_factory=set)
    is_gone: bool = False


@dataclass(slots=True, eq=False)
class Node:
    """A file of a session. ``lookups``: how often the kernel was told of it."""

    inode: int
    generation: int
    fd: int
    session: ShownSession
    disk: LiveDisk | None
    lookups: int = 0

    @property
    def path(self) -> str:
        """A path to the file, whatever it is called."""
        return path_of(self.fd)

    def attributes(self) -> Attributes:
        """What stat(2) tells; of a stub what is true of its disk. Raises OSError."""
        disk = self.disk
        if disk is None:
            return backed(os.fstat(self.fd), self.generation)
        disk.settle()
        found = backed(os.fstat(self.fd), self.generation)
        # One link is the anchor's, which no client can see.
        return found._replace(size_bytes=disk.size_bytes, blocks=disk.blocks, nlink=found.nlink - 1)


class Nodes:
    """Nodes by inode number, for all sessions of one mount: they lie on one file system."""

    def __init__(self) -> None:
        self.held: dict[int, Node] = {}

    def get(self, inode: int) -> Node:
        """A file the kernel knows. Raises Refused if its session is gone."""
        node = self.held.get(inode)
        if node is None or node.session.is_gone:
            raise refused(errno.ESTALE)
        return node

    def find(self, session: ShownSession, directory: int, name: bytes) -> Node:
        """The file that ``name`` is in the directory of a descriptor; links are not followed. Raises OSError."""
        return self._hold(session, os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory))

    def find_by_number(self, session: ShownSession, inode: int) -> Node | None:
        """A file of a session by nothing but its inode number, as handles of NFS clients ask for it."""
        disk = session.stubs.get(inode)
        if disk is not None:
            return self._hold(session, os.dup(disk.stub))
        fd = _searched(self.held[session.inode].path, inode)
        return None if fd is None else self._hold(session, fd)

    def entered(self, node: Node) -> Attributes:
        """What the kernel is told of a file, which it knows from now on. Raises OSError."""
        try:
            found = node.attributes()
            node.lookups += 1
        finally:
            self.release(node)
        return found

    def forget(self, inode: int, lookups: int) -> None:
        """The kernel knows a file no more, or is told of it less often than it was."""
        node = self.held.get(inode)
        if node is not None:
            node.lookups -= lookups
            self.release(node)

    def release(self, node: Node) -> None:
        """Let go of a file unless the kernel knows it."""
        if node.lookups <= 0 and (node.inode != node.session.inode or node.session.is_gone):
            del self.held[node.inode]
            os.close(node.fd)

    def open_top(self, name: str, directory: Path) -> ShownSession:
        """A session's directory, without its disks. Raises StorageError."""
        fd = -1
        try:
            fd = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            status = os.fstat(fd)
        except OSError as exc:
            raise StorageError(f"{directory} can not be shown: {exc.strerror}") from exc
        shown = [node.session for node in self.held.values() if not node.session.is_gone]
        taken = any(session.inode == status.st_ino or session.device != status.st_dev for session in shown)
        if taken or not ROOT < status.st_ino < OWN:
            os.close(fd)
            raise StorageError(f"{directory} can not be shown: all sessions must lie in one file system, each once")
        session = ShownSession(name, status.st_ino, status.st_dev)
        self._hold(session, fd)
        return session

    def _hold(self, session: ShownSession, fd: int) -> Node:
        """The node of a file whose descriptor is given away. Raises Refused for files of other file systems."""
        status = os.fstat(fd)
        node = self.held.get(status.st_ino)
        disk = session.stubs.get(status.st_ino)
        if node is None and status.st_dev == session.device and ROOT < status.st_ino < OWN:
            node = self.held[status.st_ino] = Node(status.st_ino, generation_of(fd), fd, session, disk)
            return node
        os.close(fd)
        if node is not None and node.session.is_gone:
            # The session was shown before, and the kernel still knows its files.
            node.session, node.disk = session, disk
        if node is None or node.session is not session:
            raise refused(errno.ENOENT)
        return node


def _searched(top: str, inode: int) -> int | None:
    """A descriptor of the file with a number at or below a directory. Sessions have few files: all are looked at."""
    flags = os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    waiting = [os.open(top, flags & ~os.O_NOFOLLOW)]
    try:
        while waiting:
            directory = waiting[-1]
            inner = []
            with os.scandir(directory) as entries:
                for entry in entries:
                    if entry.inode() == inode:
                        return os.open(entry.name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)
                    if entry.is_dir(follow_symlinks=False):
                        inner.append(entry.name)
            waiting[-1:] = [os.open(name, flags, dir_fd=directory) for name in inner]
            os.close(directory)
        return None
    finally:
        for directory in waiting:
            os.close(directory)
