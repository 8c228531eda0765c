"""A command's end of a control socket."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING, Final, Self

from xbfs.control import place, wire
from xbfs_engine.core.errors import MountError

if TYPE_CHECKING:
    from pathlib import Path

ANSWER_S: Final = 180.0
"""Trying a key takes as long as whoever locked the volume chose: seconds, and a minute for a paranoid one."""


class Unreachable(MountError):
    """Nobody listens, or whoever did is gone."""


class Control:
    """A connection to the server that listens on ``path``; to be entered. What a request begins for its connection
    ends with it at the latest. One thread at a time.

    Entering raises Unreachable, MountError if the socket is somebody else's.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._connection.settimeout(ANSWER_S)

    def __enter__(self) -> Self:
        try:
            self._connection.connect(str(self._path))
            is_trusted = place.is_trusted(self._connection)
        except OSError as exc:
            self._connection.close()
            raise Unreachable(
                f"the server can not be reached at {self._path}: {exc.strerror or exc}",
                hint="run this as the user who started it; a mount by an older release has no such socket",
            ) from exc
        if not is_trusted:
            self._connection.close()
            raise MountError(f"{self._path} belongs to another user: nothing was sent")
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()

    def ask(self, request: wire.Request) -> object:
        """The answer to a request. Raises what the server answers, Unreachable, MountError."""
        packet = wire.encode_request(request)
        try:
            self._connection.sendall(packet)
            answer = self._connection.recv(wire.MESSAGE_MAX)
        except TimeoutError as exc:
            raise MountError(f"the server did not answer within {ANSWER_S:.0f} s") from exc
        except OSError as exc:
            raise Unreachable(f"the server at {self._path} went away: {exc.strerror or exc}") from exc
        if not answer:
            raise Unreachable("the server hung up")
        return wire.decode_answer(answer)


def unlock(path: Path, key: wire.Unlock) -> list[str]:
    """The names of the volumes that the mount opened with the key. Raises what the mount answers, MountError."""
    request = key.to_request()
    with Control(path) as control:
        answer = control.ask(request)
    if not isinstance(answer, list) or not all(isinstance(name, str) for name in answer):
        raise wire.not_understood()
    return answer
