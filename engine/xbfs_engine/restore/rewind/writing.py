"""Writing into VDIs: the chunks that differ into one that exists, or all of it into a new one.

Every chunk is checked against its id before it leaves; zeros are sent like everything else, as a host leaves alone what
it is not sent (xen-api, import_raw_vdi). A write that broke is done again from its beginning: it has the same effect.
"""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING, Final

import trio

from xbfs_engine.core.errors import XapiFailure
from xbfs_engine.core.limits import MIB
from xbfs_engine.source.xapi.failures import Handling, handling_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from xbfs_engine.core.errors import PoolError
    from xbfs_engine.restore.rewind.marks import ChunkMarks
    from xbfs_engine.restore.rewind.ports import DiskWriter
    from xbfs_engine.restore.rewind.wanted import WantedDisk
    from xbfs_engine.source.xapi.patience import Patience
    from xbfs_engine.source.xapi.values import Ref

_BATCH_SIZE: Final = 2 * MIB
"""Plaintext in memory at once, and the most in one record of a host's ``chunked`` framing."""

_REFUSALS: Final = frozenset({"VDI_READONLY", "INTERNAL_ERROR"})
"""Beside what a pool says it can not do: INTERNAL_ERROR is a host's answer to a format it does not know."""


def is_refusal(error: PoolError) -> bool:
    """Whether a host will never write into this VDI in this way."""
    return isinstance(error, XapiFailure) and (handling_of(error) is Handling.UNSUPPORTED or error.code in _REFUSALS)


async def patch(
    writer: DiskWriter,
    patience: Patience,
    vdi_ref: Ref,
    wanted: WantedDisk,
    where: ChunkMarks,
    report: Callable[[int], None],
) -> None:
    """Write the chunks ``where`` into a VDI. Raises PoolError; IntegrityError, StorageError of the repository."""

    async def attempt() -> None:
        async with writer.patch(vdi_ref) as sink:
            await _send(sink.write_at, wanted, where, report)

    await patience.get(attempt, "write a disk", repeatable=True)


async def fill(
    writer: DiskWriter, patience: Patience, vdi_ref: Ref, wanted: WantedDisk, report: Callable[[int], None]
) -> None:
    """Write all of a VDI. Raises what ``patch`` raises."""

    async def attempt() -> None:
        async with writer.fill(vdi_ref, wanted.size_bytes) as sink:

            def write(_offset: int, data: bytes) -> None:
                sink.write(data)

            await _send(write, wanted, wanted.marks(full=True), report)

    await patience.get(attempt, "write a new disk", repeatable=True)


async def _send(
    write: Callable[[int, bytes], None], wanted: WantedDisk, where: ChunkMarks, report: Callable[[int], None]
) -> None:
    def work() -> None:
        done = 0
        for runs in where.batches(_BATCH_SIZE // wanted.chunk_size):
            chunks = iter(wanted.content([position for run in runs for position in range(*run)]))
            for first, end in runs:
                data = b"".join(islice(chunks, end - first))
                # A thread whose task was cancelled must not write any more.
                trio.from_thread.check_cancelled()
                write(where.extent(first, end)[0], data)
                done += len(data)
            trio.from_thread.run_sync(report, done)

    await trio.to_thread.run_sync(work, abandon_on_cancel=True)
