"""docs/errors.md lists exactly the error classes there are, with their numbers, and the numbers are unique."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from xbfs.cli import output
from xbfs_engine.core import errors
from xbfs_engine.core.errors import XbfsError

DOC = (Path(__file__).parents[2] / "docs" / "errors.md").read_text(encoding="utf-8")
CLASS_ROW = re.compile(r"^\| (\d+) \| (\w+) \| ([^|]+) \| ([^|]+) \|$", re.MULTILINE)
PLAIN_ROW = re.compile(r"^\| (\d+) \| ", re.MULTILINE)


def classes() -> list[type[XbfsError]]:
    found = [XbfsError]
    for error in found:
        found += error.__subclasses__()
    # Tests may derive classes of their own; only those of the package have numbers to keep.
    return [error for error in found if error.__module__.startswith(errors.__name__)]


def test_the_table_lists_every_class_with_its_number() -> None:
    rows = [(int(code), name) for code, name, _, _ in CLASS_ROW.findall(DOC)]
    assert rows == sorted((error.exit_code, error.__name__) for error in classes())


def test_numbers_are_unique_also_against_those_that_are_no_class() -> None:
    codes = [error.exit_code for error in classes()]
    assert len(set(codes)) == len(codes)
    plain = {int(code) for code in PLAIN_ROW.findall(DOC.split("## Error classes")[0])}
    assert plain == {output.EXIT_OK, output.EXIT_BUG, output.EXIT_WARNINGS, output.EXIT_BROKEN_PIPE}
    # 1 is also the base class's, which nobody raises.
    assert plain & set(codes) == {output.EXIT_BUG}


def test_classes_lie_in_the_range_of_their_base() -> None:
    for error in classes():
        base = next((base for base in error.__mro__ if base in XbfsError.__subclasses__()), None)
        if base is not None and base.__subclasses__():
            assert base.exit_code <= error.exit_code < base.exit_code + 10


def test_the_tree_in_the_module_shows_the_same_numbers() -> None:
    drawn = dict(re.findall(r"(\w+) (\d+)", (errors.__doc__ or "").split("\n\n", 2)[2]))
    assert drawn == {error.__name__: str(error.exit_code) for error in classes()}


@pytest.mark.parametrize("error", [error for error in classes() if error.retryable], ids=lambda error: error.__name__)
def test_retryable_classes_are_named_as_such(error: type[XbfsError]) -> None:
    sentence = re.search(r"Codes ([0-9 and,]+) may pass", DOC)
    assert sentence is not None
    assert str(error.exit_code) in sentence[1]


def test_every_situation_names_a_class_with_its_number() -> None:
    by_name = {error.__name__: error.exit_code for error in classes()}
    named = re.findall(r"\b([A-Z]\w+[a-z]) (\d+)\b", DOC.split("## Situations")[1])
    assert len(named) >= 20
    assert [(name, int(code)) for name, code in named] == [(name, by_name[name]) for name, _ in named]
