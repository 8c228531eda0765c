"""The least NBD client that reads: fixed newstyle handshake, one request at a time (NBD protocol, doc/proto.md)."""

from __future__ import annotations

import socket
import struct
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from pathlib import Path
    from types import TracebackType

_GREETING = b"NBDMAGICIHAVEOPT"
_NO_ZEROES = 3
"""NBD_FLAG_C_FIXED_NEWSTYLE and NBD_FLAG_C_NO_ZEROES."""
_EXPORT_NAME = struct.Struct(">I8sII")
_REQUEST = struct.Struct(">IHHQQI")
_REPLY = struct.Struct(">IIQ")
_REQUEST_MAGIC, _REPLY_MAGIC = 0x25609513, 0x67446698
_READ, _DISCONNECT = 0, 2


class NbdReader:
    """The default export of a server on a Unix socket."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(str(path))
        assert self._take(18)[:16] == _GREETING
        self._socket.sendall(_EXPORT_NAME.pack(_NO_ZEROES, b"IHAVEOPT", 1, 0))
        self._take(10)

    def pread(self, size: int, offset: int) -> bytes:
        """Exactly ``size`` bytes at ``offset``."""
        self._socket.sendall(_REQUEST.pack(_REQUEST_MAGIC, 0, _READ, 1, offset, size))
        magic, error, _ = _REPLY.unpack(self._take(_REPLY.size))
        assert magic == _REPLY_MAGIC
        assert not error
        return self._take(size)

    def _take(self, size: int) -> bytes:
        data = bytearray(size)
        view = memoryview(data)
        while view:
            count = self._socket.recv_into(view)
            assert count, "the server hung up"
            view = view[count:]
        return bytes(data)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._socket.sendall(_REQUEST.pack(_REQUEST_MAGIC, 0, _DISCONNECT, 1, 0, 0))
        self._socket.close()
