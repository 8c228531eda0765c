"""Who may do what at once on a pool: one snapshot or switch of tracking a time on an SR, one VM read at a time.

SM serialises per SR anyway, and answers those who come second with errors; readers share the memory of one run.
Belongs to one event loop; any task of it may use it.
"""

from __future__ import annotations

from collections import defaultdict
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING, Final

import trio

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable

    from xbfs_engine.source.xapi.values import Ref

SNAPSHOTS_MAX: Final = 2
"""VMs of one pool that have a snapshot of ours at once: while one is read, the next is taken or the last let go."""


class Places:
    """The locks of one run."""

    def __init__(self) -> None:
        self._srs: defaultdict[Ref, trio.Lock] = defaultdict(trio.Lock)
        self._reading = trio.Lock()
        self._vms = trio.Semaphore(SNAPSHOTS_MAX)

    @asynccontextmanager
    async def at(self, srs: Iterable[Ref]) -> AsyncIterator[None]:
        """Alone on these SRs."""
        async with AsyncExitStack() as stack:
            # In one order, so that two who want two never wait for each other.
            for sr in sorted(set(srs)):
                await stack.enter_async_context(self._srs[sr])
            yield

    @asynccontextmanager
    async def reading(self) -> AsyncIterator[None]:
        """The one that reads."""
        async with self._reading:
            yield

    async def wait_for_turn(self) -> None:
        """Wait to become one of the VMs that are at work."""
        await self._vms.acquire()

    def end_turn(self) -> None:
        """Be one of them no more."""
        self._vms.release()
