"""A command's end of the control socket."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING, Final

from xbfs.control import place, wire
from xbfs_engine.core.errors import MountError

if TYPE_CHECKING:
    from pathlib import Path

ANSWER_S: Final = 180.0
"""Trying a key takes as long as whoever locked the volume chose: seconds, and a minute for a paranoid one."""


def unlock(path: Path, request: wire.Unlock) -> list[str]:
    """The names of the volumes that the mount opened with the key. Raises what the mount answers, MountError."""
    packet = wire.encode_request(request)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        connection.settimeout(ANSWER_S)
        try:
            connection.connect(str(path))
            if not place.is_trusted(connection):
                raise MountError(f"{path} belongs to another user: the key was not sent")
            connection.sendall(packet)
            answer = connection.recv(wire.MESSAGE_MAX)
        except TimeoutError as exc:
            raise MountError(f"the mount did not answer within {ANSWER_S:.0f} s") from exc
        except OSError as exc:
            raise MountError(
                f"the mount can not be reached at {path}: {exc.strerror or exc}",
                hint="run this as the user who mounted; a mount by an older release has no such socket",
            ) from exc
    if not answer:
        raise MountError("the mount hung up")
    return wire.decode_answer(answer)
