"""The server's end of a control socket: each connection asks one thing after the other, in the server's event loop."""

from __future__ import annotations

import os
from contextlib import AsyncExitStack, suppress
from typing import TYPE_CHECKING, Final

import trio

from xbfs.control import place, wire
from xbfs_engine.core.errors import MountError, XbfsError
from xbfs_engine.core.log import Logger

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping
    from pathlib import Path

    Handler = Callable[[Mapping[str, object], AsyncExitStack], Awaitable[object]]
    """Answers the arguments of a verb with plain values. What it puts on the stack is undone, shielded from
    cancellation, when the client hangs up, dies, or the server ends."""

REQUEST_S: Final = 5.0
"""What a command gets to send its first request once it is connected."""
CONNECTIONS_MAX: Final = 32
LOOK_S: Final = 5.0
"""How often a server that nobody asks looks whether it can be found: who logs out takes XDG_RUNTIME_DIR along."""
_BACKLOG: Final = 4

_log = Logger("xbfs.control")


class ControlServer:
    """Listens on ``path`` once told to; ``handlers`` by verb answer."""

    def __init__(self, path: Path, handlers: Mapping[str, Handler]) -> None:
        self.path = path
        self._handlers = handlers
        self._listener = _socket()
        self._bound: int | None = None

    async def listen(self) -> None:
        """Begin to listen. Raises MountError."""
        with suppress(OSError):
            self.path.unlink()
        mask = os.umask(0o177)
        try:
            await self._listener.bind(str(self.path))
        except OSError as exc:
            raise MountError(f"no control socket at {self.path}: {exc.strerror or exc}") from exc
        finally:
            os.umask(mask)
        self._listener.listen(_BACKLOG)
        self._bound = self._found()

    async def serve(self) -> None:
        """Answer requests for ever."""
        places = trio.Semaphore(CONNECTIONS_MAX)
        async with trio.open_nursery() as nursery:

            async def converse(connection: trio.socket.SocketType) -> None:
                try:
                    with connection:
                        await self._converse(connection)
                except OSError as exc:
                    _log.warning("a command on the control socket went away", problem=str(exc))
                finally:
                    places.release()

            while True:
                await places.acquire()
                nursery.start_soon(converse, await self._accepted())

    def close(self) -> None:
        """Let go of the socket."""
        self._listener.close()
        if self._bound is not None and self._bound == self._found():
            with suppress(OSError):
                self.path.unlink()

    async def _accepted(self) -> trio.socket.SocketType:
        """The next connection. Listens anew if the socket is gone, as soon as that can be."""
        while True:
            with trio.move_on_after(LOOK_S):
                connection, _ = await self._listener.accept()
                return connection
            if self._found() is None:
                self._listener.close()
                self._listener = _socket()
                with suppress(OSError):
                    self.path.parent.mkdir(0o700)
                try:
                    await self.listen()
                except MountError as exc:
                    _log.info("commands do not find this server", problem=exc.message)

    def _found(self) -> int | None:
        """The inode of what is at the socket's path."""
        try:
            return self.path.lstat().st_ino
        except OSError:
            return None

    async def _converse(self, connection: trio.socket.SocketType) -> None:
        if not place.is_trusted(connection):
            await connection.send(
                wire.encode_answer(MountError("the control socket answers to its owner and to root only"))
            )
            return
        undone = AsyncExitStack()
        try:
            limit_s = REQUEST_S
            while True:
                with trio.move_on_after(limit_s) as waiting:
                    packet = await connection.recv(wire.MESSAGE_MAX)
                if waiting.cancelled_caught or not packet:
                    return
                await connection.send(wire.encode_answer(await self._answer(packet, undone)))
                limit_s = float("inf")
        finally:
            with trio.CancelScope(shield=True):
                await undone.aclose()

    async def _answer(self, packet: bytes, undone: AsyncExitStack) -> object:
        try:
            request = wire.decode_request(packet)
            handler = self._handlers.get(request.verb)
            return wire.not_understood() if handler is None else await handler(request.arguments, undone)
        except XbfsError as exc:
            return exc
        except Exception as exc:  # noqa: BLE001 - a bug there must not end the server
            _log.error("a request on the control socket failed for a reason of our own", exc_info=exc)
            return MountError(f"the server failed over this request: {type(exc).__name__}")


def _socket() -> trio.socket.SocketType:
    return trio.socket.socket(trio.socket.AF_UNIX, trio.socket.SOCK_SEQPACKET)
