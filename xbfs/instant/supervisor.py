"""A server that is started anew whenever it ends: forked from a process that holds the opened repository.

So a server that died is there again within a second, and nobody is asked for a passphrase. The supervising process
has no threads, no event loop, and nothing to crash over. If it is killed, the kernel tells the server to end.
"""

from __future__ import annotations

import json
import os
import signal
from typing import TYPE_CHECKING, Final, NoReturn

from xbfs_engine.core import errors
from xbfs_engine.core.errors import LiveServerDown, XbfsError
from xbfs_engine.core.log import Logger
from xbfs_engine.guestfs.worker.kernel import prctl

if TYPE_CHECKING:
    from collections.abc import Callable

    from xbfs_engine.core.runtime import Clock

    Serve = Callable[[Callable[[], None]], bool]
    """Serves until told to stop; calls its argument once it does. Returns whether nobody needs a server any more."""

_PR_SET_PDEATHSIG: Final = 1
"""Linux uapi/linux/prctl.h."""
_SIGNALS: Final = frozenset({signal.SIGTERM, signal.SIGINT, signal.SIGCHLD})
_POLL_S: Final = 0.02
STOP_S: Final = 30.0
"""What a server gets to flush and close everything before SIGKILL."""
_BACKOFF_S: Final = (0.0, 0.2, 1.0, 2.0, 5.0)
"""Waits before further starts while servers keep ending soon; the last one for ever."""
_STEADY_S: Final = 30.0
_MESSAGE_MAX: Final = 64 << 10
_NOT_NEEDED: Final = 0
"""The exit status of a server that need not be started anew; nothing else ends with it."""

_log = Logger("xbfs.instant")


def supervise(serve: Serve, *, after_death: Callable[[], None], ready: Callable[[], None], clock: Clock) -> None:
    """Have ``serve`` run in a process of its own until SIGTERM or SIGINT comes, or it says that nobody needs it;
    ``ready`` is called when it serves.

    ``after_death`` takes away what a dead server leaves. Raises what the first server ended with before it served,
    LiveServerDown if it did not say. Later ones are started anew for ever.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        _Supervisor(serve, after_death, ready, clock).run()
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)


class _Supervisor:
    """The loop of ``supervise``."""

    def __init__(self, serve: Serve, after_death: Callable[[], None], ready: Callable[[], None], clock: Clock) -> None:
        self._serve = serve
        self._after_death = after_death
        self._ready = ready
        self._clock = clock
        self._is_ready = False
        self._stop_s: float | None = None

    def run(self) -> None:
        fails = 0
        while True:
            began_s = self._clock.monotonic_s()
            status, said = self._one()
            self._after_death()
            if self._stop_s is not None:
                return
            if not self._is_ready:
                raise _problem(said, status)
            if os.waitstatus_to_exitcode(status) == _NOT_NEEDED:
                return
            _log.warning("the live server ended and is started anew", status=status)
            fails = 0 if self._clock.monotonic_s() - began_s >= _STEADY_S else fails + 1
            pause_s = _BACKOFF_S[min(max(fails - 1, 0), len(_BACKOFF_S) - 1)]
            if pause_s and self._heard(pause_s):
                return

    def _one(self) -> tuple[int, bytes]:
        """One server's life; its wait status and what it said."""
        reader, writer = os.pipe()
        supervisor = os.getpid()
        pid = os.fork()
        if pid == 0:
            os.close(reader)
            _become_server(self._serve, writer, supervisor)
        os.close(writer)
        os.set_blocking(reader, False)
        said: bytes = b""
        try:
            while True:
                ended, status = os.waitpid(pid, os.WNOHANG)
                said = said or _read(reader)
                if said and not self._is_ready and not said.startswith(b"{"):
                    self._is_ready = True
                    self._ready()
                if ended:
                    return status, said
                if self._heard(1.0 if said else _POLL_S):
                    os.kill(pid, signal.SIGTERM)
                if self._stop_s is not None and self._clock.monotonic_s() - self._stop_s > STOP_S:
                    os.kill(pid, signal.SIGKILL)
        finally:
            os.close(reader)

    def _heard(self, wait_s: float) -> bool:
        """Whether somebody told us to stop within that time; also ends when a child does."""
        info = signal.sigtimedwait(_SIGNALS, wait_s)
        if info is None or info.si_signo == signal.SIGCHLD:
            return False
        self._stop_s = self._clock.monotonic_s() if self._stop_s is None else self._stop_s
        return True


def _become_server(serve: Serve, writer: int, supervisor: int) -> NoReturn:
    status = 1
    try:
        prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
        if os.getppid() != supervisor:
            os._exit(status)
        if serve(lambda: _say(writer, b"ready")):
            status = _NOT_NEEDED
    except XbfsError as exc:
        status = exc.exit_code
        _log.error("the live server ended", error=type(exc).__name__, problem=str(exc))
        _say(writer, json.dumps({"error": type(exc).__name__, "message": exc.message, "hint": exc.hint}).encode())
    except KeyboardInterrupt:
        pass
    except BaseException as exc:  # noqa: BLE001 - the end of a process of its own
        _log.error("the live server failed for a reason of our own", exc_info=exc)
        _say(writer, json.dumps({"error": "", "message": f"the live server failed: {exc!r}", "hint": ""}).encode())
    finally:
        os._exit(status)


def _say(writer: int, what: bytes) -> None:
    os.write(writer, what[:_MESSAGE_MAX])


def _read(reader: int) -> bytes:
    try:
        return os.read(reader, _MESSAGE_MAX)
    except BlockingIOError:
        return b""


def _problem(said: bytes, status: int) -> XbfsError:
    try:
        record = json.loads(said)
    except ValueError:
        return LiveServerDown(f"the live server ended with wait status {status} before it served")
    kind = getattr(errors, record["error"], LiveServerDown)
    problem: XbfsError = kind(record["message"], hint=record["hint"])
    return problem
