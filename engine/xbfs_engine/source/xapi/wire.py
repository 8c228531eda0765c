"""One HTTP request to a pinned host, and the raw stream that follows its head in either direction.

Made for disks: bytes go from the TLS layer straight into the caller's buffer. HTTP/1.0, as XenServer's own tools
send (xen-api, xe): the body ends with the connection, and is never chunked. A Wire blocks and is used by one thread
at a time; ``abort`` may be called by any.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Final, NamedTuple

from xbfs_engine.core.errors import PoolUnreachable, TransferFailed
from xbfs_engine.core.limits import KIB
from xbfs_engine.source.xapi.abort import Abortable
from xbfs_engine.source.xapi.trust import connect, unreachable

if TYPE_CHECKING:
    import ssl
    from collections.abc import Iterator, Mapping, Sequence

    from typing_extensions import Buffer

    from xbfs_engine.source.xapi.config import Address

_CONNECT_S: Final = 20.0
_HEAD_MAX: Final = 32 * KIB
"""xapi's heads have less than 1 KiB; the longest part is a redirect's Location."""

_READ_SIZE: Final = 16 * KIB
"""The most that one TLS record holds (RFC 8446, 5.1)."""


class Head(NamedTuple):
    """The head of an answer; names of headers in lower case."""

    status: int
    reason: str
    headers: Mapping[str, str]


class Wire:
    """A connection for one request. Every wait for the host ends after ``timeout_s``."""

    def __init__(self, address: Address, pins: Mapping[str, str], *, timeout_s: float) -> None:
        self.address = address
        self._pins = pins
        self._timeout_s = timeout_s
        self._guard = Abortable()
        self._socket: ssl.SSLSocket | None = None
        self._rest = memoryview(b"")

    def request(self, method: str, target: str, headers: Sequence[tuple[str, str]], body: Buffer = b"") -> Head:
        """Connect, send, and return the head of the answer.

        Raises PoolUnreachable, PinMismatch, TransferFailed.
        """
        lines = [f"{method} {target} HTTP/1.0", *(f"{name}: {value}" for name, value in headers)]
        assert not any("\r" in line or "\n" in line for line in lines)
        with self._guard.using(self._close):
            self._socket = connect(self.address, self._pins, timeout_s=_CONNECT_S)
            self._guard.check()
            self._socket.settimeout(self._timeout_s)
            with self._translated(f"{method} {target.partition('?')[0]}"):
                self._socket.sendall("\r\n".join([*lines, "", ""]).encode("latin-1"))
                if memoryview(body).nbytes:
                    self._socket.sendall(body)
                return self._read_head()

    def send(self, parts: Sequence[Buffer]) -> None:
        """Send all of ``parts``. Raises TransferFailed."""
        with self._translated("send"), self._guard.using(self._close):
            for part in parts:
                self._open().sendall(part)

    def read_into(self, view: memoryview) -> int:
        """Fill ``view``, of bytes; fewer come only at the end of the stream. Raises TransferFailed."""
        with self._translated("receive"), self._guard.using(self._close):
            done = min(len(self._rest), len(view))
            view[:done] = self._rest[:done]
            self._rest = self._rest[done:]
            sock = self._open()
            while done < len(view):
                count = sock.recv_into(view[done:])
                if count == 0:
                    break
                done += count
            return done

    def put_back(self, data: bytes) -> None:
        """Let the next ``read_into`` begin with ``data``."""
        self._rest = memoryview(data + bytes(self._rest))

    def abort(self) -> None:
        """End it: a use in another thread fails now; the connection is closed."""
        self._guard.abort(self._socket, self._close)

    def _read_head(self) -> Head:
        received = b""
        while b"\r\n\r\n" not in received:
            piece = self._open().recv(_READ_SIZE)
            if not piece or len(received) > _HEAD_MAX:
                raise TransferFailed(f"{self.address} did not answer in HTTP")
            received += piece
        text, _, rest = received.partition(b"\r\n\r\n")
        self._rest = memoryview(rest)
        first, *lines = text.decode("latin-1").split("\r\n")
        version, _, status = first.partition(" ")
        code, _, reason = status.partition(" ")
        if not version.startswith("HTTP/1.") or len(code) != 3 or not (code.isascii() and code.isdigit()):
            raise TransferFailed(f"{self.address} did not answer in HTTP")
        headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        if "transfer-encoding" in headers:
            raise TransferFailed(f"{self.address} sends a transfer encoding, which xapi never does")
        return Head(int(code), reason[:200], headers)

    def _open(self) -> ssl.SSLSocket:
        assert self._socket is not None
        return self._socket

    def _close(self) -> None:
        if self._socket is not None:
            self._socket.close()

    @contextmanager
    def _translated(self, what: str) -> Iterator[None]:
        try:
            yield
        except OSError as exc:
            raise TransferFailed(unreachable(self.address, what, exc).message) from exc
        except PoolUnreachable as exc:
            raise TransferFailed(exc.message) from exc
