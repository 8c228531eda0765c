"""What the live mount shows: sessions, the files of their directories, and overlay disks in place of stubs.

Owns which sessions are shown and which of their files the kernel knows. Names, links, modes and foreign files are the
backing file system's, done to it by descriptor and single name, so nothing outside a session's directory is reached.
Event-loop thread only, but for ``attributes`` and for what is open (``handles``). OSErrors are answers for the client.
"""

from __future__ import annotations

import errno
import os
import stat
from contextlib import suppress
from typing import TYPE_CHECKING, Final

from xbfs.vfs.live.attributes import OWN, ROOT, Attributes, made_up
from xbfs.vfs.live.calls import path_of, refused
from xbfs.vfs.live.disks import LiveDisk
from xbfs.vfs.live.frozen import NAME as FROZEN
from xbfs.vfs.live.frozen import TOP as FROZEN_TOP
from xbfs.vfs.live.frozen import Frozen
from xbfs.vfs.live.handles import OpenDisk, OpenForeign, OpenImage
from xbfs.vfs.live.nodes import Node, Nodes, ShownSession
from xbfs.vfs.live.passing import Passing
from xbfs.vfs.live.stubs import anchors
from xbfs_engine.core.errors import SessionBusy, SessionExists, StorageError
from xbfs_engine.core.log import Logger

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from xbfs.vfs.live.handles import Opened
    from xbfs.view.base import RandomAccess
    from xbfs.view.overlay import Overlay
    from xbfs_engine.core.runtime import Clock

READ_DEADLINE_S: Final = 30.0
"""What the repository gets to answer; as ``--deadline`` of a mount."""
_OPEN_FLAGS: Final = os.O_ACCMODE | os.O_TRUNC
"""Of what a client opens with, all that concerns the backing file: the kernel above does the rest."""
PASSED_ON: Final = b"user."
"""Of extended attributes only these are passed on: others mean something to kernels."""

_log = Logger("xbfs.live")


def ignored(_name: bytes, _disks: list[int]) -> None:
    """Nobody has to be told that a session is gone."""


class LiveTree:
    """Of one live mount. ``deadline_s``: how long a read, or what a write needs of the restore point, may take.

    ``tell_gone`` is called with a name, and the inode numbers of its disks, that the kernel shall forget.
    """

    def __init__(self, clock: Clock, *, deadline_s: float = READ_DEADLINE_S) -> None:
        self.deadline_s = deadline_s
        self._clock = clock
        self._began_ns = clock.now_ns()
        self.nodes = Nodes()
        self.frozen = Frozen(self._began_ns)
        self._sessions: dict[bytes, ShownSession] = {}
        self.tell_gone: Callable[[bytes, list[int]], None] = ignored

    def add(self, name: str, directory: Path, disks: Mapping[str, Overlay], *, passes: bool = False) -> None:
        """Show ``directory`` as ``name``, with ``disks`` by key in place of its stubs. ``passes``: hydrated disks are
        given to the kernel where the system allows it. Raises StorageError."""
        key = os.fsencode(name)
        if key in self._sessions or key in {b"", b".", b"..", FROZEN} or b"/" in key:
            raise SessionExists(f"{name!r} can not be shown: there is such a directory")
        session = self.nodes.open_top(name, directory)
        try:
            for disk, overlay in disks.items():
                stub = os.open(anchors(directory) / disk, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
                passing = Passing(overlay, path_of(stub), f"{name}: {disk}") if passes else None
                session.stubs[os.fstat(stub).st_ino] = LiveDisk(overlay, stub, self._clock, passing)
        except OSError as exc:
            self._drop(session)
            raise StorageError(f"a disk of session {name} has no stub: {exc.filename}: {exc.strerror}") from exc
        self._sessions[key] = session

    def remove(self, name: str, *, force: bool = False) -> None:
        """Show it no more; then nobody is in its overlays. ``force``: even if a file of it is open: it gives errors.

        Raises SessionBusy.
        """
        key = os.fsencode(name)
        session = self._sessions.get(key)
        if session is None:
            return
        if session.opened and not force:
            raise SessionBusy(f"{len(session.opened)} files of session {name} are open")
        del self._sessions[key]
        self.tell_gone(key, list(session.stubs))
        self.frozen.hide(key)
        self._drop(session)

    def is_busy(self, name: str) -> bool:
        """Whether a file of a session is open."""
        session = self._sessions.get(os.fsencode(name))
        return session is not None and bool(session.opened)

    @property
    def is_quiet(self) -> bool:
        """Whether nobody is in an overlay now: who has unmounted waits for that before closing them."""
        return all(disk.is_quiet for session in self._sessions.values() for disk in session.stubs.values())

    def show_images(self, name: str, images: Mapping[str, RandomAccess]) -> None:
        """Show ``images`` by file name as ``.frozen/<name>/<file>``, read-only."""
        self.frozen.show(os.fsencode(name), images)

    def hide_images(self, name: str) -> None:
        """Show them no more."""
        self.frozen.hide(os.fsencode(name))

    def settle(self) -> None:
        """Have the times of all disks on their stubs."""
        for session in self._sessions.values():
            for disk in session.stubs.values():
                with suppress(OSError):
                    disk.settle()

    def lookup(self, parent: int, name: bytes) -> Attributes:
        """What a name is; the kernel knows the file from now on. Raises OSError."""
        if name == b".":
            return self._known(parent)
        if parent == ROOT:
            if name == FROZEN:
                return self.frozen.attributes(FROZEN_TOP)
            session = self._sessions.get(name)
            if session is None:
                raise refused(errno.ENOENT)
            return self.nodes.entered(self.nodes.get(session.inode))
        if parent >= OWN:
            return self.frozen.lookup(parent, name)
        node = self.nodes.get(parent)
        if name == b".." and parent == node.session.inode:
            return self.attributes(ROOT)
        return self.nodes.entered(self.nodes.find(node.session, node.fd, name))

    def attributes(self, inode: int) -> Attributes:
        """What stat(2) tells. Any thread may ask, while the kernel knows the file. Raises OSError."""
        if inode == ROOT:
            return made_up(ROOT, stat.S_IFDIR | 0o755, 0, self._began_ns)
        if inode >= OWN:
            return self.frozen.attributes(inode)
        return self.nodes.get(inode).attributes()

    def names(self, inode: int) -> list[bytes]:
        """What is in a directory. Raises OSError."""
        if inode == ROOT:
            return list(self._sessions)
        if inode >= OWN:
            return list(self.frozen.names(inode))
        fd = self.open_directory(inode)
        try:
            return [os.fsencode(name) for name in os.listdir(fd)]  # noqa: PTH208 - a Path has no descriptor
        finally:
            os.close(fd)

    def open_directory(self, inode: int) -> int:
        """A descriptor of a directory of the backing file system. Raises OSError."""
        return os.open(self._own(inode).path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    def open(self, inode: int, flags: int) -> Opened:
        """Open a file; what O_TRUNC means for a disk is the caller's (``resize``). Raises OSError."""
        if inode >= OWN:
            if flags & os.O_ACCMODE != os.O_RDONLY:
                raise refused(errno.EROFS)
            image, name = self.frozen.image(inode)
            return OpenImage(image, None, f"{os.fsdecode(FROZEN)}/{os.fsdecode(name)}", self.deadline_s)
        node = self.nodes.get(inode)
        opened: Opened
        if node.disk is not None:
            if node.disk.passing is not None:
                raise refused(errno.ESTALE)  # it came into being while the client made a file: it opens it again
            opened = OpenDisk(node.disk, node.session, f"{node.session.name}: {inode}", self.deadline_s)
        else:
            fd = os.open(node.path, flags & _OPEN_FLAGS | os.O_CLOEXEC)
            opened = OpenForeign(fd, node.session, f"{node.session.name}: {inode}")
        node.session.opened.add(opened)
        return opened

    def passable(self, inode: int) -> OpenDisk | None:
        """A file that is not open yet (``OpenDisk.begin``), if it is a disk that the kernel may be given. Any thread
        may ask, while the kernel knows the file."""
        node = self.nodes.held.get(inode)
        if node is None or node.disk is None or node.disk.passing is None or node.session.is_gone:
            return None
        return OpenDisk(node.disk, node.session, f"{node.session.name}: {inode}", self.deadline_s)

    def close(self, opened: Opened) -> None:
        """The client has closed a file."""
        opened.close()
        if opened.session is not None:
            opened.session.opened.discard(opened)

    def forget(self, inode: int, lookups: int) -> None:
        """The kernel knows a file no more."""
        self.nodes.forget(inode, lookups)

    def disk(self, inode: int) -> LiveDisk | None:
        """The disk whose stub a file is. Raises Refused."""
        return self.nodes.get(inode).disk if ROOT < inode < OWN else None

    def truncate(self, inode: int, size_bytes: int) -> None:
        """Change the size of a foreign file. Raises OSError."""
        os.truncate(self._own(inode).path, size_bytes)

    def change(
        self,
        inode: int,
        *,
        mode: int | None = None,
        uid: int = -1,
        gid: int = -1,
        atime_ns: int | None = None,
        mtime_ns: int | None = None,
    ) -> None:
        """Change what is given of a file's mode, owner (-1: as it is) and times. Raises OSError."""
        node = self._own(inode)
        if uid != -1 or gid != -1:
            os.chown(node.path, uid, gid)
        if mode is not None:
            os.chmod(node.path, mode)  # noqa: PTH101 - a path of no file
        if atime_ns is not None or mtime_ns is not None:
            now = node.attributes()
            times = now.atime_ns if atime_ns is None else atime_ns, now.mtime_ns if mtime_ns is None else mtime_ns
            os.utime(node.path, ns=times)

    def readlink(self, inode: int) -> bytes:
        """What a symbolic link says; it is never followed here. Raises OSError."""
        return os.readlink(b"", dir_fd=self.nodes.get(inode).fd)

    def space(self) -> os.statvfs_result:
        """How much room the backing file system has. Raises OSError."""
        session = next(iter(self._sessions.values()), None)
        return os.statvfs("/" if session is None else self.nodes.get(session.inode).path)

    def extended(self, inode: int, name: bytes) -> bytes:
        """An extended attribute. Raises OSError."""
        if not name.startswith(PASSED_ON) or inode == ROOT or inode >= OWN:
            raise refused(errno.ENODATA)
        return os.getxattr(self.nodes.get(inode).path, name)

    def extended_names(self, inode: int) -> list[bytes]:
        """Names of extended attributes. Raises OSError."""
        if inode == ROOT or inode >= OWN:
            return []
        names = map(os.fsencode, os.listxattr(self.nodes.get(inode).path))
        return [name for name in names if name.startswith(PASSED_ON)]

    def extend(self, inode: int, name: bytes, value: bytes | None) -> None:
        """Set an extended attribute, or remove it. Raises OSError."""
        node = self._own(inode)
        if not name.startswith(PASSED_ON):
            raise refused(errno.EOPNOTSUPP)
        if value is None:
            os.removexattr(node.path, name)
        else:
            os.setxattr(node.path, name, value)

    def _own(self, inode: int) -> Node:
        """A file that can be changed: of a session. Raises Refused."""
        if inode == ROOT or inode >= OWN:
            raise refused(errno.EPERM if inode == ROOT else errno.EROFS)
        return self.nodes.get(inode)

    def _known(self, inode: int) -> Attributes:
        """What a number is that nobody may have looked up since the mount began: an NFS client kept it."""
        if inode == ROOT or inode >= OWN:
            return self.attributes(inode)
        node = self.nodes.held.get(inode)
        for session in self._sessions.values():
            if node is None or node.session.is_gone:
                node = self.nodes.find_by_number(session, inode)
        if node is None or node.session.is_gone:
            raise refused(errno.ESTALE)
        return self.nodes.entered(node)

    def _drop(self, session: ShownSession) -> None:
        """Let go of a session; its files are let go of as the kernel forgets them."""
        session.is_gone = True
        for disk in session.stubs.values():
            if not disk.leave():
                _log.warning("somebody is still in a disk that is taken away", session=session.name)
            os.close(disk.stub)
        self.nodes.release(self.nodes.held[session.inode])
