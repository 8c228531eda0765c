"""tools/tidy.py, run as the test command runs it: silent on what keeps the budget, loud on each kind of breach."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

TIDY = Path(__file__).parents[2] / "tools" / "tidy.py"
GOOD = '"""What it owns."""\n'


def tidy(root: Path) -> tuple[int, list[str]]:
    done = subprocess.run([sys.executable, TIDY, root], capture_output=True, text=True, check=False)
    assert not done.stderr
    return done.returncode, done.stdout.splitlines()


def function(lines: int, header: str = "def f():") -> str:
    return GOOD + header + "\n" + "    pass\n" * (lines - 1)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for place in ("engine/xbfs_engine", "xbfs", "tools", "tests/unit"):
        (tmp_path / place).mkdir(parents=True)
    return tmp_path


def test_what_is_exactly_on_budget_passes(root: Path):
    (root / "xbfs" / "full.py").write_text(GOOD + "x = 1\n" * 399)
    (root / "tools" / "long.py").write_text(function(70))
    (root / "tools" / "script").write_text("#!/bin/sh\nexit 0\n")
    assert tidy(root) == (0, [])


@pytest.mark.parametrize(
    ("name", "source", "complaint"),
    [
        ("engine/xbfs_engine/a.py", GOOD + "x = 1\n" * 400, "a.py:401: the file has 401 lines"),
        ("xbfs/b.py", function(71), "b.py:2: f has 71 lines"),
        ("tests/unit/c.py", function(71, "async def f():"), "c.py:2: f has 71 lines"),
        ("tests/unit/d.py", "x = 1\n", "d.py:1: no module docstring"),
        ("tests/unit/empty.py", "", "empty.py:1: no module docstring"),
        ("tools/e", "#!/usr/bin/env python3\nx = 1\n", "e:1: no module docstring"),
        ("tools/f.py", "def\n", "f.py:1: not Python"),
    ],
)
def test_each_breach_is_told_with_its_place(root: Path, name: str, source: str, complaint: str):
    (root / name).write_text(source)
    status, lines = tidy(root)
    assert status == 1
    assert len(lines) == 1
    assert lines[0].startswith(str(Path(name).parent))
    assert complaint in lines[0]
