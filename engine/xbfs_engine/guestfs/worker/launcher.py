"""Starts workers: the caller's side of the zygote. Any thread may call; one order at a time goes out."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol

from xbfs_engine.core.errors import GuestReaderFailed
from xbfs_engine.guestfs.worker.forms import END, FORK, ORDER_BYTES_MAX, READY

if TYPE_CHECKING:
    from collections.abc import Callable

_START: Final = """\
import sys
sys.path[:] = sys.argv[3:]
from xbfs_engine.guestfs.worker.zygote import main
main(int(sys.argv[1]), int(sys.argv[2]))
"""
_KEPT: Final = ("LD_LIBRARY_PATH",)
"""Of the environment, which may hold passphrases, only what the interpreter needs to start."""

_SETTINGS: Final = {"LC_ALL": "C.UTF-8", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
"""A process with threads can not be forked, and workers may have none."""


class Launched(NamedTuple):
    """A worker that was started."""

    control: socket.socket
    blocks: socket.socket
    end: Callable[[], int | None]
    """Kills it and gives its wait status, None if that is not to be had. To be called once."""


class Launcher(Protocol):
    """Starts workers."""

    def launch(self) -> Launched:
        """A new worker. GuestReaderFailed if none can be started."""
        ...

    def close(self) -> None:
        """End all of them."""
        ...


class ZygoteLauncher:
    """A Launcher that starts a zygote at the first need, and again when it has died."""

    def __init__(self, start_s: float) -> None:
        self._start_s = start_s
        self._lock = Lock()
        self._zygote: _Zygote | None = None
        self._is_closed = False

    def launch(self) -> Launched:
        """A new worker, forked by the zygote."""
        with self._lock:
            for _ in range(2):
                if self._is_closed:
                    raise GuestReaderFailed("readers of guests were closed")
                try:
                    zygote = self._zygote = self._zygote or _Zygote(self._start_s)
                    return self._fork(zygote)
                except OSError as error:
                    failed = error
                    self._drop()
        raise GuestReaderFailed(f"no process to read the guest's disks can be started: {failed}") from failed

    def close(self) -> None:
        """End the zygote, and every worker with it."""
        with self._lock:
            self._is_closed = True
            self._drop()

    def _drop(self) -> None:
        if self._zygote is not None:
            self._zygote.close()
            self._zygote = None

    def _fork(self, zygote: _Zygote) -> Launched:
        control, its_control = socket.socketpair()
        blocks, its_blocks = socket.socketpair()
        try:
            with its_control, its_blocks:
                number, pidfd = zygote.fork(its_control, its_blocks)
        except BaseException:
            control.close()
            blocks.close()
            raise
        return Launched(control, blocks, lambda: self._end(zygote, number, pidfd))

    def _end(self, zygote: _Zygote, number: int, pidfd: int) -> int | None:
        """Kill first, whatever the zygote does; then learn how the worker ended."""
        try:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        finally:
            os.close(pidfd)
        with self._lock:
            if zygote is not self._zygote:
                return None
            try:
                return zygote.end(number)
            except OSError:
                self._drop()
                return None


class _Zygote:
    """A running zygote. Every method raises OSError if it does not answer."""

    def __init__(self, start_s: float) -> None:
        self._orders, its_orders = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._orders.settimeout(start_s)
        with its_orders:
            descriptor = its_orders.fileno()
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-c", _START, str(descriptor), str(os.getpid()), *_search_path()],
                pass_fds=[descriptor],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                cwd="/",
                env=_SETTINGS | {name: os.environ[name] for name in _KEPT if name in os.environ},
                # Ctrl+C is for the caller.
                start_new_session=True,
            )
        assert self._process.stderr is not None
        with self._process.stderr as said:
            try:
                answer = self._orders.recv(ORDER_BYTES_MAX)
            except OSError:
                answer = b""
            if answer != READY:
                self.close()
                last = said.read().decode(errors="replace").strip().rpartition("\n")[2]
                raise GuestReaderFailed(f"the process that starts readers of guests does not start: {last}")

    def fork(self, control: socket.socket, blocks: socket.socket) -> tuple[int, int]:
        """A new worker's number and pidfd."""
        socket.send_fds(self._orders, [FORK], [control.fileno(), blocks.fileno()])
        answer, descriptors, _, _ = socket.recv_fds(self._orders, ORDER_BYTES_MAX, 1)
        if not descriptors:
            raise ConnectionResetError("the process that starts readers ended")
        return int(answer), descriptors[0]

    def end(self, number: int) -> int:
        """Reap a worker, for its wait status."""
        self._orders.send(END + b"%d" % number)
        answer = self._orders.recv(ORDER_BYTES_MAX)
        if not answer:
            raise ConnectionResetError("the process that starts readers ended")
        return int(answer)

    def close(self) -> None:
        """End it; workers are killed by the kernel when it is gone."""
        self._orders.close()
        self._process.kill()
        self._process.wait()


def _search_path() -> list[str]:
    """Where this process finds modules: its zygote must find the very same ones."""
    return [folder for folder in sys.path if Path(folder).is_absolute()]
