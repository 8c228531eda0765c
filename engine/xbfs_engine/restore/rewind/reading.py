"""Reading a VDI and comparing it with what it shall hold: to find what differs, and to verify what was written."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import trio

from xbfs_engine.core.errors import CertificateRejected, SourceUnreadable, TransferFailed, XapiFailure
from xbfs_engine.core.limits import SEGMENT_SIZE
from xbfs_engine.core.log import Logger

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractAsyncContextManager

    from xbfs_engine.restore.rewind.marks import ChunkMarks
    from xbfs_engine.restore.rewind.ports import DiskReader
    from xbfs_engine.restore.rewind.wanted import WantedDisk
    from xbfs_engine.source.base import DiskSource
    from xbfs_engine.source.xapi.values import Ref

_OTHER_WAY: Final = (TransferFailed, SourceUnreadable, CertificateRejected)
"""What makes a read over NBD worth another try over HTTPS, whose hosts are pinned like those of all calls."""

_log = Logger("xbfs.rewind")


async def differing(
    reader: DiskReader, vdi_ref: Ref, wanted: WantedDisk, where: ChunkMarks, report: Callable[[int], None]
) -> ChunkMarks:
    """Those of the chunks ``where`` in which the VDI is not as it shall be; over NBD, or else over HTTPS.

    ``report`` hears the bytes that are done, in the event loop.

    Raises PoolError, SourceError; IntegrityError and StorageError of the repository's block map.
    """
    if not where.marked_bytes:
        return wanted.marks()
    if await _has_nbd(reader, vdi_ref):
        try:
            return await _compare(reader.nbd(vdi_ref, wanted.size_bytes), wanted, where, report)
        except _OTHER_WAY as exc:
            _log.warning("reading over NBD failed", error=exc.message)
    return await _compare(reader.stream(vdi_ref, wanted.size_bytes), wanted, where, report)


async def _has_nbd(reader: DiskReader, vdi_ref: Ref) -> bool:
    try:
        return await reader.has_nbd(vdi_ref)
    except XapiFailure as exc:
        _log.info("get_nbd_info failed", code=exc.code)
        return False


async def _compare(
    opened: AbstractAsyncContextManager[DiskSource],
    wanted: WantedDisk,
    where: ChunkMarks,
    report: Callable[[int], None],
) -> ChunkMarks:
    async with opened as source:

        def work() -> ChunkMarks:
            found, done = wanted.marks(), 0
            most = SEGMENT_SIZE // wanted.chunk_size
            buffer = memoryview(bytearray(SEGMENT_SIZE))
            source.read_ahead(where.extent(*run) for runs in where.batches(most) for run in runs)
            for runs in where.batches(most):
                for first, end in runs:
                    offset, length = where.extent(first, end)
                    source.read_into(offset, buffer[:length])
                    _mark_differing(wanted, first, buffer[:length], found)
                    done += length
                # Also the place where a thread whose task was cancelled ends.
                trio.from_thread.run_sync(report, done)
            return found

        return await trio.to_thread.run_sync(work, abandon_on_cancel=True)


def _mark_differing(wanted: WantedDisk, first: int, view: memoryview, found: ChunkMarks) -> None:
    """Mark the chunks in ``view``, which begins with chunk ``first``, that are not as they shall be."""
    size = wanted.chunk_size
    for number, start in enumerate(range(0, len(view), size)):
        if not wanted.holds(first + number, view[start : start + size]):
            found.add(first + number, first + number + 1)
