"""Writes files of a guest into a directory of this machine.

All is done relative to descriptors of directories and no symlink is ever followed, so nothing a guest has can lead out
of the directory. A file has a temporary name, ``.xbfs-…``, until it is complete; a process that is killed leaves no
other names of half-done files. One thread at a time.
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final

from xbfs_engine.core.errors import StorageFull, TargetExists, TargetUnwritable
from xbfs_engine.guestfs.base import Kind
from xbfs_engine.restore.files.dressing import NODES, Dresser, has_default_acl
from xbfs_engine.restore.files.records import Made, Place

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from contextlib import AbstractContextManager

    from xbfs_engine.core.errors import XbfsError
    from xbfs_engine.core.runtime import RandomSource
    from xbfs_engine.guestfs.base import FileExtent
    from xbfs_engine.restore.files.records import Account, Meta, Writing

_RENAME_NOREPLACE: Final = 1
_DIRECTORY: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_NEW_FILE: Final = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_SEEN: Final = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
_FULL: Final = frozenset((errno.ENOSPC, errno.EDQUOT))
_MAJOR_MAX, _MINOR_MAX = (1 << 12) - 1, (1 << 20) - 1
"""Linux: include/linux/kdev_t.h, MKDEV."""
_libc = ctypes.CDLL(None, use_errno=True)


class DirectoryTarget:
    """Files go into ``directory``, which is made if it is missing; a context manager.

    ``overwrite``: what exists is replaced, each file at once; directories are filled, never removed. ``with_owner``:
    owners are set, which needs root. Raises TargetUnwritable if the directory can not be used.
    """

    fatal: tuple[type[XbfsError], ...] = (StorageFull,)
    wants_extents = False

    def __init__(
        self, directory: Path, account: Account, random: RandomSource, *, overwrite: bool, with_owner: bool
    ) -> None:
        self.account = account
        self.top = Place()
        self._directory = os.fsencode(directory)
        self._overwrite = overwrite
        self._dresser = Dresser(account, with_owner=with_owner)
        self._is_root = os.geteuid() == 0
        self._stem = f".xbfs-{random.token(6).hex()}-".encode()
        self._made = 0
        self._knows_case = True

    def __enter__(self) -> DirectoryTarget:
        with _errors(self._directory):
            with suppress(FileExistsError):
                os.mkdir(self._directory, 0o777)  # noqa: PTH102 - bytes
            self.top.fd = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            self.top.inherits_acl = has_default_acl(self.top.fd)
            self._knows_case = self._tells_case()
        return self

    def __exit__(self, *_: object) -> None:
        self.top.close()

    def enter(self, place: Place) -> None:
        """Make the directory, or take the one that is there."""
        above, name = place.above, place.path.rpartition(b"/")[2]
        assert above is not None
        self._claim(above, name)
        with _errors(self.shown(place.path)):
            is_new = self._make_directory(above, name)
            place.fd = os.open(name, _DIRECTORY, dir_fd=above.fd)
            if not is_new:
                place.inherits_acl = has_default_acl(place.fd)
            elif above.inherits_acl:
                self._dresser.strip(place.fd)

    def leave(self, place: Place) -> None:
        """Give it what the guest's has; before, only its owner could look into it."""
        assert place.meta is not None
        with _errors(self.shown(place.path)):
            self._dresser.dress(place.fd, place.meta, strip_acl=True)

    def create(self, above: Place, name: bytes, meta: Meta, extents: Sequence[FileExtent] | None) -> Writing:
        """Begin a file."""
        shown = self.shown(above.of(name))
        with _errors(shown):
            self._refuse(above, name, shown)
            temporary = self._temporary()
            fd = os.open(temporary, _NEW_FILE, 0o600, dir_fd=above.fd)
        return _File(self, above, name, meta, temporary, fd)

    def link(self, above: Place, name: bytes, meta: Meta, first: Made) -> None:
        """One more name."""
        *directories, last = first.path.split(b"/")
        shown = self.shown(above.of(name))
        temporary = self._temporary()
        with _errors(shown):
            self._refuse(above, name, shown)
            fd = os.dup(self.top.fd)
            try:
                for each in directories:
                    below = os.open(each, _SEEN | os.O_DIRECTORY, dir_fd=fd)
                    os.close(fd)
                    fd = below
                os.link(last, temporary, src_dir_fd=fd, dst_dir_fd=above.fd, follow_symlinks=False)
            finally:
                os.close(fd)
            try:
                found = os.stat(temporary, dir_fd=above.fd, follow_symlinks=False)
                if (found.st_dev, found.st_ino) != first.identity:
                    raise TargetUnwritable(f"{os.fsdecode(shown)!r}: what it is to be a name of was replaced meanwhile")
                self.publish(above, temporary, name)
            finally:
                # Renaming does nothing between two names of one file.
                self.discard(above, temporary)

    def node(self, above: Place, name: bytes, meta: Meta, target: bytes) -> Made | None:
        """A symlink, FIFO or device."""
        shown = self.shown(above.of(name))
        with _errors(shown):
            self._refuse(above, name, shown)
            temporary = self._temporary()
            if not self._make_node(above, temporary, meta, target):
                return None
            try:
                self._dress_node(above, temporary, meta)
                found = os.stat(temporary, dir_fd=above.fd, follow_symlinks=False)
                self.publish(above, temporary, name)
            except BaseException:
                self.discard(above, temporary)
                raise
        return Made(above.of(name), (found.st_dev, found.st_ino))

    def finish(self) -> None:
        """Make all durable."""
        with _errors(self._directory):
            if _libc.syncfs(self.top.fd) != 0:
                number = ctypes.get_errno()
                raise OSError(number, os.strerror(number))

    def publish(self, above: Place, temporary: bytes, name: bytes) -> None:
        """Give a complete file its name. Raises OSError."""
        flags = 0 if self._overwrite else _RENAME_NOREPLACE
        if _libc.renameat2(above.fd, temporary, above.fd, name, flags) == 0:
            return
        number = ctypes.get_errno()
        if number not in (errno.EINVAL, errno.ENOSYS) or self._overwrite:
            raise OSError(number, os.strerror(number))
        # A file system that knows no exclusive rename, such as NFS.
        os.link(temporary, name, src_dir_fd=above.fd, dst_dir_fd=above.fd, follow_symlinks=False)
        self.discard(above, temporary)

    def discard(self, above: Place, temporary: bytes) -> None:
        """Remove what is not to be. Never raises."""
        with suppress(OSError):
            os.unlink(temporary, dir_fd=above.fd)

    def dress(self, fd: int, above: Place, meta: Meta) -> None:
        """Give an open file what the guest's has."""
        self._dresser.dress(fd, meta, strip_acl=above.inherits_acl)

    def _make_directory(self, above: Place, name: bytes) -> bool:
        """Whether it is new. What is no directory is replaced, if anything may be."""
        try:
            os.mkdir(name, 0o700, dir_fd=above.fd)
        except FileExistsError:
            if not self._overwrite:
                raise
        else:
            return True
        found = os.stat(name, dir_fd=above.fd, follow_symlinks=False)
        if not stat.S_ISDIR(found.st_mode):
            os.unlink(name, dir_fd=above.fd)
            os.mkdir(name, 0o700, dir_fd=above.fd)
            return True
        if found.st_uid == os.geteuid() and found.st_mode & 0o700 != 0o700:
            fd = os.open(name, _SEEN | os.O_DIRECTORY, dir_fd=above.fd)
            try:
                Path(f"/proc/self/fd/{fd}").chmod(0o700)
            finally:
                os.close(fd)
        return False

    def _make_node(self, above: Place, temporary: bytes, meta: Meta, target: bytes) -> bool:
        if meta.kind is Kind.SYMLINK:
            os.symlink(target, temporary, dir_fd=above.fd)
            return True
        if meta.kind is Kind.FIFO:
            os.mkfifo(temporary, 0o600, dir_fd=above.fd)
            return True
        major, minor = meta.device
        if meta.kind not in NODES or major > _MAJOR_MAX or minor > _MINOR_MAX:
            self.account.lose("files of a kind or number that Linux does not know", meta.path)
            return False
        try:
            os.mknod(temporary, NODES[meta.kind] | 0o600, os.makedev(major, minor), dir_fd=above.fd)
        except PermissionError as exc:
            why = exc.strerror if self._is_root else "they need root"
            self.account.lose(f"devices: {why}", meta.path)
            return False
        return True

    def _dress_node(self, above: Place, temporary: bytes, meta: Meta) -> None:
        if meta.kind is Kind.SYMLINK:
            self._dresser.dress(b"/proc/self/fd/%d/%s" % (above.fd, temporary), meta, is_link=True)
            return
        fd = os.open(temporary, _SEEN, dir_fd=above.fd)
        try:
            self._dresser.dress(f"/proc/self/fd/{fd}", meta, strip_acl=above.inherits_acl)
        finally:
            os.close(fd)

    def _refuse(self, above: Place, name: bytes, shown: bytes) -> None:
        """Raise if the name is taken: early, and the only check against a directory."""
        self._claim(above, name)
        try:
            found = os.stat(name, dir_fd=above.fd, follow_symlinks=False)
        except FileNotFoundError:
            return
        if stat.S_ISDIR(found.st_mode):
            raise TargetExists(f"{os.fsdecode(shown)!r} is a directory", hint="directories are never replaced")
        if not self._overwrite:
            raise FileExistsError(errno.EEXIST, "it exists")

    def _claim(self, above: Place, name: bytes) -> None:
        """Raise if the target takes the name for one that was restored before, which would be replaced."""
        if self._knows_case:
            return
        folded = os.fsdecode(name).casefold()
        if folded in above.claimed:
            raise TargetExists(f"{os.fsdecode(self.shown(above.of(name)))!r}: another file's name differs only in case")
        above.claimed.add(folded)

    def _tells_case(self) -> bool:
        """Whether ``a`` and ``A`` are two files."""
        temporary = self._temporary()
        os.close(os.open(temporary, _NEW_FILE, 0o600, dir_fd=self.top.fd))
        try:
            os.stat(temporary.upper(), dir_fd=self.top.fd, follow_symlinks=False)
        except FileNotFoundError:
            return True
        else:
            return False
        finally:
            self.discard(self.top, temporary)

    def _temporary(self) -> bytes:
        self._made += 1
        return self._stem + b"%x" % self._made

    def shown(self, path: bytes) -> bytes:
        """A path in the target, for messages."""
        return self._directory + b"/" + path


class _File:
    """A file under its temporary name."""

    def __init__(
        self, target: DirectoryTarget, above: Place, name: bytes, meta: Meta, temporary: bytes, fd: int
    ) -> None:
        self._target = target
        self._above = above
        self._name = name
        self._meta = meta
        self._temporary = temporary
        self._fd = fd
        self._end = 0

    def write(self, offset: int, data: bytes) -> None:
        """The next piece."""
        with self._errors():
            written = os.pwrite(self._fd, data, offset)
            while written < len(data):
                written += os.pwrite(self._fd, memoryview(data)[written:], offset + written)
        self._end = offset + len(data)

    def commit(self) -> Made:
        """Complete it, and give it its name."""
        with self._errors():
            if self._end != self._meta.size_bytes:
                os.ftruncate(self._fd, self._meta.size_bytes)
            self._target.dress(self._fd, self._above, self._meta)
            found = os.fstat(self._fd)
            # A network file system may find only now that there is no room.
            fd, self._fd = self._fd, -1
            os.close(fd)
            self._target.publish(self._above, self._temporary, self._name)
        return Made(self._above.of(self._name), (found.st_dev, found.st_ino))

    def abandon(self) -> None:
        """Remove it."""
        if self._fd >= 0:
            with suppress(OSError):
                os.close(self._fd)
            self._fd = -1
        self._target.discard(self._above, self._temporary)

    def _errors(self) -> AbstractContextManager[None]:
        return _errors(self._target.shown(self._above.of(self._name)))


@contextmanager
def _errors(shown: bytes) -> Iterator[None]:
    """OSErrors of the target as what they are for the user."""
    try:
        yield
    except OSError as exc:
        what = f"{os.fsdecode(shown)!r}: {exc.strerror or exc}"
        if exc.errno in _FULL:
            raise StorageFull(what, hint="free space there, or choose another place") from exc
        if exc.errno == errno.EEXIST:
            raise TargetExists(f"{os.fsdecode(shown)!r} exists", hint="--overwrite replaces what is there") from exc
        raise TargetUnwritable(what, hint="see whether this can be written there, or choose another place") from exc
