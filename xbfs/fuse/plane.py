"""The data plane: threads that read the FUSE device themselves and answer reads without any hop.

Owns the device's threads and the requests that wait for storage. READ and LSEEK of open files, OPENDIR of directories
that never change, and READLINK of our own links are answered here, in the thread that took them from the kernel;
everything else goes through a socket to libfuse, which takes that socket for the device, and its answers come back
through ``pump``. The event loop's thread makes, starts and closes it; the rest runs in its own threads.

A thread that may have to wait first sees to it that another one listens, so requests that hang never stop those
behind them, up to ``THREADS_MAX``. A request whose blob is known to hang is parked (``vfs.gate``) and holds no thread.
Whoever has no answer by the deadline gets EIO from ``tend``.
"""

from __future__ import annotations

import errno
import os
import socket
import subprocess
import sys
import threading
from collections import deque
from contextlib import suppress
from enum import Enum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple, NoReturn

import trio

from xbfs.fuse import wire
from xbfs.fuse.errnos import errno_of
from xbfs.vfs.gate import Parked
from xbfs.vfs.live.calls import Refused, refused
from xbfs.vfs.pool import cores
from xbfs_engine.core.errors import StorageTimeout, XbfsError
from xbfs_engine.core.log import Logger

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from xbfs.fuse.files import OpenFiles
    from xbfs.vfs.handles import OpenFile
    from xbfs.view.base import Part
    from xbfs_engine.core.runtime import Clock

THREADS_MAX: Final = 64
"""Threads stuck in the storage at once; each costs some 100 KiB."""
TICK_S: Final = 0.25
"""How often deadlines are looked at: far cheaper than a timer for each request."""
PUMP: Final = Path(__file__).with_name("pump.py")
_SOCKET_BYTES: Final = 4 << 20
_SO_SNDBUFFORCE: Final = 32  # socket(7); not in the socket module
_END_S: Final = 2.0
_GONE: Final = (errno.ENODEV, errno.EBADF)

_log = Logger("xbfs.mount")


class _Waiting(NamedTuple):
    """A request that may have to wait, how it is answered, since when it waits, and for how long it may."""

    file: OpenFile
    call: Callable[[], Sequence[Part]]
    offset: int
    size: int
    began_s: float
    limit_s: float


class _Result(NamedTuple):
    """What a request is answered: an errno or 0, the bytes, and what the file is told."""

    code: int
    parts: Sequence[Part]
    problem: XbfsError | None


class Outcome(Enum):
    """What became of a request: not one of ours | answered, or it will be | also, and this thread is to end."""

    FOREIGN = "foreign"
    DONE = "done"
    LEAVE = "leave"


class DataPlane:
    """Serves the FUSE device ``device``. ``ended`` is called, from any thread, when the kernel has let go of it.

    ``control`` is the descriptor that libfuse shall take for the device; libfuse closes it. ``problem`` says why, if it
    was not the kernel that ended it.
    """

    # The kernel keeps the targets of links: `latest` is in the path of every file that is looked at.
    init_flags: tuple[int, int] = (wire.INIT_CACHE_SYMLINKS, 0)
    """Flags of libfuse's answer to INIT that are added and taken away on its way (``pump``)."""

    def __init__(self, device: int, files: OpenFiles, clock: Clock, *, ended: Callable[[], None]) -> None:
        self._device = device
        self._files = files
        self._clock = clock
        self._ended = ended
        self._base = cores() + 1
        self._lock = threading.Lock()
        self._threads = 0
        self._busy = 0
        self._stopping = False
        self._waiting: dict[int, _Waiting] = {}
        self._resumed: deque[int] = deque()
        self.problem: str | None = None
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for end in (ours, theirs):
            with suppress(OSError):  # root only; others keep the system's limit, which is enough for a directory
                end.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, _SOCKET_BYTES)
        self._relay = ours
        self.control = theirs.detach()
        self._pump = subprocess.Popen(
            [sys.executable, "-I", "-S", str(PUMP), str(ours.fileno()), str(device), *map(hex, self.init_flags)],
            pass_fds=(ours.fileno(), device),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            cwd="/",
            start_new_session=True,  # Ctrl-C is not for it
        )

    def start(self) -> None:
        """Begin to serve; libfuse must be there already, as the kernel's first request is for it."""
        for _ in range(self._base):
            self._grow()

    async def tend(self) -> NoReturn:
        """Answer for reads that have none by the deadline, and notice if the pump dies."""
        while True:
            await trio.sleep(TICK_S)
            if self._waiting:
                self._expire()
            if not self._stopping and self._pump.poll() is not None:
                self.problem = f"the process that carries answers to the kernel died ({self._pump.returncode})"
                self._end()

    def close(self) -> None:
        """Let go of everything, after the unmount. Threads that are stuck end with the process."""
        self._stopping = True
        self._relay.close()
        self._pump.terminate()
        with suppress(subprocess.TimeoutExpired):
            self._pump.wait(_END_S)
        with suppress(OSError):
            os.close(self._device)

    @property
    def threads(self) -> int:
        """Threads there are now."""
        return self._threads

    def _grow(self) -> None:
        with self._lock:
            if self._threads >= THREADS_MAX or self._stopping:
                return
            self._threads += 1
        try:
            # A daemon: stuck in a storage that never answers, it must not keep the process from ending.
            threading.Thread(target=self._listen, name="xbfs-device", daemon=True).start()
        except RuntimeError as exc:  # the system's limit on threads: go on with those there are
            _log.warning("no more threads", problem=str(exc))
            with self._lock:
                self._threads -= 1

    def _listen(self) -> None:
        """Take requests until the mount is gone, or until enough others listen."""
        buffer = bytearray(wire.REQUEST_MAX)
        view, into, device = memoryview(buffer), [buffer], self._device
        images = self._files.images
        header, read_in = wire.IN_HEADER.unpack_from, wire.READ_IN.unpack_from
        while True:
            try:
                size = os.readv(device, into)
            except OSError as exc:
                if exc.errno in _GONE:
                    break
                continue  # ENOENT: whoever asked is gone; EINTR, EAGAIN
            if not size:
                break
            _, opcode, unique, *_ = header(buffer)
            if opcode == wire.READ:
                handle, offset, length = read_in(buffer, wire.IN_HEADER.size)
                image = images.get(handle)
                if image is not None:
                    parts = image.parts_cached(offset, length)
                    if parts is not None:
                        self._answer(unique, parts)
                    elif not self._wait(
                        unique, image, partial(image.parts_now, offset, length), offset, length, image.timeout_s
                    ):
                        return
                    continue
            if opcode == wire.LSEEK:
                handle, offset, whence = wire.LSEEK_IN.unpack_from(buffer, wire.IN_HEADER.size)
                image = images.get(handle)
                if image is not None:
                    seek = partial(_sought, image, offset, data=whence == os.SEEK_DATA)
                    if not image.seek_waits:
                        self._answer_now(unique, seek)
                    elif not self._wait(unique, image, seek, offset, 0, image.timeout_s):
                        return
                    continue
            outcome = self._handled(opcode, unique, view)
            if outcome is Outcome.LEAVE:
                return
            if outcome is Outcome.FOREIGN:
                with suppress(OSError):  # libfuse is gone: so is the mount, soon
                    self._relay.send(view[:size])
        self._end()

    def _handled(self, opcode: int, unique: int, request: memoryview) -> Outcome:
        """Answer what is neither an image's read nor libfuse's."""
        if opcode == wire.READ:
            handle, offset, length = wire.READ_IN.unpack_from(request, wire.IN_HEADER.size)
            text = self._files.texts.get(handle)
            if text is None:
                return Outcome.FOREIGN
            self._answer(unique, (text[offset : offset + length],))
        elif opcode == wire.READLINK:
            # The kernel keeps no target, and `latest` is in the path of every file that `ls -l` asks about.
            target = self._files.link_target(wire.IN_HEADER.unpack_from(request)[3])
            if target is None:
                return Outcome.FOREIGN
            self._answer(unique, (target,))
        elif opcode == wire.OPENDIR:
            # pyfuse3 has no way to say that the kernel may keep a listing.
            number = self._files.open_settled(wire.IN_HEADER.unpack_from(request)[3])
            if number is None:
                return Outcome.FOREIGN
            self._answer(unique, (wire.OPEN_OUT.pack(number, wire.KEPT_LISTING, 0),))
        elif opcode == wire.INTERRUPT:
            # The kernel then sends no more of them. libfuse would wait for a request that it never sees.
            self._refuse(unique, errno.ENOSYS)
        else:
            return Outcome.FOREIGN
        return Outcome.DONE

    def _answer_now(self, unique: int, seek: Callable[[], Sequence[Part]]) -> None:
        try:
            self._answer(unique, seek())
        except Refused as exc:
            self._refuse(unique, exc.errno)

    def _wait(
        self,
        unique: int,
        file: OpenFile,
        call: Callable[[], Sequence[Part]],
        offset: int,
        size: int,
        limit_s: float,
    ) -> bool:
        """Make a call that may wait and answer; False if this thread is not needed any more."""
        waiting = _Waiting(file, call, offset, size, self._clock.monotonic_s(), limit_s)
        self._waiting[unique] = waiting
        with self._lock:
            self._busy += 1
            alone = self._busy >= self._threads
        if alone:
            self._grow()
        result = self._attempt(unique, waiting)
        with self._lock:
            self._busy -= 1
            superfluous = self._threads - self._busy > 2 * self._base
            self._threads -= superfluous
        # Last of all: the answer brings the next request, whose thread must not have to wait for this one.
        if result is not None:
            self._tell(unique, waiting, result)
        return not superfluous

    def _attempt(self, unique: int, waiting: _Waiting) -> _Result | None:
        """Make the call. None if the deadline has answered already, or what is known to hang is waited for later."""
        problem: XbfsError | None = None
        parts: Sequence[Part] = ()
        code = 0
        try:
            parts = waiting.call()
        except Parked as exc:
            self._park(exc, unique, waiting.call)
            return None
        except Refused as exc:
            code = exc.errno
        except XbfsError as exc:
            problem, code = exc, errno_of(exc)
        except Exception as exc:  # noqa: BLE001 - a bug there must cost one request, not the mount
            _log.error("a request failed for a reason of our own", exc_info=exc)
            code = errno.EIO
        return None if self._waiting.pop(unique, None) is None else _Result(code, parts, problem)

    def _tell(self, unique: int, waiting: _Waiting, result: _Result) -> None:
        if result.code == 0:
            self._answer(unique, result.parts)
            return
        self._refuse(unique, result.code)
        if result.problem is not None:
            waiting.file.failed(waiting.offset, waiting.size, result.problem)

    def _park(self, stalled: Parked, unique: int, _call: Callable[[], Sequence[Part]]) -> None:
        """Have the request answered later; whatever the call needs of the request's bytes is overwritten then."""
        stalled.park(lambda: self._resume(unique))

    def _resume(self, unique: int) -> None:
        """The blob answers again: read in a thread of its own, all that were parked one after the other."""
        self._resumed.append(unique)
        threading.Thread(target=self._attempt_resumed, name="xbfs-resumed", daemon=True).start()

    def _attempt_resumed(self) -> None:
        with suppress(IndexError):
            while True:
                unique = self._resumed.popleft()
                waiting = self._waiting.get(unique)
                result = None if waiting is None else self._attempt(unique, waiting)
                if waiting is not None and result is not None:
                    self._tell(unique, waiting, result)

    def _expire(self) -> None:
        now_s = self._clock.monotonic_s()
        for unique, waiting in list(self._waiting.items()):
            limit_s = waiting.limit_s
            if now_s - waiting.began_s >= limit_s and self._waiting.pop(unique, None) is not None:
                self._refuse(unique, errno.EIO)
                problem = StorageTimeout(f"no answer from the storage within {limit_s:g} s")
                waiting.file.failed(waiting.offset, waiting.size, problem)

    def _answer(self, unique: int, parts: Sequence[Part]) -> None:
        size = sum(map(len, parts))
        with suppress(OSError):  # whoever asked is gone
            os.writev(self._device, (wire.answer(unique, size), *parts))

    def _refuse(self, unique: int, code: int) -> None:
        with suppress(OSError):
            os.write(self._device, wire.refusal(unique, code))

    def _end(self) -> None:
        with self._lock:
            first, self._stopping = not self._stopping, True
        if first:
            self._ended()


def _sought(file: OpenFile, offset: int, *, data: bool) -> Sequence[Part]:
    position = file.seek(offset, data=data)
    if position is None:
        raise refused(errno.ENXIO)
    return (wire.LSEEK_OUT.pack(position),)
