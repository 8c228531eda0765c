"""Ending a blocking use of a socket from another thread, so that neither the thread nor the descriptor is left.

A descriptor must not be closed while another thread waits in it: its number could be taken by a new file meanwhile.
So whoever aborts only shuts the connection down, and the thread that used it closes it.
"""

from __future__ import annotations

import socket
import threading
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from xbfs_engine.core.errors import PoolUnreachable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


class Abortable:
    """Who uses a socket, and whether it was given up. One thread uses it at a time; any may abort."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._busy = False
        self._aborted = False

    @contextmanager
    def using(self, close: Callable[[], None]) -> Iterator[None]:
        """A use of the socket; ``close`` is called at its end if it was aborted. Raises PoolUnreachable if it is."""
        with self._lock:
            self._raise_if_aborted()
            assert not self._busy
            self._busy = True
        try:
            yield
        finally:
            with self._lock:
                self._busy = False
                if self._aborted:
                    close()

    def check(self) -> None:
        """Raise PoolUnreachable if it was aborted: between connecting and sending the first byte."""
        with self._lock:
            self._raise_if_aborted()

    def abort(self, sock: socket.socket | None, close: Callable[[], None]) -> None:
        """Let the use of ``sock`` fail now, or close it if nobody uses it. May be called again."""
        with self._lock:
            self._aborted = True
            if not self._busy:
                close()
            elif sock is not None:
                with suppress(OSError):
                    # Not SSLSocket's: it would take the TLS state away from under the other thread.
                    socket.socket.shutdown(sock, socket.SHUT_RDWR)

    def _raise_if_aborted(self) -> None:
        if self._aborted:
            raise PoolUnreachable("the connection was given up on our side", hint="")
