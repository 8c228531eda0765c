"""What the user sees: one JSON document, errors with hints and codes, progress where it belongs, plain numbers."""

from __future__ import annotations

import io
import itertools
import json
import re
import sys
from typing import TYPE_CHECKING, NoReturn

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.runtime import FixedClock
from xbfs.cli import main as cli_main
from xbfs.cli import text
from xbfs.cli.diff import changed_extents
from xbfs.cli.output import Output
from xbfs.cli.progress import ProgressLine
from xbfs_engine.core.errors import PointNotFound, WrongPassphrase

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator


class Terminal(io.StringIO):
    """Standard error of somebody who looks at it."""

    def isatty(self) -> bool:
        return True


def test_a_result_is_one_json_document(capsys: pytest.CaptureFixture[str]) -> None:
    output = Output(json=True)
    output.result({"a": 1})
    output.say("for people")
    output.result({"b": [2]})
    assert output.finish() == 0
    assert json.loads(capsys.readouterr().out) == {"a": 1, "b": [2]}


@pytest.mark.parametrize("head", [{}, {"head": 1}])
@pytest.mark.parametrize("items", [[], [{"n": 1}], [{"n": 1}, {"n": 2}]])
@pytest.mark.parametrize("tail", [{}, {"tail": 3}])
def test_a_streamed_list_is_part_of_the_document(
    head: dict[str, object],
    items: list[dict[str, object]],
    tail: dict[str, object],
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = Output(json=True)
    output.result(head)
    output.stream("items", iter(items))
    output.result(tail)
    assert output.finish() == 0
    assert json.loads(capsys.readouterr().out) == head | {"items": items} | tail


def test_an_error_in_the_middle_of_a_stream_leaves_a_document(capsys: pytest.CaptureFixture[str]) -> None:
    def items() -> Iterator[dict[str, object]]:
        yield {"n": 1}
        raise PointNotFound("gone")

    output = Output(json=True)
    with pytest.raises(PointNotFound) as caught:
        output.stream("items", items())
    assert output.fail(caught.value) == 15
    document = json.loads(capsys.readouterr().out)
    assert document["items"] == [{"n": 1}]
    assert document["error"] == {
        "class": "PointNotFound",
        "message": "gone",
        "hint": PointNotFound.default_hint,
        "exit_code": 15,
    }


def test_an_error_has_a_line_and_a_hint_on_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert Output(json=False).fail(WrongPassphrase("no slot opens", hint="try again")) == 51
    assert capsys.readouterr() == ("", "xbfs: no slot opens\nhint: try again\n")


def test_warnings_end_with_code_3_and_are_in_the_document(capsys: pytest.CaptureFixture[str]) -> None:
    output = Output(json=True)
    output.warn("one point is damaged", "restore it")
    assert output.finish() == 3
    written = capsys.readouterr()
    assert json.loads(written.out) == {"warnings": [{"message": "one point is damaged", "hint": "restore it"}]}
    assert written.err == "xbfs: warning: one point is damaged\nhint: restore it\n"


def fail_with(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def verb(_arguments: argparse.Namespace, _output: Output) -> NoReturn:
        raise error

    monkeypatch.setattr(cli_main, "_verb", lambda _call: verb)
    monkeypatch.setattr("signal.signal", lambda *_: None)


def test_what_nobody_foresaw_is_called_a_bug(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fail_with(monkeypatch, ZeroDivisionError("by zero"))
    monkeypatch.delenv("XBFS_DEBUG", raising=False)
    assert cli_main.main(["points", "--json"]) == 1
    written = capsys.readouterr()
    assert written.err.startswith("xbfs: this is a bug: ZeroDivisionError: by zero\nhint: ")
    assert "Traceback" not in written.err
    assert json.loads(written.out)["error"]["exit_code"] == 1
    monkeypatch.setenv("XBFS_DEBUG", "1")
    assert cli_main.main(["points"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_an_interrupt_is_cancelled(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    fail_with(monkeypatch, KeyboardInterrupt())
    assert cli_main.main(["points", "--json"]) == 130
    assert json.loads(capsys.readouterr().out)["error"]["class"] == "Cancelled"


def test_names_can_not_steer_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    Output(json=False).say("vm \x1b[2J\r\x07 \udcff ü\nnext")
    assert capsys.readouterr().out == "vm \\x1b[2J\\r\\x07 \\udcff ü\nnext\n"


def progress_on(
    stream: io.StringIO, monkeypatch: pytest.MonkeyPatch, *, quiet: bool = False, as_json: bool = False
) -> str:
    monkeypatch.setattr(sys, "stderr", stream)
    output = Output(json=as_json)
    output.quiet = quiet
    clock = FixedClock()
    with ProgressLine(output, clock) as line:
        for done in range(101):
            line.update("disk 0", done << 20, 100 << 20, note="bottleneck read")
            clock.advance(0.1)
    return stream.getvalue()


def test_progress_is_one_redrawn_line_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("xbfs.cli.output._columns", lambda: 80)
    written = progress_on(Terminal(), monkeypatch)
    assert "\n" not in written
    lines = [line for line in written.split("\r") if line.strip()]
    assert len(lines) > 20
    assert all(len(line) < 80 for line in lines)
    for line in lines:
        shown = re.match(r"disk 0  \[(#*)(-*)\]  *(\d+)%  (\S+) (?:M|K)iB of 100\.0 MiB  \d+\.\d MB/s", line)
        assert shown is not None
        assert len(shown[1] + shown[2]) == 24
        assert len(shown[1]) == round(int(shown[3]) * 24 / 100)
    assert written.endswith(" \r")


def test_progress_in_a_pipe_is_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = progress_on(io.StringIO(), monkeypatch).splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("disk 0   50%  50.0 MiB of 100.0 MiB")
    assert lines[0].endswith("0:05 left  bottleneck read")


@pytest.mark.parametrize("how", [{"quiet": True}, {"as_json": True}])
def test_no_progress_where_nobody_wants_it(how: dict[str, bool], monkeypatch: pytest.MonkeyPatch) -> None:
    assert progress_on(Terminal(), monkeypatch, **how) == ""


@pytest.mark.parametrize(
    ("size", "shown"),
    [
        *((0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (1024 * 1024 - 1, "1.0 MiB"), (300 << 20, "300.0 MiB")),
        *((1 << 53, "8.0 PiB"), (1 << 63, "8192.0 PiB")),
    ],
)
def test_sizes(size: int, shown: str) -> None:
    assert text.size(size) == shown


@pytest.mark.parametrize(
    ("seconds", "shown"), [(0.004, "0.00 s"), (59.99, "59.99 s"), (59.996, "1:00"), (187, "3:07"), (7387, "2:03:07")]
)
def test_durations(seconds: float, shown: str) -> None:
    assert text.duration(seconds) == shown


CHUNK = 64 << 10


@given(st.dictionaries(st.integers(0, 40), st.booleans()), st.integers(0, 41 * CHUNK))
def test_changed_extents_are_the_chunks_merged_and_clipped(chunks: dict[int, bool], size: int) -> None:
    extents = list(changed_extents(sorted(chunks.items()), CHUNK, size))
    expected = {
        offset: data
        for position, data in chunks.items()
        for offset in range(position * CHUNK, (position + 1) * CHUNK, 4096)
    }
    found = {
        offset: extent.data
        for extent in extents
        for offset in range(extent.offset, extent.offset + extent.length, 4096)
    }
    assert found == {offset: data for offset, data in expected.items() if offset < size}
    assert all(extent.length > 0 and extent.offset + extent.length <= size for extent in extents)
    for before, after in itertools.pairwise(extents):
        end = before.offset + before.length
        assert end < after.offset or (end == after.offset and before.data != after.data)
