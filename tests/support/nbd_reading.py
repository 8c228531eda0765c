"""Reading a disk as the pipeline does: threads that take announced reads in order."""

from __future__ import annotations

import threading
from functools import partial
from typing import TYPE_CHECKING

import trio

from xbfs_engine.source.nbd import HostBudget, NbdTarget, Timeouts, open_nbd_disk

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence
    from contextlib import AbstractAsyncContextManager

    from xbfs_engine.source.base import Extent
    from xbfs_engine.source.nbd import NbdDisk

SHORT = Timeouts(connect_s=5.0, message_s=5.0, pauses_s=(0.01,) * 4)
"""Five tries as ever, but without waiting for firewalls."""


def always(*targets: NbdTarget) -> Callable[[], Awaitable[Sequence[NbdTarget]]]:
    """Targets that stay the same."""

    async def ask() -> Sequence[NbdTarget]:
        return targets

    return ask


def opened(
    size_bytes: int, *targets: NbdTarget, connections: int = 2, read_ahead_bytes: int = 32 << 20
) -> AbstractAsyncContextManager[NbdDisk]:
    """A disk with short time-outs and a budget of its own."""
    return open_nbd_disk(
        always(*targets),
        HostBudget(),
        connections=connections,
        size_bytes=size_bytes,
        timeouts=SHORT,
        read_ahead_bytes=read_ahead_bytes,
    )


async def read_reads(
    disk: NbdDisk, reads: Sequence[Extent], *, threads: int = 2, announce: bool = True
) -> dict[Extent, bytes]:
    """Make these reads from several threads, announced or not; raises what the first that failed got."""
    if announce:
        disk.read_ahead(iter(reads))
    rest = iter(reads)
    lock = threading.Lock()
    found: dict[Extent, bytes] = {}
    failures: list[BaseException] = []

    def work() -> None:
        try:
            while not failures:
                with lock:
                    read = next(rest, None)
                if read is None:
                    return
                buffer = bytearray(read[1])
                disk.read_into(read[0], memoryview(buffer))
                found[read] = bytes(buffer)
        except BaseException as exc:
            failures.append(exc)

    async with trio.open_nursery() as nursery:
        for _ in range(threads):
            nursery.start_soon(partial(trio.to_thread.run_sync, work))
    if failures:
        raise failures[0]
    return found


def steps(size_bytes: int, step_bytes: int = 4 << 20) -> list[Extent]:
    """All of a disk."""
    return [(offset, min(step_bytes, size_bytes - offset)) for offset in range(0, size_bytes, step_bytes)]
