"""The mount's end of the control socket. One request at a time, in the event loop of the mount."""

from __future__ import annotations

import os
from contextlib import suppress
from typing import TYPE_CHECKING, Final

import trio

from xbfs.control import place, wire
from xbfs_engine.core.errors import MountError, XbfsError
from xbfs_engine.core.log import Logger

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

REQUEST_S: Final = 5.0
"""What a command gets to send its request once it is connected."""
_BACKLOG: Final = 4

_log = Logger("xbfs.mount")


class ControlServer:
    """Listens on ``path`` from construction on; ``unlock`` answers with the names of the volumes it opened."""

    def __init__(self, path: Path, unlock: Callable[[wire.Unlock], Awaitable[list[str]]]) -> None:
        self.path = path
        self._unlock = unlock
        self._listener = trio.socket.socket(trio.socket.AF_UNIX, trio.socket.SOCK_SEQPACKET)
        self._bound = False

    async def listen(self) -> None:
        """Begin to listen. Raises MountError."""
        with suppress(FileNotFoundError):
            self.path.unlink()
        mask = os.umask(0o177)
        try:
            await self._listener.bind(str(self.path))
        except OSError as exc:
            raise MountError(f"no control socket at {self.path}: {exc.strerror or exc}") from exc
        finally:
            os.umask(mask)
        self._listener.listen(_BACKLOG)
        self._bound = True

    async def serve(self) -> None:
        """Answer requests for ever."""
        while True:
            connection, _ = await self._listener.accept()
            with connection:
                try:
                    await self._answer(connection)
                except OSError as exc:
                    _log.warning("a command on the control socket went away", problem=str(exc))

    def close(self) -> None:
        """Let go of the socket."""
        self._listener.close()
        if self._bound:
            with suppress(OSError):
                self.path.unlink()

    async def _answer(self, connection: trio.socket.SocketType) -> None:
        answer: list[str] | XbfsError
        try:
            answer = await self._unlock(await _request(connection))
        except XbfsError as exc:
            answer = exc
        except trio.TooSlowError:
            return
        except Exception as exc:  # noqa: BLE001 - a bug there must not end the mount
            _log.error("a request on the control socket failed for a reason of our own", exc_info=exc)
            answer = MountError(f"the mount failed over this request: {type(exc).__name__}")
        await connection.send(wire.encode_answer(answer))


async def _request(connection: trio.socket.SocketType) -> wire.Unlock:
    if not place.is_trusted(connection):
        raise MountError("the control socket answers to its owner and to root only")
    with trio.fail_after(REQUEST_S):
        return wire.decode_request(await connection.recv(wire.MESSAGE_MAX))
