"""Kernel requests to ``xbfs.vfs`` and back: translation only. Runs in the event loop's thread.

Inodes are stateless numbers, but for guests' files, whose places are kept for as long as the kernel knows them. The
mount is read-only: the kernel itself refuses writes with EROFS before they get here.
"""

from __future__ import annotations

import errno
import os
import stat
from collections import Counter
from collections.abc import Sequence
from itertools import count
from typing import TYPE_CHECKING, Final, TypeVar

import pyfuse3
from pyfuse3 import EntryAttributes, FileInfo, FUSEError, StatvfsData

from xbfs.fuse.guard import guarded
from xbfs.vfs.guests.attributes import Lasting
from xbfs.vfs.guests.places import Node, Top, VolumeText
from xbfs.vfs.tree import Kind

if TYPE_CHECKING:
    from pyfuse3 import ReaddirToken, RequestContext

    from xbfs.fuse.files import OpenFiles
    from xbfs.vfs.filesystem import FileSystem
    from xbfs.vfs.guests.attributes import GuestAttributes
    from xbfs.vfs.guests.listing import Listing
    from xbfs.vfs.tree import Attributes, Entry

T = TypeVar("T")

SETTLED_S: Final = 24 * 3600.0
"""How long the kernel may keep what never changes; what goes away is taken from it explicitly."""
CHANGING_S: Final = 1.0
_KEPT_S: Final = {Lasting.FOR_EVER: SETTLED_S, Lasting.BRIEFLY: CHANGING_S, Lasting.UNKNOWN: 0.0}
_HARDLY_ANY: Final = frozenset((b"security.selinux", b"system.posix_acl_access", b"system.posix_acl_default"))
_IN_VAIN_MAX: Final = 256
_BLOCK: Final = 512
_STATFS_BLOCK: Final = 4096
_READ_SIZE: Final = 1 << 20
_TYPES: Final = {Kind.DIRECTORY: stat.S_IFDIR | 0o500, Kind.FILE: stat.S_IFREG | 0o400, Kind.LINK: stat.S_IFLNK | 0o777}
_FOR_OTHERS: Final = {Kind.DIRECTORY: 0o055, Kind.FILE: 0o044, Kind.LINK: 0}


class Operations(pyfuse3.Operations):
    """One mount."""

    supports_dot_lookup = True
    enable_writeback_cache = False

    def __init__(self, filesystem: FileSystem, files: OpenFiles) -> None:
        super().__init__()
        self._filesystem = filesystem
        self._files = files
        self._tree = filesystem.tree
        self._guests = filesystem.guests
        for_others = filesystem.options.for_others
        self._modes = {kind: mode | (_FOR_OTHERS[kind] if for_others else 0) for kind, mode in _TYPES.items()}
        self._uid, self._gid = os.getuid(), os.getgid()
        self._numbers = count(1)
        self._asker: tuple[int, Counter[bytes]] = (0, Counter())
        self._directories: dict[int, Sequence[Entry] | Listing] = {}
        files.open_settled = self._open_settled
        files.link_target = self._link_target

    @guarded
    async def lookup(self, parent_inode: int, name: bytes, ctx: RequestContext) -> EntryAttributes:
        """Attributes of a name. A name that is missing is not remembered by the kernel: it may be a new point."""
        directory = self._filesystem.place(parent_inode)
        if isinstance(directory, Top | Node) and name not in (b".", b".."):
            return self._entered(_there(await self._guests.lookup(directory, name), errno.ENOENT))
        if isinstance(directory, Node):
            return await self._dots(directory, name)
        return self._entry(await self._filesystem.lookup(parent_inode, os.fsdecode(name)), errno.ENOENT)

    async def forget(self, inode_list: Sequence[tuple[int, int]]) -> None:
        """The kernel does not know these any more."""
        for inode, lookups in inode_list:
            self._guests.places.forget(inode, lookups)

    @guarded
    async def getattr(self, inode: int, ctx: RequestContext) -> EntryAttributes:
        """Attributes of an inode."""
        place = self._filesystem.place(inode)
        if isinstance(place, Node | VolumeText):
            return _guest_entry(await self._guests.attributes(place))
        return self._entry(self._tree.attributes(inode), errno.ESTALE)

    @guarded
    async def readlink(self, inode: int, ctx: RequestContext) -> bytes:
        """Where a link leads."""
        place = self._filesystem.place(inode)
        if isinstance(place, Node):
            return await self._guests.readlink(place)
        return os.fsencode(_there(self._tree.target(inode)))

    @guarded
    async def open(self, inode: int, flags: int, ctx: RequestContext) -> FileInfo:
        """Open a file: never reads."""
        place = self._filesystem.place(inode)
        if isinstance(place, Node):
            return FileInfo(fh=self._files.add_image(self._guests.open(place)), keep_cache=True)
        if isinstance(place, VolumeText):
            return FileInfo(fh=self._files.add_text(await self._guests.text(place)), keep_cache=False, direct_io=True)
        file = self._tree.image(inode)
        if file is not None:
            return FileInfo(fh=self._files.add_image(self._filesystem.open_image(file, inode)), keep_cache=True)
        text = _there(self._tree.text(inode))
        live = _there(self._tree.attributes(inode)).live
        return FileInfo(fh=self._files.add_text(text), keep_cache=not live, direct_io=live)

    @guarded
    async def read(  # type: ignore[override]  # pyfuse3 takes any contiguous buffer
        self, fh: int, off: int, size: int
    ) -> bytes | memoryview:
        """Read from an open file: asked here only where no data plane does it (``plane``)."""
        image = self._files.images.get(fh)
        if image is not None:
            data = image.read_cached(off, size)
            return await image.read(off, size) if data is None else data
        return self._files.texts[fh][off : off + size]

    @guarded
    async def release(self, fh: int) -> None:
        """Close a file."""
        self._files.drop(fh)

    @guarded
    async def opendir(self, inode: int, ctx: RequestContext) -> int:
        """Open a directory: what it lists is fixed from here on."""
        number = next(self._numbers)
        place = self._filesystem.place(inode)
        if isinstance(place, Top | Node):
            self._directories[number] = self._guests.opendir(place)
        else:
            self._directories[number] = _there(self._tree.entries(inode))
        return number

    def _link_target(self, inode: int) -> bytes | None:
        """Where a link that is no guest's leads. Any thread may call it."""
        target = self._tree.target(inode)
        return None if target is None else os.fsencode(target)

    def _open_settled(self, inode: int) -> int | None:
        """A directory of a volume, as ``opendir``; reads nothing. Any thread may call it."""
        place = self._guests.places.get(inode)
        if not isinstance(place, Node):
            return None
        number = next(self._numbers)
        self._directories[number] = self._guests.opendir(place)
        return number

    @guarded
    async def readdir(self, fh: int, start_id: int, token: ReaddirToken) -> None:
        """List from an offset, which is the number of the entry."""
        entries = self._directories[fh]
        if not isinstance(entries, Sequence):
            for listed in await entries.after(start_id):
                entry = _guest_entry(listed.attributes)
                if not pyfuse3.readdir_reply(token, listed.name, entry, listed.next_offset):
                    return
                self._guests.places.enter(listed.place)
            return
        for number in range(start_id, len(entries)):
            name, inode = entries[number]
            attributes = self._tree.attributes(inode)
            if attributes is None:
                continue  # gone since the directory was opened
            if not pyfuse3.readdir_reply(token, os.fsencode(name), self._entry(attributes), number + 1):
                return

    @guarded
    async def releasedir(self, fh: int) -> None:
        """Close a directory."""
        self._directories.pop(fh, None)

    @guarded
    async def statfs(self, ctx: RequestContext) -> StatvfsData:
        """The sum of all disks as size; nothing is free."""
        points = self._tree.points
        result = StatvfsData()
        result.f_bsize = result.f_frsize = _STATFS_BLOCK
        result.f_blocks = -(-points.size_bytes // _STATFS_BLOCK)
        result.f_bfree = result.f_bavail = 0
        result.f_files = len(points.by_id)
        result.f_ffree = result.f_favail = 0
        result.f_namemax = 255
        return result

    @guarded
    async def getxattr(self, inode: int, name: bytes, ctx: RequestContext) -> bytes:
        """One of `user.xbfs.point`, `.disk`, `.format`, or one of a guest's file."""
        place = self._filesystem.place(inode)
        if place is not None:
            found = await self._guests.xattr(place, name, is_root=ctx.uid == 0)
            if name in _HARDLY_ANY and isinstance(place, Node):
                self._check_asker(ctx.pid, name, has_one=found is not None)
            if found is not None:
                return found
        value = self._tree.extended(inode).get(os.fsdecode(name))
        if value is None:
            raise FUSEError(pyfuse3.ENOATTR)
        return value.encode()

    @guarded
    async def listxattr(self, inode: int, ctx: RequestContext) -> Sequence[bytes]:
        """Names of the extended attributes."""
        place = self._filesystem.place(inode)
        if place is not None:
            return await self._guests.xattr_names(place, is_root=ctx.uid == 0)
        return [os.fsencode(name) for name in self._tree.extended(inode)]

    def _check_asker(self, pid: int, name: bytes, *, has_one: bool) -> None:
        """`ls -l` asks every file for attributes that hardly any has, a minute for 100,000 files, unless it is told
        that they are not supported. So it is, once many files in a row had none; programs that copy take that for
        "has none", and still get those there are."""
        if self._asker[0] != pid:
            self._asker = (pid, Counter())
        in_vain = self._asker[1]
        in_vain[name] = 0 if has_one else in_vain[name] + 1
        if in_vain[name] > _IN_VAIN_MAX:
            raise FUSEError(errno.EOPNOTSUPP)

    def _entered(self, found: tuple[VolumeText | Node, GuestAttributes]) -> EntryAttributes:
        """The answer to a lookup: from here on the kernel knows the place."""
        place, attributes = found
        entry = _guest_entry(attributes)
        self._guests.places.enter(place)
        return entry

    async def _dots(self, directory: Node, name: bytes) -> EntryAttributes:
        """ "." or ".." of a guest's directory, which only a server of NFS asks for."""
        place = directory if name == b"." else directory.parent
        if isinstance(place, Node):
            return self._entered((place, await self._guests.attributes(place)))
        return self._entry(self._tree.attributes(_there(place).inode), errno.ESTALE)

    def _entry(self, found: Attributes | None, missing: int = errno.ENOENT) -> EntryAttributes:
        if found is None:
            raise FUSEError(missing)
        entry = EntryAttributes()
        entry.st_ino = found.inode
        entry.st_mode = self._modes[found.kind]
        entry.st_nlink = 1  # of a directory: says nothing about how many are in it
        entry.st_uid, entry.st_gid = self._uid, self._gid
        entry.st_size = found.size_bytes
        entry.st_blocks = -(-found.allocated_bytes // _BLOCK)
        entry.st_blksize = _READ_SIZE
        entry.st_mtime_ns = entry.st_ctime_ns = entry.st_atime_ns = found.mtime_ns
        entry.entry_timeout = entry.attr_timeout = SETTLED_S if found.settled else CHANGING_S
        return entry


def _guest_entry(found: GuestAttributes) -> EntryAttributes:
    entry = EntryAttributes()
    entry.st_ino = found.inode
    entry.st_mode = found.mode
    entry.st_nlink = found.nlink
    entry.st_uid = found.uid
    entry.st_gid = found.gid
    entry.st_rdev = found.rdev
    entry.st_size = found.size_bytes
    entry.st_blocks = found.blocks
    entry.st_blksize = _READ_SIZE
    entry.st_mtime_ns = found.mtime_ns
    entry.st_atime_ns = found.atime_ns
    entry.st_ctime_ns = found.ctime_ns
    entry.entry_timeout = entry.attr_timeout = _KEPT_S[found.lasting]
    return entry


def _there(value: T | None, missing: int = errno.ESTALE) -> T:
    if value is None:
        raise FUSEError(missing)
    return value
