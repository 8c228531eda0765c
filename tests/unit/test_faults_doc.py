"""Every test that the table of faults in docs/xenserver.md names exists."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
NAMED = re.compile(r"`([\w/.]+)::(\w+)`")


def test_tests_that_prove_a_fault_exist() -> None:
    text = (ROOT / "docs/xenserver.md").read_text(encoding="utf-8")
    section = text.partition("\n## Faults\n")[2].partition("\n## ")[0]
    named = [(place, name) for place, name in NAMED.findall(section) if name != "x"]
    assert len(named) > 60
    missing = [f"{place}::{name}" for place, name in named if f"test_{name}" not in names_in(place)]
    assert missing == []


def names_in(place: str) -> set[str]:
    path = ROOT / (place if place.endswith(".py") else f"tests/fault/test_vm_cycle_{place}.py")
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}
