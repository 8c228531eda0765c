"""The data plane of a writable mount: also WRITE, FSYNC, FALLOCATE and GETATTR are answered by who took them.

So is OPEN of disks that the kernel may be given: pyfuse3 can not say which file it shall use. RELEASE is the event
loop's, of all files.

Owns nothing beyond ``plane``. A write takes its bytes from the request where they lie; only one that has to wait for
the restore point without a thread (``Parked``) copies them. Attributes are asked for after every write whose writer
looks at the file, as NFS servers do.
"""

from __future__ import annotations

import errno
from functools import partial
from typing import TYPE_CHECKING, Final

from xbfs.fuse import wire
from xbfs.fuse.backing import DeviceBackings
from xbfs.fuse.plane import DataPlane, Outcome
from xbfs.vfs.live.handles import LOCAL_S
from xbfs.vfs.live.tree import PASSED_ON

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from xbfs.fuse.files import OpenFiles
    from xbfs.vfs.gate import Parked
    from xbfs.vfs.live.attributes import Attributes
    from xbfs.vfs.live.handles import OpenDisk, WritableFile
    from xbfs.view.base import Part
    from xbfs_engine.core.runtime import Clock

KEPT_S: Final = 1
"""How long the kernel may keep names and attributes: it sees all changes itself, but those by hand."""
IO_BYTES: Final = 4096
"""What stat(2) recommends for reads and writes: a unit of an overlay."""
_S_NS: Final = 10**9
_U64: Final = (1 << 64) - 1
"""Times before 1970 are negative numbers in fields without a sign."""
_HEADER_BYTES: Final = wire.IN_HEADER.size
_NAME_AT: Final = wire.IN_HEADER.size + wire.GETXATTR_IN.size
_DATA_AT: Final = wire.IN_HEADER.size + wire.WRITE_IN.size


class _Write:
    """A write that is to be made."""

    __slots__ = ("_data", "_file", "_flags", "_offset")

    def __init__(self, file: WritableFile, offset: int, data: bytes | memoryview, flags: int) -> None:
        self._file = file
        self._offset = offset
        self._data = data
        self._flags = flags

    def __call__(self) -> Sequence[Part]:
        """Make it; the answer."""
        if self._flags & wire.WRITE_DROPS_PRIVILEGES:
            self._file.drop_privileges()
        return (wire.WRITE_OUT.pack(self._file.write_now(self._offset, self._data), 0),)

    def keep(self) -> None:
        """Have the bytes for oneself."""
        self._data = bytes(self._data)


class LivePlane(DataPlane):
    """Of a writable mount: ``files.writable`` are answered here in all that has to do with their content."""

    # Without killpriv_v2 the kernel asks for security.capability before each write; with auto_inval_data it drops its
    # pages whenever it sees an mtime that moved, though nobody else writes.
    init_flags = (wire.INIT_KILLPRIV_V2 | wire.INIT_PASSTHROUGH, wire.INIT_AUTO_INVAL_DATA)

    def __init__(
        self,
        device: int,
        files: OpenFiles,
        clock: Clock,
        *,
        attributes: Callable[[int], Attributes],
        passable: Callable[[int], OpenDisk | None],
        ended: Callable[[], None],
    ) -> None:
        super().__init__(device, files, clock, ended=ended)
        self._attributes = attributes
        self._passable = passable
        self._backings = DeviceBackings(device)

    def close(self) -> None:
        """Let go of everything, after the unmount."""
        self._backings.leave()
        super().close()

    def _handled(self, opcode: int, unique: int, request: memoryview) -> Outcome:
        if opcode == wire.WRITE:
            handle, offset, size, flags, *_ = wire.WRITE_IN.unpack_from(request, _HEADER_BYTES)
            file = self._files.writable.get(handle)
            if file is not None:
                write = _Write(file, offset, request[_DATA_AT : _DATA_AT + size], flags)
                return self._work(unique, file, write, offset, size, file.write_limit_s(offset, size))
        elif opcode == wire.FSYNC:
            handle, flags, _ = wire.FSYNC_IN.unpack_from(request, _HEADER_BYTES)
            file = self._files.writable.get(handle)
            if file is not None:
                return self._work(unique, file, _flush(file, data_only=bool(flags & wire.FSYNC_DATA)))
        elif opcode == wire.FALLOCATE:
            handle, offset, length, mode, _ = wire.FALLOCATE_IN.unpack_from(request, _HEADER_BYTES)
            file = self._files.writable.get(handle)
            if file is not None:
                limit_s = file.write_limit_s(offset, length)
                return self._work(unique, file, _allocation(file, mode, offset, length), offset, length, limit_s)
        elif opcode == wire.GETATTR:
            try:
                found = self._attributes(wire.IN_HEADER.unpack_from(request)[3])
            except OSError as exc:
                self._refuse(unique, exc.errno or errno.EIO)
            else:
                self._answer(unique, (_told(found),))
            return Outcome.DONE
        elif opcode == wire.OPEN:
            disk = self._passable(wire.IN_HEADER.unpack_from(request)[3])
            if disk is not None:
                flags, _ = wire.OPEN_IN.unpack_from(request, _HEADER_BYTES)
                return self._work(unique, disk, partial(self._opened, disk, flags))
        elif opcode == wire.GETXATTR and bytes(request[_NAME_AT : _NAME_AT + len(PASSED_ON)]) != PASSED_ON:
            # Before a write that follows upon a look at the file the kernel asks for security.capability.
            self._refuse(unique, errno.ENODATA)
            return Outcome.DONE
        return super()._handled(opcode, unique, request)

    def _opened(self, disk: OpenDisk, flags: int) -> Sequence[Part]:
        # Pages are not kept over openings of such a disk: while the kernel has its file they would get old.
        number = disk.begin(flags, self._backings)
        handle = self._files.add_writable(disk)
        passed = (0, 0) if number is None else (wire.PASSED_THROUGH, number)
        return (wire.OPEN_OUT.pack(handle, *passed),)

    def _work(
        self,
        unique: int,
        file: WritableFile,
        call: Callable[[], Sequence[Part]],
        offset: int = 0,
        size: int = 0,
        limit_s: float = LOCAL_S,
    ) -> Outcome:
        return Outcome.DONE if self._wait(unique, file, call, offset, size, limit_s) else Outcome.LEAVE

    def _park(self, stalled: Parked, unique: int, call: Callable[[], Sequence[Part]]) -> None:
        if isinstance(call, _Write):
            call.keep()
        super()._park(stalled, unique, call)


def _told(found: Attributes) -> bytes:
    """What GETATTR is answered."""
    times = (found.atime_ns, found.mtime_ns, found.ctime_ns)
    return wire.ATTR_OUT.pack(
        KEPT_S,
        0,
        0,
        found.inode,
        found.size_bytes,
        found.blocks,
        *(ns // _S_NS & _U64 for ns in times),
        *(ns % _S_NS for ns in times),
        found.mode,
        found.nlink,
        found.uid,
        found.gid,
        found.rdev,
        IO_BYTES,
        0,
    )


def _flush(file: WritableFile, *, data_only: bool) -> Callable[[], Sequence[Part]]:
    def flush() -> Sequence[Part]:
        file.flush_now(data_only=data_only)
        return ()

    return flush


def _allocation(file: WritableFile, mode: int, offset: int, length: int) -> Callable[[], Sequence[Part]]:
    def allocate() -> Sequence[Part]:
        file.allocate_now(mode, offset, length)
        return ()

    return allocate
