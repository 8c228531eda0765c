"""Signals stop work in order: cancelled if it was not done, its result if it was, and handlers are put back."""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING

import pytest
import trio

from xbfs.cli import tasks
from xbfs.cli.maintenance import _until_signal
from xbfs_engine.core.errors import Cancelled, SourceChanged

if TYPE_CHECKING:
    from collections.abc import Callable

SIGNALS = [signal.SIGINT, signal.SIGTERM]


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_cancels_the_work_and_lets_it_clean_up(number: int) -> None:
    cleaned = []

    async def work() -> None:
        try:
            os.kill(os.getpid(), number)
            await trio.sleep(30)
        finally:
            cleaned.append(True)

    with pytest.raises(Cancelled):
        tasks.run(work)
    assert cleaned == [True]


def test_work_that_was_done_all_the_same_gives_its_result() -> None:
    async def work() -> str:
        os.kill(os.getpid(), signal.SIGTERM)
        with trio.CancelScope(shield=True):
            await trio.sleep(0.05)
        return "committed"

    assert tasks.run(work) == "committed"


def test_errors_come_as_they_are_and_not_in_a_group() -> None:
    async def work() -> None:
        await trio.lowlevel.checkpoint()
        raise SourceChanged("it grew")

    with pytest.raises(SourceChanged, match="it grew"):
        tasks.run(work)


@pytest.mark.parametrize("number", SIGNALS)
def test_blocking_work_is_told_to_stop_and_handlers_are_put_back(number: int) -> None:
    before = [signal.getsignal(each) for each in SIGNALS]
    seen = []

    def work(stop: Callable[[], bool]) -> str:
        seen.append(stop())
        os.kill(os.getpid(), number)
        seen.append(stop())
        return "stopped"

    assert _until_signal(work) == "stopped"
    assert seen == [False, True]
    assert [signal.getsignal(each) for each in SIGNALS] == before
