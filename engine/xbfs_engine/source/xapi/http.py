"""Transfers over HTTPS: disks, and the metadata of VMs. The transfer's own task has the last word on its success."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, Protocol

if TYPE_CHECKING:
    from contextlib import AbstractAsyncContextManager

    from typing_extensions import Buffer

    from xbfs_engine.source.xapi.session import Pool
    from xbfs_engine.source.xapi.values import Ref


class RawStream(Protocol):
    """A disk as it comes from a host. Blocking calls, made from one worker thread at a time."""

    @property
    def received_bytes(self) -> int:
        """What ``readinto`` has given so far."""
        ...

    def readinto(self, view: memoryview) -> int:
        """Fill ``view`` as far as the stream goes: less than its length, or 0, is the end. Raises PoolError."""
        ...

    async def finish(self, *, size_bytes: int | None = None) -> None:
        """After the end: wait for the task's verdict, and check that ``size_bytes`` came. Raises PoolError."""
        ...


class RawSink(Protocol):
    """A disk on its way to a host. Blocking calls, made from one worker thread at a time."""

    def write(self, data: Buffer) -> None:
        """Send all of ``data``. Raises TransferFailed."""
        ...

    def write_at(self, offset: int, data: Buffer) -> None:
        """Only for ``chunked``: send ``data`` for ``offset``; what is never sent stays as it is."""
        ...


def export_raw(
    pool: Pool, vdi_ref: Ref, *, format: Literal["raw", "vhd"], base_ref: Ref | None = None, timeout_s: float
) -> AbstractAsyncContextManager[RawStream]:
    """The content of a disk as a stream. ``timeout_s``: the longest silence. Leave it early to drop the rest."""
    raise NotImplementedError


def import_raw(
    pool: Pool, vdi_ref: Ref, *, format: Literal["raw", "vhd", "chunked"], length: int | None, timeout_s: float
) -> AbstractAsyncContextManager[RawSink]:
    """Write into a disk; leaving cleanly waits for the task and raises its failure."""
    raise NotImplementedError


async def export_metadata(pool: Pool, vm_ref: Ref) -> bytes:
    """The VM's metadata as the archive (tar) that ``import_metadata`` takes."""
    raise NotImplementedError


async def import_metadata(
    pool: Pool,
    archive: bytes,
    *,
    vdi_map: dict[str, str],
    restore: bool,
    force: bool = False,
    dry_run: bool = False,
) -> list[Ref]:
    """Recreate VMs from their metadata."""
    raise NotImplementedError
