"""The data plane of a writable mount: also WRITE, FSYNC and FALLOCATE are answered in the thread that took them.

Owns nothing beyond ``plane``. A write takes its bytes from the request where they lie; only one that has to wait for
the restore point without a thread (``Parked``) copies them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from xbfs.fuse import wire
from xbfs.fuse.plane import DataPlane, Outcome
from xbfs.vfs.live.handles import LOCAL_S

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from xbfs.vfs.gate import Parked
    from xbfs.vfs.live.handles import WritableFile
    from xbfs.view.base import Part

_HEADER_BYTES: Final = wire.IN_HEADER.size
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
    init_flags = (wire.INIT_KILLPRIV_V2, wire.INIT_AUTO_INVAL_DATA)

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
        return super()._handled(opcode, unique, request)

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
