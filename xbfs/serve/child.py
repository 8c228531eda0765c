"""A program that runs as our child: started, waited for until it serves, started anew when it ends.

Owns the process of one program and its log file; knows nothing of what it serves. Nobody else starts or ends that
process. Event-loop thread only: the kernel ends a child with the *thread* that made it, so no helper thread may.
"""

from __future__ import annotations

import errno
import os
import signal
import socket
import subprocess
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from shutil import which
from typing import TYPE_CHECKING, Final

import trio

from xbfs_engine.core.errors import ExportFailed
from xbfs_engine.core.log import Logger

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

START_DEADLINE_S: Final = 15.0
"""In which a program serves: a client of NFS waits 20 s (nfs-timeout of an SR) for all of a restart."""
STATE_HINT: Final = "see to room and rights where sessions are kept (XBFS_STATE)"
_POLL_S: Final = 0.05
_WATCH_S: Final = 1.0
_STOP_S: Final = 3.0
"""What a program gets to end by SIGTERM before SIGKILL."""
_BACKOFF_S: Final = (0.1, 0.5, 1.0, 2.0, 5.0)
"""Waits before further starts while a program keeps ending; the last one for ever."""
_STEADY_S: Final = 30.0
"""A program that served that long starts over with the shortest wait."""
_LOG_LIMIT_BYTES: Final = 4 << 20
_TAIL_BYTES: Final = 2000
_TAIL_LINES: Final = 8
_TOLD_LINES: Final = 3
_KILLED: Final = "trap 'kill -KILL $!; wait' TERM; \"$@\" & wait $!"
"""A shell between, which the kernel tells that we died: programs may ask it to tell them otherwise than we wish."""
_PATH: Final = "/usr/sbin:/usr/bin:/sbin:/bin"

_log = Logger("xbfs.serve")


@dataclass(frozen=True, slots=True)
class Program:
    """What is run. ``arguments``, asked for at each start; without secrets, they are in files.
    ``package``: Debian's, told if it is missing.
    ``directory``: what it serves; the program is started anew if another file system is mounted there.
    ``hint`` of the last lines of its log: what to do about them, "" if nothing is known.
    ``settings``: a file that it reads again at SIGHUP, which it gets when the file is replaced.
    ``is_killed``: when it is to end, or we do: at SIGTERM it tells its clients errors, which they take for the disk's.
    """

    name: str
    arguments: Callable[[], tuple[str, ...]]
    package: str
    directory: Path
    log: Path
    hint: Callable[[str], str]
    settings: Path | None = None
    is_killed: bool = False


async def keep_running(
    program: Program, is_ready: Callable[[], Awaitable[bool]], *, started: Callable[[], None]
) -> None:
    """Run ``program`` until cancelled; ``started`` is called once, when it serves. It is started anew whenever it ends.

    Raises ExportFailed if it is missing or its first start fails; later failures are logged and tried again.
    """
    fails = 0
    tell: Callable[[], None] | None = started
    while True:
        try:
            served_s = await _run(program, is_ready, tell)
            tell = None
        except ExportFailed as exc:
            if tell is not None:
                raise
            served_s = 0.0
            _log.warning("export_does_not_start", program=program.name, problem=str(exc))
        fails = 0 if served_s >= _STEADY_S else fails + 1
        await trio.sleep(_BACKOFF_S[min(max(fails - 1, 0), len(_BACKOFF_S) - 1)])


async def _run(program: Program, is_ready: Callable[[], Awaitable[bool]], started: Callable[[], None] | None) -> float:
    """Once, until it ended or has to; returns for how many seconds it served. Raises ExportFailed if it never did."""
    settings = _version(program.settings)
    child = _start(program)
    try:
        with trio.move_on_after(START_DEADLINE_S) as deadline:
            while child.poll() is None and not await is_ready():  # noqa: ASYNC110 - it tells nobody
                await trio.sleep(_POLL_S)
        if child.poll() is not None or deadline.cancelled_caught:
            raise _failed(program, child.returncode)
        if started is not None:
            started()
        begin = trio.current_time()
        await _watch(child, program, settings)
        return trio.current_time() - begin
    finally:
        with trio.CancelScope(shield=True):
            await _stop(child)


async def _watch(child: subprocess.Popen[bytes], program: Program, settings: tuple[int, int] | None) -> None:
    """Until it ended, or what it serves has gone: then its descriptors are dead. It knows that version of settings."""
    mounted = await _device(program.directory)
    while child.poll() is None:
        with trio.move_on_after(_WATCH_S):
            await _ended(child)
        if await _device(program.directory) != mounted:
            _log.warning("export_of_what_is_gone", program=program.name, directory=str(program.directory))
            return
        if _version(program.settings) != settings:
            settings = _version(program.settings)
            child.send_signal(signal.SIGHUP)
    _log.warning("export_ended", program=program.name, status=child.returncode, log=str(program.log))


def _start(program: Program) -> subprocess.Popen[bytes]:
    found = which(program.name, path=_PATH)
    if found is None:
        raise ExportFailed(f"{program.name} is not installed", hint=f"apt install {program.package}")
    with suppress(OSError):
        if program.log.stat().st_size > _LOG_LIMIT_BYTES:
            os.truncate(program.log, 0)
    try:
        with program.log.open("ab") as log:
            # setpriv has the kernel end the child with us; a function between fork and exec would not be safe: the
            # live server has threads.
            how = ("TERM", "--", "/bin/sh", "-c", _KILLED, "sh") if program.is_killed else ("KILL", "--")
            return subprocess.Popen(
                ("/usr/bin/setpriv", "--pdeathsig", *how, found, *program.arguments()),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd="/",
                env={"PATH": _PATH, "LC_ALL": "C.UTF-8"},
                start_new_session=True,
                umask=0o077,
            )
    except OSError as exc:
        raise ExportFailed(f"{program.name} can not be started: {exc.filename}: {exc.strerror}") from exc


async def _ended(child: subprocess.Popen[bytes]) -> None:
    """Wait for its end without reaping it: poll does."""
    try:
        descriptor = os.pidfd_open(child.pid)
    except ProcessLookupError:
        return
    try:
        await trio.lowlevel.wait_readable(descriptor)
    finally:
        os.close(descriptor)


async def _stop(child: subprocess.Popen[bytes]) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        if child.poll() is not None:
            return
        child.send_signal(number)
        with trio.move_on_after(_STOP_S):
            await _ended(child)
    if child.poll() is None:
        _log.error("export_can_not_be_ended", pid=child.pid)  # in a call of the kernel that does not return


def _version(settings: Path | None) -> tuple[int, int] | None:
    """Another one when the file was replaced; None if there is none."""
    with suppress(OSError):
        if settings is not None:
            status = settings.stat()
            return status.st_ino, status.st_mtime_ns
    return None


async def _device(directory: Path) -> int | None:
    """What is mounted there, None if it does not answer."""
    with trio.move_on_after(_STOP_S):
        try:
            return (await trio.to_thread.run_sync(directory.stat, abandon_on_cancel=True)).st_dev
        except OSError:
            return None
    return None


def _failed(program: Program, status: int | None) -> ExportFailed:
    what = f"does not serve after {START_DEADLINE_S:.0f} s" if status is None else f"ended with status {status}"
    lines = log_tail(program.log)
    hint = program.hint("\n".join(lines)) or f"its log is {program.log}"
    return ExportFailed(f"{program.name} {what}: {' | '.join(lines[-_TOLD_LINES:]) or 'it logged nothing'}", hint=hint)


def log_tail(log: Path) -> list[str]:
    """The last lines of a log, none if it can not be read."""
    try:
        with log.open("rb") as file:
            file.seek(max(file.seek(0, os.SEEK_END) - _TAIL_BYTES, 0))
            text = file.read().decode(errors="replace")
    except OSError:
        return []
    return [line.strip() for line in text.splitlines() if line.strip()][-_TAIL_LINES:]


async def answers(address: str | Path, port: int = 0, *, say: bytes = b"") -> bool:
    """Whether something there (a path: a unix socket) answers ``say``, or greets if that is empty."""
    with trio.move_on_after(1.0), suppress(OSError, trio.BrokenResourceError):
        if isinstance(address, Path):
            stream: trio.SocketStream = await trio.open_unix_socket(str(address))
        else:
            stream = await trio.open_tcp_stream(address, port)
        async with stream:
            await stream.send_all(say)
            return bool(await stream.receive_some(1024))
    return False


def check_free(address: str, port: int, hint: str) -> int:
    """A port that nobody listens on: ``port``, or some one if that is 0. Raises ExportFailed, with ``hint`` if taken.

    Else the program that is to be started would end, but somebody would answer in its place.
    """
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        with socket.create_server((address, port), family=family) as server:
            free: int = server.getsockname()[1]
    except OSError as exc:
        if exc.errno != errno.EADDRINUSE:
            hint = "listen at an address of this machine that clients reach"
        raise ExportFailed(f"nobody can listen at {address} port {port}: {exc.strerror}", hint=hint) from exc
    return free
