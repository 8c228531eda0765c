"""What ``tools/fuzz_guestfs`` runs with coverage for minutes, for a second without it; and all that it ever found."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.fuzz_targets import TARGETS, seeds

FOUND: dict[str, list[str]] = {}
"""By target, in hexadecimal."""


@pytest.mark.parametrize("name", TARGETS)
@settings(max_examples=15, suppress_health_check=list(HealthCheck), deadline=None)
@given(data=st.binary(max_size=200))
def test_any_input(name: str, data: bytes) -> None:
    TARGETS[name](data)


@pytest.mark.parametrize("name", TARGETS)
def test_what_it_begins_with_and_what_it_found(name: str) -> None:
    for seed in [*seeds(name), *map(bytes.fromhex, FOUND.get(name, []))]:
        TARGETS[name](seed)
