"""A server that goes on in the background: fork, detach, and a pipe on which it says that it is there or why not.

Forking is safe only before threads exist, so this comes first in a command that uses it.
"""

from __future__ import annotations

import json
import os
import sys
from typing import TYPE_CHECKING, Final, NoReturn

from xbfs_engine.core import errors
from xbfs_engine.core.errors import MountFailed, XbfsError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

_MESSAGE_MAX: Final = 64 * 1024


def run_in_background(serve: Callable[[Callable[[], None]], None], log_file: Path | None) -> int:
    """Run ``serve(ready)`` in a detached process; returns its pid once it has called ``ready``.

    Raises the XbfsError it ended with before that, MountFailed if it ended otherwise.
    """
    reader, writer = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        os.close(reader)
        os.setsid()
        if os.fork():
            os._exit(0)
        _become_server(serve, writer, log_file)
    os.close(writer)
    os.waitpid(child, 0)
    with os.fdopen(reader, "rb") as pipe:
        answer = pipe.readline(_MESSAGE_MAX)  # what the server forks keeps the other end open
    return _understand(answer)


def _become_server(serve: Callable[[Callable[[], None]], None], writer: int, log_file: Path | None) -> NoReturn:
    status = 1
    try:
        os.chdir("/")
        told = False

        def tell(record: dict[str, object]) -> None:
            nonlocal told
            if not told:
                told = True
                os.write(writer, json.dumps(record).encode() + b"\n")
                os.close(writer)

        try:
            _redirect(log_file)
            serve(lambda: tell({"pid": os.getpid()}))
            status = 0
        except XbfsError as exc:
            status = exc.exit_code
            tell({"error": type(exc).__name__, "message": exc.message, "hint": exc.hint})
        except BaseException as exc:
            tell({"error": MountFailed.__name__, "message": f"the server failed: {exc!r}", "hint": ""})
            raise
    finally:
        sys.stderr.flush()
        os._exit(status)


def _redirect(log_file: Path | None) -> None:
    """Standard streams away from the terminal, so that nobody waits for this process to close them."""
    nothing = os.open(os.devnull, os.O_RDWR)
    messages = os.open(log_file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600) if log_file else nothing
    for stream, target in ((0, nothing), (1, nothing), (2, messages)):
        os.dup2(target, stream)


def _understand(answer: bytes) -> int:
    try:
        record = json.loads(answer)
    except ValueError:
        raise MountFailed("the server ended without a word", hint="try without --background") from None
    if "pid" in record:
        return int(record["pid"])
    kind = getattr(errors, record["error"], MountFailed)
    raise kind(record["message"], hint=record["hint"])
