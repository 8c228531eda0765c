"""One thread that writes while another one reads: what is to be written waits in a bounded queue, in its order.

The reading thread makes a Feed, gives it work and closes it. A failure of one file is told to `Account` and the rest
goes on; what ends everything is raised in the reading thread at its next call.
"""

from __future__ import annotations

import threading
from collections import deque
from typing import TYPE_CHECKING, Final

from xbfs_engine.core.errors import XbfsError

if TYPE_CHECKING:
    from collections.abc import Callable

    from xbfs_engine.restore.files.records import Account

WAITING_BYTES_MAX: Final = 16 << 20
"""What waits to be written, and so the memory it needs."""
WORK_BYTES: Final = 4096
"""What one piece of work counts for beside its content."""
ENDING_S: Final = 10.0
"""How long a write may hang before it is left alone."""
_AWAKE: Final = 32
"""Pieces of work for which a writer that sleeps is woken: few wakings, and it is never far behind."""

Work = tuple[bytes, "Callable[[], None]", int]
"""Path in the guest, for messages; what to do; bytes."""


class Feed:
    """A queue with its writer. ``fatal``: errors after which nothing is written any more."""

    def __init__(self, account: Account, fatal: tuple[type[XbfsError], ...]) -> None:
        self._account = account
        self._fatal = fatal
        self._lock = threading.Lock()
        self._filled = threading.Condition(self._lock)
        self._emptied = threading.Condition(self._lock)
        self._waiting: deque[Work] = deque()
        self._waiting_bytes = 0
        self._busy = False
        self._closed = False
        self._problem: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="restore-files", daemon=True)
        self._thread.start()

    def put(self, path: bytes, do: Callable[[], None], size_bytes: int = 0) -> None:
        """Let ``do`` be called after all that was put before. Waits while there is too much. Raises what ended it."""
        size_bytes += WORK_BYTES
        with self._lock:
            while self._waiting_bytes > WAITING_BYTES_MAX and self._problem is None:
                self._filled.notify()
                self._emptied.wait()
            self._raise()
            self._waiting.append((path, do, size_bytes))
            self._waiting_bytes += size_bytes
            if len(self._waiting) % _AWAKE == 0 or size_bytes > _AWAKE * WORK_BYTES:
                self._filled.notify()

    def drain(self) -> None:
        """Wait until all that was put is done. Raises what ended it."""
        with self._lock:
            self._filled.notify()
            while (self._waiting or self._busy) and self._problem is None:
                self._emptied.wait()
            self._raise()

    def close(self) -> bool:
        """End the thread when it is done with what it does; what waits is dropped. Never raises.

        False if it hangs in a write: then it may still use what it writes to, and the process should end.
        """
        with self._lock:
            self._closed = True
            self._waiting.clear()
            self._filled.notify()
        self._thread.join(ENDING_S)
        return not self._thread.is_alive()

    def _raise(self) -> None:
        if self._problem is not None:
            raise self._problem

    def _run(self) -> None:
        while True:
            with self._lock:
                self._busy = False
                while not self._waiting and not self._closed:
                    self._emptied.notify()
                    self._filled.wait()
                if self._closed:
                    return
                work, self._waiting = self._waiting, deque()
                self._busy = True
            if not self._do(work):
                return

    def _do(self, batch: deque[Work]) -> bool:
        while batch and not self._closed:
            path, do, size_bytes = batch.popleft()
            try:
                do()
            except self._fatal as exc:
                return self._end(exc)
            except XbfsError as exc:
                self._account.fail(path, exc)
            except BaseException as exc:  # noqa: BLE001 - raised in the reading thread
                return self._end(exc)
            with self._lock:
                self._waiting_bytes -= size_bytes
                self._emptied.notify()
        return True

    def _end(self, problem: BaseException) -> bool:
        with self._lock:
            self._problem = problem
            self._emptied.notify()
        return False
