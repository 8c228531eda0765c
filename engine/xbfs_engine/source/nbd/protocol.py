"""Bytes of the NBD protocol, as far as reading needs them: fixed newstyle handshake and simple replies. Pure.

Numbers and layouts are those of the NBD protocol (NetworkBlockDevice/nbd, doc/proto.md). What is left out (GO, INFO,
structured replies, block status) a XenServer host does not offer (xapi-project/nbd). Whatever a server
sends that is not as it should be is TransferFailed.
"""

from __future__ import annotations

import struct
from typing import Final, NamedTuple

from xbfs_engine.core.errors import TransferFailed
from xbfs_engine.core.limits import DISK_SIZE_MAX, MIB

SECTOR: Final = 512
"""A host answers EINVAL unless offset and length are multiples of this."""

REQUEST_SIZE_MAX: Final = 4 * MIB
"""A host has no limit below 2 GiB, but it serves one request at a time; qemu and nbdkit allow 32 and 64 MiB."""

EXPORT_NAME_MAX: Final = 4096
"""The protocol's limit on strings."""

GREETING_SIZE: Final = 8 + 8 + 2
"""Two magics and the handshake flags."""

EXPORT_SIZE: Final = 8 + 2 + 124
"""Size, transmission flags, and zeros that are sent since we never set NBD_FLAG_C_NO_ZEROES (hosts do not know it)."""

OPTION_REPLY_SIZE: Final = 20
OPTION_TEXT_MAX: Final = 4096
"""Longest explanation of a refused option that is skipped; more is no explanation."""

REPLY_SIZE: Final = 16

OPTION_EXPORT_NAME: Final = 1
OPTION_STARTTLS: Final = 5
REPLY_ACK: Final = 1

_INIT_MAGIC: Final = b"NBDMAGIC"
_OPTION_MAGIC: Final = b"IHAVEOPT"
_FIXED_NEWSTYLE: Final = 1
_OPTION: Final = struct.Struct(">8sII")
_OPTION_REPLY: Final = struct.Struct(">QIII")
_OPTION_REPLY_MAGIC: Final = 0x3E889045565A9
_EXPORT: Final = struct.Struct(">QH")
_HAS_FLAGS: Final = 1
_REQUEST: Final = struct.Struct(">IHHQQI")
_REQUEST_MAGIC: Final = 0x25609513
_READ: Final = 0
_DISCONNECT: Final = 2
_REPLY: Final = struct.Struct(">IIQ")
_REPLY_MAGIC: Final = 0x67446698

assert _OPTION_REPLY.size == OPTION_REPLY_SIZE
assert _REPLY.size == REPLY_SIZE

CLIENT_FLAGS: Final = struct.pack(">I", _FIXED_NEWSTYLE)
"""What the client says after the greeting; a host that wants TLS hangs up without NBD_FLAG_C_FIXED_NEWSTYLE."""


class OptionReply(NamedTuple):
    """The server's answer to an option. ``text_bytes`` of explanation follow."""

    kind: int
    text_bytes: int


class Reply(NamedTuple):
    """The server's answer to a request; data follow if ``error`` (an errno) is 0."""

    error: int
    cookie: int


def check_greeting(data: bytes) -> None:
    """Check the first GREETING_SIZE bytes of a server. Raises TransferFailed."""
    if len(data) != GREETING_SIZE or not data.startswith(_INIT_MAGIC):
        raise TransferFailed("this is no NBD server", hint="check address and port")
    if data[8:16] != _OPTION_MAGIC or not data[17] & _FIXED_NEWSTYLE:
        raise TransferFailed("the NBD server does not speak the fixed newstyle handshake")


def option(number: int, data: bytes = b"") -> bytes:
    """Ask for an option."""
    assert len(data) <= EXPORT_NAME_MAX
    return _OPTION.pack(_OPTION_MAGIC, number, len(data)) + data


def option_reply(data: bytes, number: int) -> OptionReply:
    """Decode the answer to option ``number`` (OPTION_REPLY_SIZE bytes). Raises TransferFailed."""
    magic, answered, kind, length = _unpack(_OPTION_REPLY, data, "answer to an option")
    if magic != _OPTION_REPLY_MAGIC or answered != number:
        raise TransferFailed(f"the NBD server's answer to option {number} can not be decoded")
    if length > OPTION_TEXT_MAX:
        raise TransferFailed(f"the NBD server's answer to option {number} is {length} bytes long")
    return OptionReply(kind, length)


def export_size(data: bytes) -> int:
    """Size of the disk in bytes, from the answer to EXPORT_NAME (EXPORT_SIZE bytes). Raises TransferFailed."""
    size, flags = _unpack(_EXPORT, data[: _EXPORT.size], "answer to EXPORT_NAME")
    if not flags & _HAS_FLAGS or size > DISK_SIZE_MAX:
        raise TransferFailed(f"the NBD server offers a disk of {size} bytes with flags {flags:#x}")
    return int(size)


def read_request(cookie: int, offset: int, length: int) -> bytes:
    """Ask for ``length`` bytes. No command flags: a host takes any for an unknown command."""
    assert 0 < length <= REQUEST_SIZE_MAX
    return _REQUEST.pack(_REQUEST_MAGIC, 0, _READ, cookie, offset, length)


def disconnect_request() -> bytes:
    """Say good-bye; the server answers nothing."""
    return _REQUEST.pack(_REQUEST_MAGIC, 0, _DISCONNECT, 0, 0, 0)


def reply(data: bytes | bytearray | memoryview) -> Reply:
    """Decode the head of a reply (REPLY_SIZE bytes). Raises TransferFailed."""
    magic, error, cookie = _unpack(_REPLY, data, "reply")
    if magic != _REPLY_MAGIC:
        raise TransferFailed("the NBD server's reply can not be decoded: the stream is out of step")
    return Reply(error, cookie)


def _unpack(layout: struct.Struct, data: bytes | bytearray | memoryview, what: str) -> tuple[int, ...]:
    if len(data) != layout.size:
        raise TransferFailed(f"the NBD server's {what} has {len(data)} bytes instead of {layout.size}")
    return layout.unpack(data)
