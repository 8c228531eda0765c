"""An NBD server as poor as a XenServer host's, with faults on demand: threads, no trio, nothing of the product.

Handshake and errors as in xapi-project/nbd and xapi-nbd: only EXPORT_NAME, TLS 1.2 only, one request at a time, every
refusal a silent close, every error the end of the connection, sixteen connections in all.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
import struct
import threading
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, NamedTuple, Self

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    from tests.support.nbd_certificates import Identity

EXPORT_NAME, ABORT, LIST, STARTTLS = 1, 2, 3, 5
ACK, ERR_UNSUP, ERR_POLICY, ERR_INVALID, ERR_TLS_REQD = 1, 0x80000001, 0x80000002, 0x80000003, 0x80000005
READ, WRITE, DISCONNECT = 0, 1, 2
EPERM, EIO, EINVAL = 1, 5, 22
BLOCK = 512 << 10


class Request(NamedTuple):
    """A read that a client asked for."""

    offset: int
    length: int


class PoorServer:
    """Serves the bytes in ``disks`` by export name (or "" for all names). Use as a context manager.

    ``fault`` sees every read and may return "error" (EIO, then close), "cut" (half the data, then close), "hang" or
    "garbage"; ``greet`` may return the same "hang" or "garbage", or "slow", for a new connection.
    """

    def __init__(self, disks: dict[str, bytes], identity: Identity | None = None, *, limit: int = 16) -> None:
        self.disks = disks
        self.limit = limit
        self.fault: Callable[[Request], str | None] = lambda _: None
        self.greet: Callable[[], str | None] = lambda: None
        self.opening_s = 0.0
        self.requests: list[Request] = []
        self.names: list[str] = []
        self.accepted = 0
        self.open = 0
        self.open_most = 0
        self.opening = 0
        self.opening_most = 0
        self.goodbyes = 0
        self._context = _context(identity) if identity else None
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._clients: set[socket.socket] = set()
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=5)
        self._threads = [threading.Thread(target=self._listen, daemon=True)]

    @property
    def port(self) -> int:
        port: int = self._listener.getsockname()[1]
        return port

    def __enter__(self) -> Self:
        self._threads[0].start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.hang_up()
        for thread in self._threads:
            thread.join(5)
            assert not thread.is_alive()

    def hang_up(self) -> None:
        """Break all connections."""
        with self._lock:
            for client in self._clients:
                with contextlib.suppress(OSError):
                    client.shutdown(socket.SHUT_RDWR)

    def wait_until(self, true: Callable[[], bool]) -> None:
        """Wait a moment for something to become true."""
        until = time.monotonic() + 5
        while not true():
            assert time.monotonic() < until
            time.sleep(0.01)

    def _listen(self) -> None:
        while not self._over.is_set():
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            thread = threading.Thread(target=self._serve, args=(client,), daemon=True)
            self._threads.append(thread)
            thread.start()

    def _serve(self, client: socket.socket) -> None:
        with self._lock:
            self._clients.add(client)
            self.accepted += 1
            self.open += 1
            self.open_most = max(self.open_most, self.open)
            welcome = self.open <= self.limit
        stream = client
        try:
            if welcome:
                stream = self._negotiate(client)
                self._transmit(stream, self._export(stream))
        except (OSError, _End):
            pass
        finally:
            with self._lock:
                self._clients.discard(client)
                self.open -= 1
            stream.close()
            client.close()

    def _negotiate(self, client: socket.socket) -> socket.socket:
        """Up to the point where EXPORT_NAME may come."""
        self._misbehave(client, self.greet())
        client.sendall(struct.pack(">8s8sH", b"NBDMAGIC", b"IHAVEOPT", 1))
        (flags,) = struct.unpack(">I", _take(client, 4))
        if self._context is None:
            return client
        if not flags & 1:
            raise _End
        while True:
            option, _ = _option(client)
            if option in {EXPORT_NAME, ABORT}:
                raise _End
            if option != STARTTLS:
                _refuse(client, option, ERR_TLS_REQD)
                continue
            _refuse(client, option, ACK)
            return self._context.wrap_socket(client, server_side=True)

    def _export(self, stream: socket.socket) -> bytes:
        while True:
            option, data = _option(stream)
            if option == EXPORT_NAME:
                break
            if option == ABORT:
                raise _End
            _refuse(stream, option, {STARTTLS: ERR_INVALID, LIST: ERR_POLICY}.get(option, ERR_UNSUP))
        with self._lock:
            self.names.append(data.decode())
            self.opening += 1
            self.opening_most = max(self.opening_most, self.opening)
        time.sleep(self.opening_s)
        with self._lock:
            self.opening -= 1
        disk = self.disks.get(data.decode(), self.disks.get(""))
        if disk is None:
            raise _End
        stream.sendall(struct.pack(">QH", len(disk), 3) + bytes(124))
        return disk

    def _transmit(self, stream: socket.socket, disk: bytes) -> None:
        while True:
            magic, command, cookie, offset, length = struct.unpack(">IIQQI", _take(stream, 28))
            if magic != 0x25609513 or command == DISCONNECT:
                self.goodbyes += 1
                raise _End
            error = EINVAL if command != READ else 0
            error = EPERM if command == WRITE else error
            # A disk of odd size exists only in tests: there the last sector may be short.
            if offset % 512 or (length % 512 and offset + length != len(disk)):
                error = EINVAL
            request = Request(offset, length)
            self.requests.append(request)
            fault = self.fault(request)
            self._misbehave(stream, fault)
            error = EIO if fault == "error" else error
            stream.sendall(struct.pack(">IIQ", 0x67446698, error, cookie))
            if error:
                raise _End
            data = memoryview(disk)[offset : offset + length]
            for at in range(0, len(data), BLOCK):
                if fault == "cut" and at + BLOCK >= len(data) // 2:
                    stream.sendall(data[at : len(data) // 2])
                    raise _End
                stream.sendall(data[at : at + BLOCK])
            if len(data) < length:
                raise _End

    def _misbehave(self, stream: socket.socket, how: str | None) -> None:
        if how == "hang":
            self._over.wait()
            raise _End
        if how == "garbage":
            stream.sendall(b"\xa5" * 5000)
            raise _End


class _End(Exception):
    """The server hangs up."""


def _take(stream: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        part = stream.recv(size - len(data))
        if not part:
            raise _End
        data += part
    return data


def _option(stream: socket.socket) -> tuple[int, bytes]:
    magic, option, length = struct.unpack(">8sII", _take(stream, 16))
    if magic != b"IHAVEOPT":
        raise _End
    return option, _take(stream, length)


def _refuse(stream: socket.socket, option: int, kind: int) -> None:
    stream.sendall(struct.pack(">QIII", 0x3E889045565A9, option, kind, 0))


def _context(identity: Identity) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_2
    with TemporaryDirectory() as folder:
        for name, text in (("certificate", identity.certificate), ("key", identity.key)):
            Path(folder, name).write_text(text)
        context.load_cert_chain(Path(folder, "certificate"), Path(folder, "key"))
    return context
