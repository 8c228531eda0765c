"""The only place that prints: results, warnings, errors and progress, for people or as one JSON document.

People read results on standard output and everything else on standard error. With ``--json`` standard output gets
exactly one JSON object, also for an error ({"error": {...}} beside what is known of the result). One thread uses it.
"""

from __future__ import annotations

import base64
import json
import os
import sys
import traceback
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from xbfs.cli.text import printable
from xbfs_engine.core.errors import TargetUnwritable, XbfsError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

EXIT_OK = 0
EXIT_BUG = 1
EXIT_WARNINGS = 3
EXIT_BROKEN_PIPE = 141
"""What a shell reports of a program that SIGPIPE ended: 128 + 13."""


class Output:
    """What one command tells. ``json``: as one JSON document; ``quiet``: without progress."""

    def __init__(self, *, json: bool) -> None:
        for name in ("stdout", "stderr"):
            if getattr(sys, name) is None:  # closed by whoever started us
                setattr(sys, name, Path(os.devnull).open("w"))  # noqa: SIM115 - for the life of the process
        self.json = json
        self.quiet = False
        self._stdout_is_taken = False
        self._record: dict[str, object] = {}
        self._streaming = False
        self._warnings: list[dict[str, str]] = []
        self._status_width = 0
        for stream in (sys.stdout, sys.stderr):
            reconfigure = getattr(stream, "reconfigure", None)
            if reconfigure is not None:
                reconfigure(errors="backslashreplace")

    @property
    def shows_progress(self) -> bool:
        """Whether anybody reads progress."""
        return not (self.json or self.quiet)

    @property
    def redraws(self) -> bool:
        """Whether progress goes to a terminal."""
        return sys.stderr.isatty()

    def give_away_stdout(self) -> None:
        """Standard output carries an image: text goes to standard error."""
        self._stdout_is_taken = True

    def say(self, text: str = "") -> None:
        """A line for people; nothing with --json."""
        if not self.json:
            self._print(text, to_stderr=self._stdout_is_taken)

    def say_now(self, text: str) -> None:
        """``say``, to be read before the command has ended."""
        self.say(text)
        self._flush()

    def result(self, record: Mapping[str, object]) -> None:
        """Fields of the JSON document."""
        self._record.update(record)

    def stream(self, name: str, items: Iterable[Mapping[str, object]]) -> None:
        """A field that is a list, written item by item: its length is not bounded by memory.

        Fields given with ``result`` before come before it, those given later behind it.
        """
        head = dict(self._record, **{name: []})
        self._record = {}
        if self.json:
            self._write(_to_json(head)[:-2])
            self._streaming = True
        separator = ""
        try:
            for item in items:
                if self.json:
                    self._write(separator + _to_json(item))
                    separator = ", "
        finally:
            if self.json:
                self._write("]")

    def warn(self, message: str, hint: str = "") -> None:
        """Something the user should know although the command does its work; it ends with exit code 3."""
        self._warnings.append({"message": message, "hint": hint})
        self._tell("warning: " + message, hint)

    def status(self, line: str) -> None:
        """Progress: redrawn in place on a terminal, a line of its own elsewhere."""
        if self.redraws:
            width = _columns() - 1
            line = printable(line)[:width]
            sys.stderr.write("\r" + line.ljust(min(self._status_width, width)))
            sys.stderr.flush()
            self._status_width = len(line)
        else:
            self._print(line, to_stderr=True)

    def clear_status(self) -> None:
        """Take a redrawn line away."""
        if self._status_width:
            sys.stderr.write("\r" + " " * self._status_width + "\r")
            sys.stderr.flush()
            self._status_width = 0

    def finish(self) -> int:
        """Write the document; returns the exit code of a command that did its work."""
        if self.json:
            self._write_record()
        self._flush()
        return EXIT_WARNINGS if self._warnings else EXIT_OK

    def fail(self, error: XbfsError) -> int:
        """Tell an error; returns its exit code."""
        self._tell(error.message, error.hint)
        return self._fail(type(error).__name__, error.message, error.hint, error.exit_code)

    def fail_unexpectedly(self, error: BaseException) -> int:
        """Tell an error that nobody foresaw."""
        message = f"this is a bug: {type(error).__name__}: {error}"
        hint = "run it again with XBFS_DEBUG=1 and report what it prints"
        if os.environ.get("XBFS_DEBUG") == "1":
            self.clear_status()
            traceback.print_exception(error)
        self._tell(message, hint)
        return self._fail(type(error).__name__, message, hint, EXIT_BUG)

    def reader_left(self) -> int:
        """Nobody reads standard output any more: say nothing, and let nothing be flushed there at exit."""
        _silence_stdout()
        return EXIT_BROKEN_PIPE

    def _fail(self, kind: str, message: str, hint: str, exit_code: int) -> int:
        if self.json:
            self._record["error"] = {"class": kind, "message": message, "hint": hint, "exit_code": exit_code}
            self._write_record()
        self._flush()
        return exit_code

    def _tell(self, message: str, hint: str) -> None:
        self._print(f"xbfs: {message}", to_stderr=True)
        if hint:
            self._print(f"hint: {hint}", to_stderr=True)

    def _write_record(self) -> None:
        if self._warnings:
            self._record["warnings"] = self._warnings
        text = _to_json(self._record)
        if self._streaming:
            text = ", " + text[1:] if self._record else "}"
        self._write(text + "\n")

    def _write(self, text: str) -> None:
        with _writing():
            sys.stdout.write(text)

    def _flush(self) -> None:
        with _writing():
            sys.stdout.flush()

    def _print(self, text: str, *, to_stderr: bool) -> None:
        self.clear_status()
        if to_stderr:
            print(printable(text), file=sys.stderr, flush=True)
        else:
            self._write(printable(text) + "\n")


def _to_json(record: Mapping[str, object]) -> str:
    """Bytes, which a captured VM record may hold, appear as base64."""
    return json.dumps(record, default=_plain)


def _plain(value: object) -> str:
    assert isinstance(value, bytes)
    return base64.b64encode(value).decode()


@contextmanager
def _writing() -> Iterator[None]:
    """Standard output that can not be written is the user's trouble, not a bug."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as exc:
        _silence_stdout()
        raise TargetUnwritable(f"standard output can not be written: {exc.strerror}", hint="see where it goes") from exc


def _silence_stdout() -> None:
    """Let what is still buffered go nowhere, now and at exit."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, sys.stdout.fileno())
    os.close(null)


def _columns() -> int:
    try:
        return max(os.get_terminal_size(sys.stderr.fileno()).columns, 20)
    except OSError:
        return 80
