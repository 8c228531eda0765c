"""Requests and answers of the control socket: msgpack maps, one in a packet, both ends on this machine. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

import msgpack

from xbfs_engine.core import errors
from xbfs_engine.core.errors import MountError, XbfsError

MESSAGE_MAX: Final = 64 << 10
"""A key file of LUKS has at most 8 MiB by its own rules, and 64 bytes in practice: longer ones are refused."""
SECRET_MAX: Final = 32 << 10


@dataclass(frozen=True, slots=True)
class Unlock:
    """Try a key on the locked volumes of a restore point, and keep it in memory for its VM if it opens one.

    ``volume`` is a name or uuid, or empty for all that are locked.
    """

    point: str
    volume: str
    secret: bytes = field(repr=False)


def encode_request(request: Unlock) -> bytes:
    """The packet of a request. Raises MountError if the secret is too long."""
    if len(request.secret) > SECRET_MAX:
        raise MountError(f"a key of {len(request.secret)} bytes is longer than {SECRET_MAX}")
    packed: bytes = msgpack.packb([request.point, request.volume, request.secret])
    return packed


def decode_request(packet: bytes) -> Unlock:
    """Raises MountError."""
    match _unpacked(packet):
        case [str() as point, str() as volume, bytes() as secret] if len(secret) <= SECRET_MAX:
            return Unlock(point, volume, secret)
        case _:
            raise MountError("the request on the control socket is not understood", hint=_SAME_RELEASE)


def encode_answer(opened: list[str] | XbfsError) -> bytes:
    """The packet that names the volumes that were opened, or says what went wrong."""
    if isinstance(opened, XbfsError):
        record: list[object] = [type(opened).__name__, opened.message, opened.hint]
    else:
        record = [opened]
    packed: bytes = msgpack.packb(record)
    return packed


def decode_answer(packet: bytes) -> list[str]:
    """Raises the error that the answer carries, MountError if it is none."""
    match _unpacked(packet):
        case [list() as opened] if all(isinstance(name, str) for name in opened):
            return opened
        case [str() as name, str() as message, str() as hint]:
            kind = getattr(errors, name, None)
            known = kind if isinstance(kind, type) and issubclass(kind, XbfsError) else MountError
            raise known(message, hint=hint)
        case _:
            raise MountError("the mount's answer is not understood", hint=_SAME_RELEASE)


_SAME_RELEASE: Final = "command and mount must be of the same release: mount again"


def _unpacked(packet: bytes) -> object:
    try:
        found: object = msgpack.unpackb(packet)
    except (ValueError, TypeError, RecursionError, msgpack.UnpackException) as exc:
        raise MountError("the control socket carries something else", hint=_SAME_RELEASE) from exc
    return found
