"""docs/guest-filesystems.md names a test for each trap, and each test it names is there."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOC = (ROOT / "docs" / "guest-filesystems.md").read_text(encoding="utf-8")
TRAPS = DOC.split("## Traps", 1)[1].split("\n## ", 1)[0]
ROW = re.compile(r"^\| (\d+) \| (.+) \| (.+) \|$", re.MULTILINE)
TEST = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")


@cache
def functions(path: str) -> frozenset[str]:
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    return frozenset(node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


@pytest.mark.parametrize(("number", "trap", "tests"), ROW.findall(TRAPS))
def test_the_tests_of_a_trap_are_there(number: str, trap: str, tests: str) -> None:
    named = TEST.findall(tests)
    assert named, f"trap {number}, {trap}"
    for path, function in named:
        assert function.startswith("test_")
        assert function in functions(path), f"{path} has no {function}"


def test_every_trap_has_a_row_and_the_rows_are_in_order() -> None:
    numbers = [int(number) for number, _, _ in ROW.findall(TRAPS)]
    assert numbers == sorted(numbers)
    assert set(numbers) == set(range(1, 22))


def test_every_row_is_one_that_is_checked() -> None:
    assert len(re.findall(r"^\| \d", TRAPS, re.MULTILINE)) == len(ROW.findall(TRAPS))
