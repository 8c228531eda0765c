"""A TCP connection, plain or with TLS, that receives straight into the caller's memory.

Belongs to one task or thread at a time. Sending and receiving are generators that yield the event (POLLIN, POLLOUT)
they must wait for: the event loop drives them while a connection is made (``drive``), a thread while it carries data
(``drive_blocking``). Records are decrypted into their place, and the socket is read many records at a time; both is
done without the interpreter's lock, so connections use as many cores as there are threads. Raises what ``socket`` and
``ssl`` raise; TransferFailed when the peer hangs up; trio.TooSlowError.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import ssl
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Self, TypeVar

import trio

from xbfs_engine.core.errors import TransferFailed
from xbfs_engine.core.limits import KIB, MIB

if TYPE_CHECKING:
    from collections.abc import Generator

T = TypeVar("T")

_TURN_BYTES = 1 * MIB
"""Bytes taken without waiting for the network before other tasks get a turn and deadlines are looked at."""

_RECORDS_BYTES = 256 * KIB
"""Encrypted bytes taken at a time: sixteen records of the largest size; they stay in the processor's cache."""


class PlainStream:
    """Bytes as they are."""

    def __init__(self, connected: socket.socket) -> None:
        self._socket = connected
        self._turn = 0

    @classmethod
    async def connect(cls, host: str, port: int) -> Self:
        """Try the addresses of ``host`` in turn."""
        failure = errno.EADDRNOTAVAIL
        for family, kind, number, _, address in await trio.socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
            stream = socket.socket(family, kind, number)
            try:
                stream.setblocking(False)
                stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                failure = stream.connect_ex(address)
                if failure == errno.EINPROGRESS:
                    await trio.lowlevel.wait_writable(stream)
                    failure = stream.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            except BaseException:
                stream.close()
                raise
            if not failure:
                return cls(stream)
            stream.close()
        raise OSError(failure, os.strerror(failure))

    def start_tls(self, context: ssl.SSLContext, server_name: str | None) -> TlsStream:
        """Go on with TLS; this stream is then no longer to be used. Nothing must have been received too much."""
        return TlsStream(self._socket, context, server_name)

    def send(self, data: bytes | bytearray) -> Generator[int, None, None]:
        """Send all of ``data``."""
        view = memoryview(data)
        while view:
            try:
                view = view[self._socket.send(view) :]
            except BlockingIOError:
                yield select.POLLOUT

    def fill(self, view: memoryview) -> Generator[int, None, None]:
        """Receive exactly ``view``."""
        while view:
            view = view[(yield from self._receive(view)) :]

    async def drive(self, steps: Generator[int, None, T]) -> T:
        """Take all steps in the event loop, waiting where they say."""
        while True:
            try:
                event = next(steps)
            except StopIteration as done:
                result: T = done.value
                return result
            await (trio.lowlevel.wait_readable if event == select.POLLIN else trio.lowlevel.wait_writable)(self._socket)

    def drive_blocking(self, steps: Generator[int, None, T], patience_s: float) -> T:
        """Take all steps in this thread, within ``patience_s`` in all."""
        until_s = time.monotonic() + patience_s
        while True:
            try:
                event = next(steps)
            except StopIteration as done:
                result: T = done.value
                return result
            rest_s = until_s - time.monotonic()
            poll = select.poll()
            poll.register(self._socket, event | select.POLLRDHUP)
            found = poll.poll(rest_s * 1000) if rest_s > 0 else []
            if not found:
                raise trio.TooSlowError
            if not found[0][1] & ~select.POLLRDHUP:
                raise TransferFailed("the server hung up")  # nothing to read and nobody to write to

    def stop_receiving(self) -> None:
        """Let whoever waits for bytes meet the end of the stream; for any thread, before ``close``."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RD)

    def close(self) -> None:
        """Hang up."""
        self._socket.close()

    def _receive(self, view: memoryview) -> Generator[int, None, int]:
        """Take what is there, at least one byte."""
        if self._turn > _TURN_BYTES:
            self._turn = 0
            yield select.POLLIN
        while True:
            try:
                count = self._socket.recv_into(view)
            except BlockingIOError:
                self._turn = 0
                yield select.POLLIN
                continue
            if not count:
                raise TransferFailed("the server hung up")
            self._turn += count
            return count


class TlsStream(PlainStream):
    """The same through TLS."""

    def __init__(self, connected: socket.socket, context: ssl.SSLContext, server_name: str | None) -> None:
        super().__init__(connected)
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_hostname=server_name)
        self._records = memoryview(bytearray(_RECORDS_BYTES))

    @property
    def peer(self) -> ssl.SSLObject:
        """Who the server is."""
        return self._tls

    def shake_hands(self) -> Generator[int, None, None]:
        """Negotiate. Raises ssl.SSLError."""
        while True:
            try:
                self._tls.do_handshake()
            except ssl.SSLWantReadError:
                yield from self._exchange()
            else:
                yield from self._flush()
                return

    def send(self, data: bytes | bytearray) -> Generator[int, None, None]:
        """Send all of ``data``."""
        self._tls.write(data)
        yield from self._flush()

    def fill(self, view: memoryview) -> Generator[int, None, None]:
        """Receive exactly ``view``."""
        read = self._tls.read
        while view:
            try:
                count = int(read(len(view), view))  # with a buffer it returns how much; typeshed says bytes
            except ssl.SSLWantReadError:
                yield from self._exchange()
                continue
            if not count:
                raise TransferFailed("the server hung up")
            view = view[count:]

    def _exchange(self) -> Generator[int, None, None]:
        """Send what the library has to say, then hear more."""
        yield from self._flush()
        count = yield from self._receive(self._records)
        self._incoming.write(self._records[:count])

    def _flush(self) -> Generator[int, None, None]:
        if self._outgoing.pending:
            yield from super().send(self._outgoing.read())
