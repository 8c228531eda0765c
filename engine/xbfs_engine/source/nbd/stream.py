"""A TCP connection, plain or with TLS, that receives straight into the caller's memory.

Belongs to one task. trio's own TLS stream returns new bytes objects of one record each; here records are decrypted
into their place, and the socket is read many records at a time. Raises what ``socket`` and ``ssl`` raise;
TransferFailed when the peer hangs up.
"""

from __future__ import annotations

import errno
import os
import socket
import ssl
from typing import Self

import trio

from xbfs_engine.core.errors import TransferFailed
from xbfs_engine.core.limits import KIB, MIB

_TURN_BYTES = 1 * MIB
"""Bytes taken without waiting for the network before other tasks get a turn: about a millisecond."""

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

    async def start_tls(self, context: ssl.SSLContext, server_name: str | None) -> TlsStream:
        """Shake hands; this stream is then no longer to be used. Nothing must have been received too much."""
        stream = TlsStream(self._socket, context, server_name)
        await stream.shake_hands()
        return stream

    async def send(self, data: bytes | bytearray) -> None:
        """Send all of ``data``."""
        await self._send_raw(data)

    async def fill(self, view: memoryview) -> None:
        """Receive exactly ``view``."""
        while view:
            view = view[await self._receive(view) :]

    def close(self) -> None:
        """Hang up."""
        self._socket.close()

    async def _send_raw(self, data: bytes | bytearray) -> None:
        view = memoryview(data)
        while view:
            try:
                view = view[self._socket.send(view) :]
            except BlockingIOError:
                await trio.lowlevel.wait_writable(self._socket)

    async def _receive(self, view: memoryview) -> int:
        """Take what is there, at least one byte."""
        if self._turn > _TURN_BYTES:
            self._turn = 0
            await trio.lowlevel.checkpoint()
        while True:
            try:
                count = self._socket.recv_into(view)
            except BlockingIOError:
                self._turn = 0
                await trio.lowlevel.wait_readable(self._socket)
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

    async def shake_hands(self) -> None:
        """Negotiate. Raises ssl.SSLError."""
        while True:
            try:
                self._tls.do_handshake()
            except ssl.SSLWantReadError:
                await self._exchange()
            else:
                await self._flush()
                return

    async def send(self, data: bytes | bytearray) -> None:
        """Send all of ``data``."""
        self._tls.write(data)
        await self._flush()

    async def fill(self, view: memoryview) -> None:
        """Receive exactly ``view``."""
        read = self._tls.read
        while view:
            try:
                count = int(read(len(view), view))  # with a buffer it returns how much; typeshed says bytes
            except ssl.SSLWantReadError:
                await self._exchange()
                continue
            if not count:
                raise TransferFailed("the server hung up")
            view = view[count:]

    async def _exchange(self) -> None:
        """Send what the library has to say, then hear more."""
        await self._flush()
        count = await self._receive(self._records)
        self._incoming.write(self._records[:count])

    async def _flush(self) -> None:
        if self._outgoing.pending:
            await self._send_raw(self._outgoing.read())
