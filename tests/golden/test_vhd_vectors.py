"""The VHD bytes of released versions: a child disk made of a restore point must find the same parent for ever."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from tests.support.vhd_rules import check_footer
from tools.make_vhd_vectors import CASES, TARGET, describe

if TYPE_CHECKING:
    from tools.make_vhd_vectors import Vector

VECTORS: list[Vector] = json.loads(TARGET.read_text(encoding="utf-8"))


@pytest.mark.parametrize("vector", VECTORS, ids=lambda vector: vector["name"])
def test_the_bytes_are_those_of_the_vector(vector: Vector) -> None:
    assert describe(vector["name"], vector["disk_size"], vector["blocks"]) == vector


@pytest.mark.parametrize("vector", VECTORS, ids=lambda vector: vector["name"])
def test_the_vectors_obey_the_rules(vector: Vector) -> None:
    for footer in (vector["footer"], vector["fixed_footer"]):
        fields = check_footer(bytes.fromhex(footer).ljust(512, b"\0"))
        assert fields["uuid"] == bytes.fromhex(vector["uuid"])


def test_no_vector_was_forgotten() -> None:
    assert [vector["name"] for vector in VECTORS] == [case[0] for case in CASES]
