"""Messages between a worker and whoever started it: MessagePack behind a length, over a stream socket.

Owns how messages are cut and coded, not what they say. Both ends may be hostile to the other as far as this goes:
lengths are bounded before anything is allocated, and any bytes give a value or ``BadMessage``. Stateless.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final

import msgpack

from xbfs_engine.guestfs.worker.limits import FRAME_BYTES_MAX

if TYPE_CHECKING:
    import socket

_LENGTH: Final = struct.Struct("<I")
HEADER_BYTES: Final = _LENGTH.size

_VALUES_MAX: Final = 1 << 16
"""Longest list: rows of volumes (scan: 4096), entries of a page (guest.PAGE_ENTRIES_MAX) and more."""


class BadMessage(Exception):
    """What came is no message, or none that is allowed. Never leaves this package."""


class Closed(Exception):
    """The other end is gone. Never leaves this package."""


def pack(value: object) -> bytes:
    """A message as it goes over the socket. TypeError, ValueError, OverflowError for what has no coding."""
    body = msgpack.packb(value, use_bin_type=True)
    assert isinstance(body, bytes)
    if len(body) > FRAME_BYTES_MAX:
        raise ValueError(f"a message of {len(body)} bytes")
    return _LENGTH.pack(len(body)) + body


def body_bytes(header: bytes | bytearray) -> int:
    """How long the body after a header is; BadMessage if it is too long."""
    (length,) = _LENGTH.unpack(header)
    if length > FRAME_BYTES_MAX:
        raise BadMessage(f"a message of {length} bytes")
    return int(length)


def unpack(body: bytes | bytearray) -> object:
    """The value of a body: None, bool, int, bytes, str and tuples of them. Raises BadMessage."""
    try:
        value: object = msgpack.unpackb(
            body,
            raw=False,
            use_list=False,
            max_array_len=min(len(body), _VALUES_MAX),
            max_str_len=len(body),
            max_bin_len=len(body),
            max_map_len=0,
            max_ext_len=0,
        )
    except (ValueError, TypeError, msgpack.UnpackException, RecursionError) as error:
        raise BadMessage(f"not MessagePack: {type(error).__name__}") from error
    return value


def receive_exactly(connection: socket.socket, length: int) -> bytearray:
    """So many bytes of a blocking socket; Closed if it ends before."""
    data = bytearray(length)
    view = memoryview(data)
    while view:
        count = connection.recv_into(view)
        if not count:
            raise Closed
        view = view[count:]
    return data


def receive(connection: socket.socket) -> object:
    """The next message of a blocking socket. Raises Closed, BadMessage."""
    return unpack(receive_exactly(connection, body_bytes(receive_exactly(connection, HEADER_BYTES))))
