"""Runs the engine's asynchronous work from the command line, so that signals cancel it in order."""

from __future__ import annotations

import os
import signal
from functools import partial
from typing import TYPE_CHECKING, TypeVar

import trio

from xbfs_engine.core.errors import Cancelled

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

T = TypeVar("T")


def run(work: Callable[[], Awaitable[T]]) -> T:
    """The result of ``work``. SIGINT or SIGTERM cancels it, a second one ends the process at once.

    Raises Cancelled unless the work was done before the signal could stop it.
    """
    return trio.run(partial(_guarded, work, stops=True))


def finish(work: Callable[[], Awaitable[T]]) -> T:
    """The result of ``work`` that takes back what was made: a first SIGINT or SIGTERM does not stop it, a second one
    ends the process at once."""
    return trio.run(partial(_guarded, work, stops=False))


async def _guarded(work: Callable[[], Awaitable[T]], *, stops: bool) -> T:
    results: list[T] = []
    failures: list[Exception] = []
    scope, unheard = trio.CancelScope(), trio.CancelScope()
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_watch, signals, scope if stops else unheard)
            with scope:
                try:
                    results.append(await work())
                except Exception as exc:  # noqa: BLE001 - carried out of the nursery as it is, not in a group
                    failures.append(exc)
            nursery.cancel_scope.cancel()
    if failures:
        raise failures[0]
    if not results:
        raise Cancelled("stopped by a signal; nothing half-done was left visible")
    return results[0]


async def _watch(signals: AsyncIterator[int], scope: trio.CancelScope) -> None:
    async for number in signals:
        if scope.cancel_called:
            # Threads that hang in a system call can not be cancelled; being killed is safe for every command.
            os._exit(128 + number)
        scope.cancel()
