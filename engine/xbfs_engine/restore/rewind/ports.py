"""What a rewind needs of its surroundings: ways to a disk's bytes, and somebody who listens."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Protocol

from xbfs_engine.catalog.restore_point import RestorePoint
from xbfs_engine.codec.wire import Value

if TYPE_CHECKING:
    from contextlib import AbstractAsyncContextManager

    from typing_extensions import Buffer

    from xbfs_engine.restore.rewind.report import DiskReport
    from xbfs_engine.source.base import DiskSource
    from xbfs_engine.source.xapi.values import Ref


class Sink(Protocol):
    """A disk on its way to a host (``source.xapi.http.RawSink``). Calls block; one thread at a time."""

    def write(self, data: Buffer) -> None:
        """The next bytes of a whole disk. Raises TransferFailed."""
        ...

    def write_at(self, offset: int, data: Buffer) -> None:
        """Bytes for a place of a disk whose other bytes stay. Raises TransferFailed."""
        ...


class DiskReader(Protocol):
    """Ways to the bytes of a VDI that nobody has attached for writing. Sources are used as long as they are entered."""

    async def has_nbd(self, vdi_ref: Ref) -> bool:
        """Whether a host offers it over NBD now. Raises PoolError."""
        ...

    def nbd(self, vdi_ref: Ref, size_bytes: int) -> AbstractAsyncContextManager[DiskSource]:
        """Over NBD. Raises PoolError, SourceError."""
        ...

    def stream(self, vdi_ref: Ref, size_bytes: int) -> AbstractAsyncContextManager[DiskSource]:
        """As one HTTPS stream. Raises PoolError."""
        ...


class DiskWriter(Protocol):
    """Ways to change a VDI. Leaving cleanly means that the host has it all, or raises."""

    def patch(self, vdi_ref: Ref) -> AbstractAsyncContextManager[Sink]:
        """Write some places of it. Raises PoolError."""
        ...

    def fill(self, vdi_ref: Ref, size_bytes: int) -> AbstractAsyncContextManager[Sink]:
        """Write all of it, from the first byte to the last. Raises PoolError."""
        ...


class Listener(Protocol):
    """Hears how a rewind goes. Called in the event loop; must not block."""

    def step(self, what: str) -> None:
        """The next step, in words."""
        ...

    def plan(self, disks: list[DiskReport]) -> None:
        """What will be written, before anything is."""
        ...

    def progress(self, what: str, done_bytes: int, total_bytes: int) -> None:
        """Some times a second while disks are read or written."""
        ...

    def warn(self, what: str, hint: str) -> None:
        """Something the user should look at."""
        ...


class Base(Protocol):
    """What a point remembers of its pool: by disk number, the uuid of the snapshot that later changes count from."""

    @property
    def pool_uuid(self) -> str:
        """The pool it was read from."""
        ...

    @property
    def snapshots(self) -> Mapping[int, str]:
        """By disk number."""
        ...


BaseOf = Callable[[Mapping[str, Value]], Base | None]
"""From ``RestorePoint.vm``; None where that tells nothing."""

SafetyPoint = Callable[[], Awaitable[RestorePoint]]
"""Backs the VM up as it is now. Raises what a backup raises."""
