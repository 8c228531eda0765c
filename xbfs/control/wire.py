"""Requests and answers of control sockets: msgpack, one in a packet, both ends on this machine. Pure.

A request is ``[verb, {name: value}]``; an answer is ``[value]``, or ``[class, message, hint]`` of an error.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, NamedTuple

import msgpack

from xbfs_engine.core import errors
from xbfs_engine.core.errors import MountError, XbfsError

if TYPE_CHECKING:
    from collections.abc import Mapping

MESSAGE_MAX: Final = 64 << 10
"""A key file of LUKS has at most 8 MiB by its own rules, and 64 bytes in practice: longer ones are refused."""
SECRET_MAX: Final = 32 << 10
UNLOCK: Final = "unlock"
_SAME_RELEASE: Final = "command and server must be of the same release: start the server again"


class Request(NamedTuple):
    """What is asked."""

    verb: str
    arguments: Mapping[str, object]


@dataclass(frozen=True, slots=True)
class Unlock:
    """Try a key on the locked volumes of a restore point, and keep it in memory for its VM if it opens one.

    ``volume`` is a name or uuid, or empty for all that are locked.
    """

    point: str
    volume: str
    secret: bytes = field(repr=False)

    def to_request(self) -> Request:
        """Raises MountError if the secret is too long."""
        if len(self.secret) > SECRET_MAX:
            raise MountError(f"a key of {len(self.secret)} bytes is longer than {SECRET_MAX}")
        return Request(UNLOCK, {"point": self.point, "volume": self.volume, "secret": self.secret})


def unlock_of(arguments: Mapping[str, object]) -> Unlock:
    """What ``to_request`` was made of. Raises MountError."""
    match arguments:
        case {"point": str() as point, "volume": str() as volume, "secret": bytes() as secret} if (
            len(secret) <= SECRET_MAX
        ):
            return Unlock(point, volume, secret)
        case _:
            raise not_understood()


def encode_request(request: Request) -> bytes:
    """The packet of a request. Raises MountError if it is too long."""
    packed: bytes = msgpack.packb([request.verb, dict(request.arguments)])
    if len(packed) > MESSAGE_MAX:
        raise MountError(f"a request of {len(packed)} bytes is longer than {MESSAGE_MAX}")
    return packed


def decode_request(packet: bytes) -> Request:
    """Raises MountError."""
    match _unpacked(packet):
        case [str() as verb, dict() as arguments] if all(isinstance(name, str) for name in arguments):
            return Request(verb, arguments)
        case _:
            raise not_understood()


def encode_answer(answer: object) -> bytes:
    """The packet of plain values (lists, maps with text keys, text, bytes, numbers, None), or of an XbfsError."""
    record = [type(answer).__name__, answer.message, answer.hint] if isinstance(answer, XbfsError) else [answer]
    packed: bytes = msgpack.packb(record)
    return packed if len(packed) <= MESSAGE_MAX else encode_answer(MountError("the answer is too long to be sent"))


def decode_answer(packet: bytes) -> object:
    """Raises the error that the answer carries, MountError if it is none."""
    match _unpacked(packet):
        case [answer]:
            return answer
        case [str() as name, str() as message, str() as hint]:
            kind = getattr(errors, name, None)
            known = kind if isinstance(kind, type) and issubclass(kind, XbfsError) else MountError
            raise known(message, hint=hint)
        case _:
            raise MountError("the server's answer is not understood", hint=_SAME_RELEASE)


def not_understood() -> MountError:
    """For what a request of another release may hold."""
    return MountError("the request on the control socket is not understood", hint=_SAME_RELEASE)


def _unpacked(packet: bytes) -> object:
    try:
        found: object = msgpack.unpackb(packet)
    except (ValueError, TypeError, RecursionError, msgpack.UnpackException) as exc:
        raise MountError("the control socket carries something else", hint=_SAME_RELEASE) from exc
    return found
