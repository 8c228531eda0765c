"""Kernel requests to ``xbfs.vfs.live`` and back: translation only. Runs in the event loop's thread.

What has to do with the content of open files is answered by the data plane (``live_plane``) and does not come here.
"""

from __future__ import annotations

import errno
import functools
import os
from itertools import count
from typing import TYPE_CHECKING, Concatenate, ParamSpec, TypeVar

import pyfuse3
import trio
from pyfuse3 import EntryAttributes, FileInfo, FUSEError, StatvfsData

from xbfs.fuse.guard import guarded
from xbfs.fuse.live_plane import IO_BYTES, KEPT_S
from xbfs.vfs.live.attributes import OWN
from xbfs.vfs.live.changes import Asker, Changes
from xbfs.vfs.live.handles import OpenDisk, Opened, OpenForeign

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine, Sequence

    from pyfuse3 import ReaddirToken, RequestContext, SetattrFields

    from xbfs.fuse.files import OpenFiles
    from xbfs.vfs.handles import OpenFile
    from xbfs.vfs.live.attributes import Attributes
    from xbfs.vfs.live.tree import LiveTree

P = ParamSpec("P")
R = TypeVar("R")


def _passed_on(
    handler: Callable[Concatenate[LiveOperations, P], Awaitable[R]],
) -> Callable[Concatenate[LiveOperations, P], Coroutine[None, None, R]]:
    """A guarded handler whose OSErrors are the client's answer: the backing file system knows what is wrong."""

    @guarded
    @functools.wraps(handler)
    async def told(self: LiveOperations, /, *args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return await handler(self, *args, **kwargs)
        except OSError as exc:
            raise FUSEError(exc.errno or errno.EIO) from exc

    return told


class LiveOperations(pyfuse3.Operations):
    """One writable mount."""

    supports_dot_lookup = True
    enable_writeback_cache = False

    def __init__(self, tree: LiveTree, files: OpenFiles) -> None:
        super().__init__()
        self._tree = tree
        self._changes = Changes(tree.nodes)
        self._files = files
        self._numbers = count(1)
        self._listings: dict[int, tuple[int, list[bytes]]] = {}

    @_passed_on
    async def lookup(self, parent_inode: int, name: bytes, ctx: RequestContext) -> EntryAttributes:
        """Attributes of a name."""
        return _entry(self._tree.lookup(parent_inode, name))

    async def forget(self, inode_list: Sequence[tuple[int, int]]) -> None:
        """The kernel does not know these any more."""
        for inode, lookups in inode_list:
            self._tree.forget(inode, lookups)

    @_passed_on
    async def getattr(self, inode: int, ctx: RequestContext) -> EntryAttributes:
        """Attributes of an inode."""
        return _entry(self._tree.attributes(inode))

    @_passed_on
    async def setattr(
        self, inode: int, attr: EntryAttributes, fields: SetattrFields, fh: int | None, ctx: RequestContext
    ) -> EntryAttributes:
        """Change size, mode, owner or times."""
        if fields.update_size:
            await self._resize(inode, attr.st_size, None if fh is None else self._files.images.get(fh))
        self._tree.change(
            inode,
            mode=attr.st_mode & 0o7777 if fields.update_mode else None,
            uid=attr.st_uid if fields.update_uid else -1,
            gid=attr.st_gid if fields.update_gid else -1,
            atime_ns=attr.st_atime_ns if fields.update_atime else None,
            mtime_ns=attr.st_mtime_ns if fields.update_mtime else None,
        )
        return _entry(self._tree.attributes(inode))

    @_passed_on
    async def readlink(self, inode: int, ctx: RequestContext) -> bytes:
        """Where a link leads."""
        return self._tree.readlink(inode)

    @_passed_on
    async def mknod(self, parent_inode: int, name: bytes, mode: int, rdev: int, ctx: RequestContext) -> EntryAttributes:
        """Make a file, a pipe or a socket."""
        return _entry(self._changes.make(parent_inode, name, mode, _asker(ctx)))

    @_passed_on
    async def mkdir(self, parent_inode: int, name: bytes, mode: int, ctx: RequestContext) -> EntryAttributes:
        """Make a directory; pyfuse3 has put the kind into ``mode``."""
        return _entry(self._changes.make(parent_inode, name, mode, _asker(ctx)))

    @_passed_on
    async def symlink(self, parent_inode: int, name: bytes, target: bytes, ctx: RequestContext) -> EntryAttributes:
        """Make a symbolic link."""
        return _entry(self._changes.symlink(parent_inode, name, target, _asker(ctx)))

    @_passed_on
    async def link(self, inode: int, new_parent_inode: int, new_name: bytes, ctx: RequestContext) -> EntryAttributes:
        """Make a hard link."""
        return _entry(self._changes.link(inode, new_parent_inode, new_name))

    @_passed_on
    async def rename(
        self,
        parent_inode_old: int,
        name_old: bytes,
        parent_inode_new: int,
        name_new: bytes,
        flags: int,
        ctx: RequestContext,
    ) -> None:
        """Rename, over what is there if need be."""
        self._changes.rename(parent_inode_old, name_old, parent_inode_new, name_new, flags)

    @_passed_on
    async def unlink(self, parent_inode: int, name: bytes, ctx: RequestContext) -> None:
        """Remove a name."""
        self._changes.unlink(parent_inode, name)

    @_passed_on
    async def rmdir(self, parent_inode: int, name: bytes, ctx: RequestContext) -> None:
        """Remove a directory."""
        self._changes.rmdir(parent_inode, name)

    @_passed_on
    async def create(
        self, parent_inode: int, name: bytes, mode: int, flags: int, ctx: RequestContext
    ) -> tuple[FileInfo, EntryAttributes]:
        """Make a file and open it."""
        try:
            made = self._changes.make(parent_inode, name, mode, _asker(ctx))
        except FileExistsError:
            if flags & os.O_EXCL:
                raise
            made = self._tree.lookup(parent_inode, name)
        try:
            return await self._open(made.inode, flags), _entry(made)
        except BaseException:
            self._tree.forget(made.inode, 1)
            raise

    @_passed_on
    async def open(self, inode: int, flags: int, ctx: RequestContext) -> FileInfo:
        """Open a file."""
        return await self._open(inode, flags)

    @_passed_on
    async def release(self, fh: int) -> None:
        """Close a file, whoever has opened it."""
        file = self._files.images.get(fh)
        self._files.drop(fh)
        if isinstance(file, Opened):
            self._tree.close(file)

    @_passed_on
    async def opendir(self, inode: int, ctx: RequestContext) -> int:
        """Open a directory: its names are read when the listing begins."""
        number = next(self._numbers)
        self._listings[number] = inode, self._tree.names(inode)
        return number

    @_passed_on
    async def readdir(self, fh: int, start_id: int, token: ReaddirToken) -> None:
        """List from an offset, which is the number of the entry."""
        inode, names = self._listings[fh]
        if start_id == 0:
            names = self._tree.names(inode)
            self._listings[fh] = inode, names
        for number in range(start_id, len(names)):
            try:
                found = self._tree.lookup(inode, names[number])
            except FileNotFoundError:
                continue  # gone since the listing began
            if not pyfuse3.readdir_reply(token, names[number], _entry(found), number + 1):
                self._tree.forget(found.inode, 1)
                return

    @_passed_on
    async def releasedir(self, fh: int) -> None:
        """Close a directory."""
        self._listings.pop(fh, None)

    @_passed_on
    async def fsyncdir(self, fh: int, datasync: bool) -> None:
        """Have a directory's names survive any crash."""
        fd = self._tree.open_directory(self._listings[fh][0])
        try:
            await trio.to_thread.run_sync(os.fsync, fd)
        finally:
            os.close(fd)

    @_passed_on
    async def statfs(self, ctx: RequestContext) -> StatvfsData:
        """The room where overlays lie."""
        space = self._tree.space()
        result = StatvfsData()
        result.f_bsize, result.f_frsize, result.f_namemax = space.f_bsize, space.f_frsize, space.f_namemax
        result.f_blocks, result.f_bfree, result.f_bavail = space.f_blocks, space.f_bfree, space.f_bavail
        result.f_files, result.f_ffree, result.f_favail = space.f_files, space.f_ffree, space.f_favail
        return result

    @_passed_on
    async def getxattr(self, inode: int, name: bytes, ctx: RequestContext) -> bytes:
        """An extended attribute."""
        return self._tree.extended(inode, name)

    @_passed_on
    async def listxattr(self, inode: int, ctx: RequestContext) -> Sequence[bytes]:
        """Names of extended attributes."""
        return self._tree.extended_names(inode)

    @_passed_on
    async def setxattr(self, inode: int, name: bytes, value: bytes, ctx: RequestContext) -> None:
        """Set an extended attribute."""
        self._tree.extend(inode, name, value)

    @_passed_on
    async def removexattr(self, inode: int, name: bytes, ctx: RequestContext) -> None:
        """Remove an extended attribute."""
        self._tree.extend(inode, name, None)

    async def _open(self, inode: int, flags: int) -> FileInfo:
        if flags & os.O_TRUNC and self._tree.disk(inode) is not None:
            await self._resize(inode, 0)
        file = self._tree.open(inode, flags)
        if isinstance(file, OpenDisk | OpenForeign):
            number = self._files.add_writable(file)
        else:
            number = self._files.add_image(file)
        return FileInfo(fh=number, keep_cache=inode < OWN)

    async def _resize(self, inode: int, size_bytes: int, opened: OpenFile | None = None) -> None:
        disk = self._tree.disk(inode)
        if disk is not None:
            await trio.to_thread.run_sync(disk.resize, size_bytes)
        elif isinstance(opened, OpenForeign):
            os.ftruncate(opened.fd, size_bytes)
        else:
            self._tree.truncate(inode, size_bytes)


def _asker(ctx: RequestContext) -> Asker:
    return Asker(ctx.uid, ctx.gid)


def _entry(found: Attributes) -> EntryAttributes:
    entry = EntryAttributes()
    entry.st_ino = found.inode
    entry.generation = found.generation
    entry.st_mode = found.mode
    entry.st_nlink = found.nlink
    entry.st_uid, entry.st_gid = found.uid, found.gid
    entry.st_rdev = found.rdev
    entry.st_size = found.size_bytes
    entry.st_blocks, entry.st_blksize = found.blocks, IO_BYTES
    entry.st_atime_ns, entry.st_mtime_ns, entry.st_ctime_ns = found.atime_ns, found.mtime_ns, found.ctime_ns
    # Sessions come and go without the kernel.
    entry.entry_timeout = entry.attr_timeout = KEPT_S
    return entry
