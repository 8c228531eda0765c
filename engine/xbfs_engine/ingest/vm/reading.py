"""The ways to a snapshot's data: NBD over several connections, or else one HTTPS stream; and where a disk has data.

A run reads disk after disk, but has all its sources from the start: ``OneAtATime`` opens a disk when its first byte is
wanted, and closes the one before. So connections of a host are held for one disk only, and no stream waits unread.
"""

from __future__ import annotations

import threading
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol

import trio

from xbfs_engine.core.errors import PoolError
from xbfs_engine.formats.vhd_stream import AllocatedBlocks, allocated_blocks
from xbfs_engine.ingest.vm.stream_disk import StreamDisk
from xbfs_engine.source.nbd import NbdTarget, TlsPolicy, open_nbd_disk
from xbfs_engine.source.xapi.http import export_raw

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
    from contextlib import AbstractAsyncContextManager

    from xbfs_engine.source.base import DiskSource, Extent
    from xbfs_engine.source.nbd import HostBudget
    from xbfs_engine.source.xapi.session import Pool
    from xbfs_engine.source.xapi.values import Ref, XapiValue

_SILENCE_S: Final = 1200.0
"""Longest silence of a stream: a host may look for a block in a chain of thirty for long (as Xen Orchestra waits)."""

_HEAD_SILENCE_S: Final = 300.0


class Wanted(NamedTuple):
    """A disk to open. ``extents``: where it may hold data, if that is known."""

    vdi_ref: Ref
    size_bytes: int
    extents: Callable[[], Iterator[Extent]] | None


class DiskAccess(Protocol):
    """How data of a pool come to us."""

    async def has_nbd(self, vdi_ref: Ref) -> bool:
        """Whether a host offers this disk over NBD now. Raises PoolError."""
        ...

    def nbd(self, disk: Wanted) -> AbstractAsyncContextManager[DiskSource]:
        """Open it over NBD. Raises PoolError, SourceError."""
        ...

    def stream(self, disk: Wanted) -> AbstractAsyncContextManager[DiskSource]:
        """Open it as an HTTPS stream. Raises PoolError."""
        ...

    async def allocation(self, vdi_ref: Ref, size_bytes: int) -> AllocatedBlocks:
        """What of the disk is allocated. Raises PoolError, SourceUnreadable."""
        ...


class PoolAccess:
    """The real one. ``connections``: NBD connections to read one disk with."""

    def __init__(self, pool: Pool, budget: HostBudget, *, connections: int) -> None:
        self._pool = pool
        self._budget = budget
        self._connections = connections

    async def has_nbd(self, vdi_ref: Ref) -> bool:
        """See DiskAccess."""
        return bool(await nbd_targets(self._pool, vdi_ref))

    def nbd(self, disk: Wanted) -> AbstractAsyncContextManager[DiskSource]:
        """See DiskAccess."""
        return open_nbd_disk(
            lambda: nbd_targets(self._pool, disk.vdi_ref),
            self._budget,
            connections=self._connections,
            size_bytes=disk.size_bytes,
            extents=disk.extents,
        )

    @asynccontextmanager
    async def stream(self, disk: Wanted) -> AsyncIterator[DiskSource]:
        """See DiskAccess."""
        async with export_raw(self._pool, disk.vdi_ref, format="raw", timeout_s=_SILENCE_S) as stream:

            async def verdict() -> None:
                await stream.finish(size_bytes=disk.size_bytes)

            yield StreamDisk(stream, disk.size_bytes, disk.extents, lambda: trio.from_thread.run(verdict))

    async def allocation(self, vdi_ref: Ref, size_bytes: int) -> AllocatedBlocks:
        """See DiskAccess."""
        async with export_raw(self._pool, vdi_ref, format="vhd", timeout_s=_HEAD_SILENCE_S) as stream:

            def read(length: int) -> bytes:
                buffer = bytearray(length)
                return bytes(buffer[: stream.readinto(memoryview(buffer))])

            return await trio.to_thread.run_sync(
                lambda: allocated_blocks(read, disk_size_bytes=size_bytes), abandon_on_cancel=True
            )


async def nbd_targets(pool: Pool, vdi_ref: Ref) -> list[NbdTarget]:
    """Where a disk can be read over NBD now; IPv4 first, as hosts listen to nothing else (xapi-nbd).

    Raises PoolError.
    """
    answer = await pool.call("VDI.get_nbd_info", vdi_ref)
    if not isinstance(answer, list):
        raise PoolError("VDI.get_nbd_info: the answer is no list", hint="is it really a XenServer host?")
    return sorted((_target(item) for item in answer), key=lambda target: ":" in target.host)


def _target(item: XapiValue) -> NbdTarget:
    match item:
        case {
            "address": str() as address,
            "port": str() | int() as port,
            "exportname": str() as export_name,
            "cert": str() as certificate,
            "subject": str() as subject,
        } if str(port).isascii() and str(port).isdigit():
            # Without a certificate the network's purpose is insecure_nbd.
            tls = TlsPolicy(certificate, subject) if certificate else None
            return NbdTarget(address, int(port), export_name, tls, owner=subject or address)
    raise PoolError("VDI.get_nbd_info: the answer lacks what a client needs", hint="is it really a XenServer host?")


class LazyDisk:
    """A disk that is opened at its first read. Any thread but the event loop's may read."""

    def __init__(self, wanted: Wanted, open_it: Callable[[], Awaitable[DiskSource]]) -> None:
        self._wanted = wanted
        self._open_it = open_it
        self._lock = threading.Lock()
        self._reads: Iterator[Extent] = iter(())
        self._source: DiskSource | None = None

    @property
    def size_bytes(self) -> int:
        """Virtual size, as XAPI told it of the snapshot."""
        return self._wanted.size_bytes

    def data_extents(self) -> Iterator[Extent]:
        """What is known of allocation, or all of the disk."""
        if self._wanted.extents is not None:
            yield from self._wanted.extents()
        elif self.size_bytes:
            yield 0, self.size_bytes

    def read_ahead(self, reads: Iterator[Extent]) -> None:
        """Keep this for the source that will be opened."""
        self._reads = reads

    def read_into(self, offset: int, view: memoryview) -> None:
        """Fill ``view``. Raises what opening and reading raise."""
        with self._lock:
            if self._source is None:
                source = trio.from_thread.run(self._open_it)
                source.read_ahead(self._reads)
                self._source = source
        self._source.read_into(offset, view)

    def check_unchanged(self) -> None:
        """Do nothing: a snapshot does not change, and its size was compared when it was opened."""

    def close(self) -> None:
        """Do nothing: whoever opened the source closes it."""


class OneAtATime:
    """Holds at most one disk open; made by ``one_at_a_time``. Tasks of one event loop use it, one at a time."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self._nursery = nursery
        self._leave = trio.Event()
        self._left = trio.Event()
        self._left.set()

    def disk(self, wanted: Wanted, way: Callable[[Wanted], AbstractAsyncContextManager[DiskSource]]) -> LazyDisk:
        """A disk that ``way`` opens when it is first read."""

        async def open_it() -> DiskSource:
            await self.close()
            source: DiskSource = await self._nursery.start(self._hold, way(wanted))
            return source

        return LazyDisk(wanted, open_it)

    async def close(self) -> None:
        """Close the disk that is open, if any."""
        self._leave.set()
        await self._left.wait()

    async def _hold(
        self, disk: AbstractAsyncContextManager[DiskSource], *, task_status: trio.TaskStatus[DiskSource]
    ) -> None:
        """A context is left by the task that entered it: this one."""
        self._leave, self._left = trio.Event(), trio.Event()
        try:
            async with disk as source:
                task_status.started(source)
                await self._leave.wait()
        finally:
            self._left.set()


@asynccontextmanager
async def one_at_a_time() -> AsyncIterator[OneAtATime]:
    """Something that opens disks; leaving closes the last one."""
    failure: Exception | None = None
    async with trio.open_nursery() as nursery:
        shelf = OneAtATime(nursery)
        try:
            yield shelf
            await shelf.close()
        except Exception as exc:  # noqa: BLE001 - raised below: a nursery would wrap it in a group
            failure = exc
        nursery.cancel_scope.cancel()
    if failure is not None:
        raise failure
