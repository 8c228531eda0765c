#!/usr/bin/env python3
"""Size budget and file habits, checked over the whole tree: each file ends up small, and says what it is for.

``tools/tidy.py [ROOT]`` prints each violation as ``path:line: what`` and exits 1 if there is any.
``tools/tidy.py --scripts`` lists the Python programs in tools/ without a suffix, for tools that look at suffixes.
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 70
PLACES = ("engine", "xbfs", "tools", "tests")


def scripts(root: Path) -> list[Path]:
    """Python programs in tools/ that have no suffix, told by their first line, sorted."""
    return [path for path in sorted((root / "tools").glob("*")) if not path.suffix and path.is_file() and _python(path)]


def violations(root: Path) -> Iterator[str]:
    """What breaks the budget in the Python files of ``root``, one line each."""
    for path in [*(path for place in PLACES for path in sorted((root / place).rglob("*.py"))), *scripts(root)]:
        name = path.relative_to(root)
        yield from (f"{name}:{fault}" for fault in _faults(path.read_text(encoding="utf-8")))


def _python(path: Path) -> bool:
    with path.open("rb") as file:
        first = file.readline(200)
    return first.startswith(b"#!") and b"python" in first


def _faults(source: str) -> Iterator[str]:
    lines = len(source.splitlines())
    if lines > MAX_FILE_LINES:
        yield f"{lines}: the file has {lines} lines, {MAX_FILE_LINES} are allowed; split it by what it owns"
    try:
        tree = ast.parse(source)
    except SyntaxError as exc:
        yield f"{exc.lineno}: not Python: {exc.msg}"
        return
    if not ast.get_docstring(tree):
        yield "1: no module docstring; say what the file owns"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > MAX_FUNCTION_LINES:
                yield f"{node.lineno}: {node.name} has {length} lines, {MAX_FUNCTION_LINES} are allowed"


def main(arguments: list[str]) -> int:
    """Run the command; returns the exit status."""
    here = Path(__file__).resolve().parents[1]
    if arguments == ["--scripts"]:
        print(*(path.relative_to(here) for path in scripts(here)), sep="\n")
        return 0
    found = list(violations(Path(arguments[0]) if arguments else here))
    print(*found, sep="\n", end="\n" if found else "")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
