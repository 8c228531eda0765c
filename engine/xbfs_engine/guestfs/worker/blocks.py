"""Reads of a restore point's disks by its worker: asked over a socket, answered by a thread where the storage is.

A question is disk number, offset and length; an answer a status and the bytes, or an error. Errors keep their identity:
the worker gets a number and the message, and whoever asked the worker gets the error itself when that number comes
back. `RemoteSource` is the worker's side, for one thread; `BlockService` the other, a thread of its own.
"""

from __future__ import annotations

import struct
from collections import OrderedDict
from contextlib import suppress
from socket import MSG_WAITALL
from threading import Lock, Thread
from typing import TYPE_CHECKING, Final

from xbfs_engine.core.errors import GuestDamaged, XbfsError
from xbfs_engine.guestfs.worker.frames import BadMessage, Closed, receive_exactly
from xbfs_engine.guestfs.worker.limits import BLOCK_BYTES_MAX, CACHE_BYTES, CACHED_BLOCK_BYTES

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Sequence

    from xbfs_engine.core.runtime import Clock
    from xbfs_engine.guestfs.volumes import Disk

_QUESTION: Final = struct.Struct("<IQI")
"""Number of the disk, offset, length."""
_ANSWER: Final = struct.Struct("<BIQ")
"""Status, length of what follows, number of the error."""
_DATA: Final = 0
_FAILED: Final = 1
_FAILED_FOR_NOW: Final = 2

_MESSAGE_BYTES_MAX: Final = 4096
_ERRORS_KEPT: Final = 64
_DRAINED: Final = 4096


class StorageFailed(XbfsError):
    """In a worker: the storage could not give a block."""

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.number = number


class StorageFailedForNow(StorageFailed):
    """In a worker: the storage could not give a block, and may later."""

    retryable = True


class BlockCache:
    """The blocks of all disks of one worker that were used last."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._blocks: OrderedDict[tuple[int, int], bytes] = OrderedDict()

    def block(self, disk: int, number: int, size_bytes: int) -> bytes:
        """One block of a disk of ``size_bytes``; the last one may be short."""
        key = (disk, number)
        found = self._blocks.get(key)
        if found is not None:
            self._blocks.move_to_end(key)
            return found
        start = number * CACHED_BLOCK_BYTES
        found = self._blocks[key] = self.ask(disk, start, min(CACHED_BLOCK_BYTES, size_bytes - start))
        if len(self._blocks) * CACHED_BLOCK_BYTES > CACHE_BYTES:
            self._blocks.popitem(last=False)
        return found

    def ask(self, disk: int, offset: int, length: int) -> bytes:
        """Bytes from the other side, not from the cache."""
        self._connection.sendall(_QUESTION.pack(disk, offset, length))
        status, size, number = _ANSWER.unpack(receive_exactly(self._connection, _ANSWER.size))
        body = self._receive(size)
        if status == _DATA:
            return body
        failed = StorageFailedForNow if status == _FAILED_FOR_NOW else StorageFailed
        raise failed(body.decode(errors="replace"), number)

    def _receive(self, size: int) -> bytes:
        left = size
        try:
            # Usually all of it at once, without a copy.
            body = self._connection.recv(size, MSG_WAITALL)
            left -= len(body)
            if left:
                rest = receive_exactly(self._connection, left)
                left = 0
                body += rest
        except MemoryError:
            # Else the rest would be taken for the next answer.
            while left:
                left -= len(receive_exactly(self._connection, min(left, _DRAINED)))
            raise
        return body


class RemoteSource:
    """A disk as a worker sees it: a BlockSource."""

    def __init__(self, cache: BlockCache, disk: int, size_bytes: int) -> None:
        self._cache = cache
        self._disk = disk
        self._size_bytes = size_bytes

    @property
    def size_bytes(self) -> int:
        """Size of the disk."""
        return self._size_bytes

    def read_at(self, offset: int, length: int) -> bytes:
        """Exactly ``length`` bytes; GuestDamaged outside of the disk, StorageFailed if the storage does not answer."""
        end = offset + length
        if offset < 0 or length < 0 or end > self._size_bytes:
            raise GuestDamaged(f"bytes {offset} to {end} were asked of a disk of {self._size_bytes} bytes")
        if length >= CACHED_BLOCK_BYTES:
            return self._uncached(offset, length)
        pieces = []
        while offset < end:
            number, inside = divmod(offset, CACHED_BLOCK_BYTES)
            block = self._cache.block(self._disk, number, self._size_bytes)
            piece = block[inside : inside + end - offset]
            pieces.append(piece)
            offset += len(piece)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def _uncached(self, offset: int, length: int) -> bytes:
        if length <= BLOCK_BYTES_MAX:
            return self._cache.ask(self._disk, offset, length)
        starts = range(offset, offset + length, BLOCK_BYTES_MAX)
        pieces = [self._cache.ask(self._disk, start, min(BLOCK_BYTES_MAX, offset + length - start)) for start in starts]
        return b"".join(pieces)


class BusyTime:
    """How long a worker was busy with its request by itself: without the time in which it waited for blocks."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._lock = Lock()
        self._begun = 0.0
        self._served_s = 0.0
        self._serving_since: float | None = None

    def begin(self) -> None:
        """A request goes out."""
        with self._lock:
            self._begun = self._clock.monotonic_s()
            self._served_s = 0.0
            if self._serving_since is not None:
                self._serving_since = self._begun

    def serving(self) -> None:
        """It asks for a block."""
        with self._lock:
            self._serving_since = self._clock.monotonic_s()

    def served(self) -> None:
        """It has its block."""
        with self._lock:
            if self._serving_since is not None:
                self._served_s += self._clock.monotonic_s() - self._serving_since
                self._serving_since = None

    def spent_s(self) -> tuple[float, float]:
        """Seconds since the request went out: the worker's own, and all."""
        with self._lock:
            now = self._clock.monotonic_s()
            served_s = self._served_s + (now - self._serving_since if self._serving_since is not None else 0.0)
            whole_s = now - self._begun
            return whole_s - served_s, whole_s


class BlockService:
    """Answers one worker's reads until its socket ends; ``one_at_a_time`` is held while a disk is read."""

    def __init__(
        self, connection: socket.socket, disks: Sequence[Disk], busy: BusyTime, one_at_a_time: Lock,
        ended: Callable[[], None],
    ) -> None:  # fmt: skip
        self._connection = connection
        self._disks = disks
        self._busy = busy
        self._one_at_a_time = one_at_a_time
        self._ended = ended
        self._errors: OrderedDict[int, XbfsError] = OrderedDict()
        self._errors_count = 0
        self.is_over = False
        Thread(target=self._run, name="guest-blocks", daemon=True).start()

    def error(self, number: int) -> XbfsError | None:
        """One of the last errors that were answered."""
        return self._errors.get(number)

    def _run(self) -> None:
        with suppress(OSError, Closed, BadMessage), self._connection:
            while True:
                question = receive_exactly(self._connection, _QUESTION.size)
                header, body = self._answer(*_QUESTION.unpack(question))
                if len(body) > CACHED_BLOCK_BYTES:
                    self._connection.sendall(header)
                    self._connection.sendall(body)
                else:
                    self._connection.sendall(header + body)
        self.is_over = True
        self._ended()

    def _answer(self, number: int, offset: int, length: int) -> tuple[bytes, bytes]:
        if number >= len(self._disks) or not 0 < length <= BLOCK_BYTES_MAX:
            raise BadMessage(f"{length} bytes of disk {number}")
        source = self._disks[number].source
        if offset + length > source.size_bytes:
            raise BadMessage(f"{length} bytes at {offset} of disk {number}")
        self._busy.serving()
        try:
            with self._one_at_a_time:
                data = source.read_at(offset, length)
        except XbfsError as error:
            return self._failed(error)
        # Whatever else a source lets through would end this thread, and be taken for the worker's fault.
        except Exception as error:  # noqa: BLE001
            return self._failed(XbfsError(f"a disk can not be read: {type(error).__name__}: {error}"))
        finally:
            self._busy.served()
        assert len(data) == length
        return _ANSWER.pack(_DATA, length, 0), data

    def _failed(self, error: XbfsError) -> tuple[bytes, bytes]:
        self._errors_count += 1
        self._errors[self._errors_count] = error
        if len(self._errors) > _ERRORS_KEPT:
            self._errors.popitem(last=False)
        message = error.message.encode(errors="replace")[:_MESSAGE_BYTES_MAX]
        status = _FAILED_FOR_NOW if error.retryable else _FAILED
        return _ANSWER.pack(status, len(message), self._errors_count), message
