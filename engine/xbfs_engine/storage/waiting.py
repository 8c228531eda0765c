"""Waits for the storage that end: a thread is given up some seconds after its task was cancelled, and work is cancelled
when the storage does not answer. For trio's tasks."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, TypeVar, TypeVarTuple

import trio

from xbfs_engine.core.errors import StorageTimeout
from xbfs_engine.storage.watched import WatchedStorage

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from xbfs_engine.storage.base import Storage

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

GRACE_S = 10.0
"""What a thread gets to end by itself once its task is cancelled: a pack is written out in less."""
DEADLINE_S = 300.0
"""How long one call of the storage may take: a pack of 32 MiB over a network a hundred times too slow."""
_LOOK_S = 1.0


async def in_thread(call: Callable[[*Ts], T], *arguments: *Ts, limiter: trio.CapacityLimiter | None = None) -> T:
    """``trio.to_thread.run_sync`` that, once cancelled, lets the call end for GRACE_S and then abandons its thread.

    A call that ends in time counts: its result is returned, and the cancellation is felt at the next wait.
    """
    results: list[T] = []
    failures: list[BaseException] = []
    ended = trio.Event()

    async def run() -> None:
        try:
            work = partial(call, *arguments)
            results.append(await trio.to_thread.run_sync(work, limiter=limiter, abandon_on_cancel=True))
        except trio.Cancelled:
            raise
        except BaseException as exc:  # noqa: BLE001 - handed to the task that waits
            failures.append(exc)
        finally:
            ended.set()

    trio.lowlevel.spawn_system_task(run)  # in no nursery of the caller's: it must outlive the cancellation
    try:
        await ended.wait()
    except trio.Cancelled:
        with trio.move_on_after(GRACE_S, shield=True):
            await ended.wait()
        if not ended.is_set():
            raise
    if failures:
        raise failures[0]
    return results[0]


async def while_answering(storage: Storage, work: Callable[[], Awaitable[T]], deadline_s: float = DEADLINE_S) -> T:
    """The result of ``work``, cancelled with StorageTimeout once a call of ``storage`` takes longer than the deadline.

    A storage that is not watched (``WatchedStorage``) is trusted to keep deadlines of its own.
    """
    if not isinstance(storage, WatchedStorage):
        return await work()
    results: list[T] = []
    failures: list[Exception] = []
    scope = trio.CancelScope()

    async def look() -> None:
        while storage.stalled_s() < deadline_s:  # noqa: ASYNC110 - threads begin and end calls, no task does
            await trio.sleep(min(_LOOK_S, deadline_s / 4))
        scope.cancel()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(look)
        with scope:
            try:
                results.append(await work())
            except Exception as exc:  # noqa: BLE001 - carried out of the nursery as it is, not in a group
                failures.append(exc)
        nursery.cancel_scope.cancel()
    if failures:
        raise failures[0]
    if not results:
        raise StorageTimeout(
            f"{storage.location()} has not answered for {deadline_s:.0f} s",
            hint="is it mounted and reachable? run the command again; nothing half-done is visible",
        )
    return results[0]
