"""One worker as its caller sees it: requests with deadlines, and an end.

Owns the control socket and the service of blocks. One request at a time; ``end`` and ``is_over`` may be called from any
thread. Whatever a worker does wrong becomes `WorkerLost`: then it is killed, and of no further use.
"""

from __future__ import annotations

import signal
from contextlib import suppress
from dataclasses import dataclass
from socket import SHUT_RDWR
from threading import Lock, RLock
from typing import TYPE_CHECKING, Final, Generic, TypeVar

from xbfs_engine.guestfs.worker import replies
from xbfs_engine.guestfs.worker.blocks import BlockService, BusyTime
from xbfs_engine.guestfs.worker.confine import Confinement
from xbfs_engine.guestfs.worker.forms import CONTENT, DONE, REFUSED, STORAGE_FAILED
from xbfs_engine.guestfs.worker.frames import HEADER_BYTES, BadMessage, body_bytes, pack, unpack

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from xbfs_engine.core.errors import XbfsError
    from xbfs_engine.core.runtime import Clock
    from xbfs_engine.guestfs.volumes import Disk, VolumeKey
    from xbfs_engine.guestfs.worker.launcher import Launched
    from xbfs_engine.guestfs.worker.limits import Limits

_T = TypeVar("_T")

_CLOSE_S: Final = 1.0
"""For whoever waits for an answer to notice that none will come."""


STARTING: Final = ("", "start", b"")
"""Key of the time before the first request."""


class WorkerLost(Exception):
    """The worker is gone or was killed; the text says why. Never leaves this package."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.key = STARTING
        """Of the request during which it was lost."""


@dataclass(frozen=True, slots=True)
class Request(Generic[_T]):
    """A question to a worker, and how to understand the answer."""

    kind: str
    decode: Callable[[object], _T]
    limit_s: float
    volume: str = ""
    node: bytes = b""
    number: int = 0
    """A cookie or an offset."""
    length: int = 0
    name: bytes = b""

    @property
    def key(self) -> tuple[str, str, bytes]:
        """What is remembered of a request that ended workers."""
        return self.volume, self.kind, self.node

    def message(self) -> bytes:
        """As it goes to the worker."""
        return pack((self.kind, self.volume, self.node, self.number, self.length, self.name))


class WorkerProcess:
    """A started worker for ``disks``. WorkerLost if it does not get ready."""

    def __init__(
        self,
        launched: Launched,
        clock: Clock,
        limits: Limits,
        disks: Sequence[Disk],
        keys: Sequence[VolumeKey],
        one_at_a_time: Lock,
        ended: Callable[[], None],
    ) -> None:
        self._launched = launched
        self._control = launched.control
        self._limits = limits
        self._busy = BusyTime(clock)
        self._asking = RLock()
        self._end_lock = Lock()
        self._is_ended = False
        self._end_words = ""
        self.opened: set[str] = set()
        """Volumes whose filesystem it has opened; the empty name stands for the search for volumes."""
        memory_bytes = limits.memory_bytes + (limits.unlock_memory_bytes if keys else 0)
        try:
            self._blocks = BlockService(launched.blocks, disks, self._busy, one_at_a_time, ended)
            sizes = [(disk.name, disk.source.size_bytes) for disk in disks]
            self._busy.begin()
            self._send(pack((sizes, [(key.secret, key.volume) for key in keys], memory_bytes)), limits.start_s)
            in_force, missing = replies.confinement(self._receive(limits.start_s))
        except BadMessage as error:
            raise self._lost(f"it broke its rules: {error}") from error
        except BaseException:
            self.end()
            raise
        self.confinement: Final = Confinement(in_force, missing)

    @property
    def is_over(self) -> bool:
        """If it is gone, or was killed."""
        return self._is_ended or self._blocks.is_over

    def ask(self, request: Request[_T]) -> _T:
        """The answer, or the error that it is. Raises WorkerLost."""
        with self._asking:
            try:
                self._busy.begin()
                self._send(request.message(), request.limit_s)
                status, answer = replies.answer(self._receive(request.limit_s))
                if status == DONE:
                    return request.decode(answer)
                if status == CONTENT:
                    return request.decode(self._content(request, replies.number(answer)))
                failed = self._failed(status, answer)
            except WorkerLost as lost:
                lost.key = request.key
                raise
            except BadMessage as error:
                broken = self._lost(f"it broke its rules: {error}")
                broken.key = request.key
                raise broken from error
            except BaseException:
                # Also when interrupted: the answer would be taken for that to the next request.
                self.end()
                raise
        raise failed

    def _content(self, request: Request[_T], length: int) -> bytes:
        """What comes behind an answer; nothing is allocated that was not asked for."""
        if length > request.length:
            raise BadMessage("more content than was asked for")
        return bytes(self._receive_exactly(length, request.limit_s))

    def _failed(self, status: int, answer: object) -> XbfsError:
        if status == REFUSED:
            return replies.error(answer)
        failed = self._blocks.error(replies.number(answer)) if status == STORAGE_FAILED else None
        if failed is None:
            raise BadMessage("an answer of an unknown kind")
        return failed

    def end(self) -> str:
        """Kill it; how it ended, in words."""
        with self._end_lock:
            if not self._is_ended:
                self._is_ended = True
                # The service of blocks closes its socket by itself, once the storage has answered.
                for connection in (self._launched.blocks, self._control):
                    with suppress(OSError):
                        connection.shutdown(SHUT_RDWR)
                self._end_words = _ending(self._launched.end())
        if self._asking.acquire(timeout=_CLOSE_S):
            self._control.close()
            self._asking.release()
        return self._end_words

    def _lost(self, reason: str) -> WorkerLost:
        ending = self.end()
        return WorkerLost(reason or ending)

    def _send(self, message: bytes, limit_s: float) -> None:
        self._control.settimeout(limit_s)
        try:
            self._control.sendall(message)
        except TimeoutError as error:
            raise self._lost(f"it took no request for {limit_s:g} s") from error
        except OSError as error:
            raise self._lost("") from error

    def _receive(self, limit_s: float) -> object:
        return unpack(self._receive_exactly(body_bytes(self._receive_exactly(HEADER_BYTES, limit_s)), limit_s))

    def _receive_exactly(self, length: int, limit_s: float) -> bytearray:
        data = bytearray(length)
        view = memoryview(data)
        while view:
            own_s, whole_s = self._busy.spent_s()
            if own_s >= limit_s:
                raise self._lost(f"it did not answer within {limit_s:g} s of its own time")
            if whole_s >= self._limits.whole_s:
                raise self._lost(f"it did not answer within {self._limits.whole_s:g} s")
            left_s = min(limit_s - own_s, self._limits.whole_s - whole_s)
            self._control.settimeout(left_s)
            try:
                count = self._control.recv_into(view)
            except TimeoutError:
                continue
            except OSError as error:
                raise self._lost("") from error
            if not count:
                raise self._lost("")
            view = view[count:]
        return data


def _ending(status: int | None) -> str:
    """A wait status in words."""
    if status is None:
        return "it ended"
    number = status & 0x7F
    if not number:
        return f"it ended with code {status >> 8}"
    try:
        return f"it was ended by signal {signal.Signals(number).name}"
    except ValueError:
        return f"it was ended by signal {number}"
