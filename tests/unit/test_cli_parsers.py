"""The grammar: every verb explains itself, every example in a help text parses, and help imports nothing heavy."""

from __future__ import annotations

import argparse
import importlib
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from xbfs.cli.parsers import build_parser, parse
from xbfs_engine.core.errors import UsageError
from xbfs_engine.core.limits import GIB, MIB

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[2]
HEAVY = ("numpy", "trio", "cryptography", "zstandard", "msgpack", "blake3", "structlog", "pyfuse3")


def verbs(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """All parsers that do something."""
    groups = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    if not groups:
        yield parser
    for group in groups:
        for below in group.choices.values():
            yield from verbs(below)


VERBS = list(verbs(build_parser()))


def test_the_verbs_are_those_of_the_product() -> None:
    assert {parser.prog.removeprefix("xbfs ") for parser in VERBS} == {
        *("init", "key list", "key add", "key remove", "backup image", "backup vm", "points", "show"),
        *("diff", "check", "verify", "export", "mount", "umount", "unlock", "index", "find", "history", "get"),
        *("pool add", "pool list", "pool remove", "pool trust", "pool check", "pool sweep", "restore", "rewind"),
        *("boot start", "boot list", "boot commit", "boot migrate", "boot discard", "boot serve", "test"),
    }


@pytest.mark.parametrize("parser", VERBS, ids=lambda parser: parser.prog)
def test_every_verb_has_json_a_repository_and_examples_that_parse(parser: argparse.ArgumentParser) -> None:
    text = parser.format_help()
    assert "--json" in text
    assert "--repository" in text
    assert parser.epilog is not None
    lines = parser.epilog.splitlines()[1:]
    own = [words for words in (shlex.split(line.split("|")[0]) for line in lines) if words[0] == "xbfs"]
    assert own
    for words in own:
        assert parse(words[1:]).call == parser.get_default("call")


@pytest.mark.parametrize("parser", VERBS, ids=lambda parser: parser.prog)
def test_every_verb_is_done_by_a_function_that_exists(parser: argparse.ArgumentParser) -> None:
    module, function = parser.get_default("call").split(":")
    assert callable(getattr(importlib.import_module(f"xbfs.cli.{module}"), function))


def test_common_options_may_stand_before_and_behind_the_verb() -> None:
    for words in (["-r", "/x", "--json", "points"], ["points", "--json", "-r", "/x"], ["--json", "points", "-r", "/x"]):
        parsed = parse(words)
        assert (parsed.repository, parsed.json) == ("/x", True)
    assert not hasattr(parse(["points"]), "json")


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["nonsense"],
        ["key"],
        ["backup", "image", "--vm", "a"],
        ["backup", "image", "p"],
        ["backup", "image", "p", "--vm", "a", "--disk", "255"],
        ["backup", "image", "p", "--vm", "a", "--disk", "-1"],
        ["backup", "image", "p", "--vm", "a", "--disk", "²"],
        ["backup", "image", "p", "--vm", "a", "--base", "abcd", "--new-chain"],
        ["backup", "image", "p", "--vm", "a", "--passphrase", "secret"],
        ["export", "p", "--format", "qcow3"],
        ["points", "--jso"],
        ["mount", "m", "--cache-size", "0"],
        ["mount", "m", "--cache-size", "1T"],
        ["mount", "m", "--deadline", "nan"],
        ["mount", "m", "--deadline", "0"],
        ["diff", "a"],
    ],
    ids=" ".join,
)
def test_mistakes_are_usage_errors_that_point_at_the_help(words: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        parse(words)
    assert "--help`" in caught.value.hint


def test_sizes_and_seconds() -> None:
    parsed = parse(["mount", "m", "--cache-size", "2G", "--deadline", "1.5"])
    assert (parsed.cache_size, parsed.deadline) == (2 * GIB, 1.5)
    assert parse(["mount", "m", "--cache-size", "1048576"]).cache_size == MIB


@pytest.mark.parametrize(("words", "code"), [(["--help"], 0), (["export", "--help"], 0), (["nonsense"], 2), ([], 2)])
def test_help_and_usage_errors_import_nothing_heavy(words: list[str], code: int) -> None:
    program = (
        "import sys; from xbfs.cli.main import main\n"
        f"try: code = main({words!r})\n"
        "except SystemExit as exc: code = exc.code\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules], code, file=sys.stderr)"
    )
    environment = os.environ | {"PYTHONPATH": f"{ROOT / 'engine'}:{ROOT}"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert done.stderr.splitlines()[-1] == f"[] {code}"
