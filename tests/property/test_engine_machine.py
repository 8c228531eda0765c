"""The engine as a state machine: any order of writes, backups, crashes and cold starts keeps every point."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis.stateful import run_state_machine_as_test

from tests.support.machine import EngineMachine


def test_every_committed_point_reads_back_always() -> None:
    run_state_machine_as_test(
        EngineMachine,
        settings=settings(max_examples=10, stateful_step_count=25, deadline=None, derandomize=True, print_blob=True),
    )


@pytest.mark.slow
def test_every_committed_point_reads_back_always_for_long() -> None:
    run_state_machine_as_test(
        EngineMachine, settings=settings(max_examples=300, stateful_step_count=50, deadline=None, print_blob=True)
    )
