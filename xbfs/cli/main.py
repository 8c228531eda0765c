"""The entry point: from words to a verb, from a verb to its module, from an error to an exit code.

Modules of verbs are imported when their verb runs, so that help and errors are there at once.
"""

from __future__ import annotations

import os
import signal
import sys
from importlib import import_module
from typing import TYPE_CHECKING, NoReturn, cast

from xbfs.cli.output import Output
from xbfs.cli.parsers import parse
from xbfs_engine.core.allocator import keep_freed_memory
from xbfs_engine.core.errors import Cancelled, XbfsError

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Sequence
    from types import FrameType


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line (without the program's name); returns the exit code."""
    # numpy's BLAS would start threads that nobody uses, and before `mount --background` forks.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    keep_freed_memory()
    words = list(sys.argv[1:] if arguments is None else arguments)
    output = Output(json="--json" in words)
    signal.signal(signal.SIGTERM, _on_terminate)
    try:
        return _run(words, output)
    except BrokenPipeError:
        return output.reader_left()


def _run(words: list[str], output: Output) -> int:
    try:
        parsed = parse(words)
        output.quiet = getattr(parsed, "quiet", False)
        _verb(parsed.call)(parsed, output)
        return output.finish()
    except BrokenPipeError:
        raise
    except (Exception, KeyboardInterrupt, BaseExceptionGroup) as exc:  # noqa: BLE001 - the seam to the user
        match _alone(exc):
            case XbfsError() as error:
                return output.fail(error)
            case KeyboardInterrupt():
                return output.fail(Cancelled("stopped on request; nothing half-done was left visible"))
            case other:
                return output.fail_unexpectedly(other)


def _alone(exc: BaseException) -> BaseException:
    """An exception out of the groups that nurseries put around it, if it is the only one."""
    while isinstance(exc, BaseExceptionGroup) and len(exc.exceptions) == 1:
        exc = exc.exceptions[0]
    return exc


def _verb(call: str) -> Callable[[argparse.Namespace, Output], None]:
    """The function that ``module:function`` of this package names."""
    module, function = call.split(":")
    return cast("Callable[[argparse.Namespace, Output], None]", getattr(import_module(f"xbfs.cli.{module}"), function))


def _on_terminate(_number: int, _frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt
