"""Writes one disk of a restore point as an image file or stream, every chunk checked against its id on the way.

Worker threads take batches (2 MiB of image) from one feed and read, decode and write them; a file is written in any
order, a stream in turn. Memory: one batch per thread and the caches of block map nodes and pack directories (48 MiB).
An export belongs to one task; cancelling it leaves nothing of a file behind.
"""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol

import trio

from xbfs_engine.catalog.blockmap import BlockMap, NodeStore
from xbfs_engine.codec.envelope import ObjectKind
from xbfs_engine.core.errors import ChunkCorrupt, IntegrityError, StorageFull, TargetUnwritable
from xbfs_engine.core.limits import MIB
from xbfs_engine.restore.batches import Batch, ChunkPart, batches
from xbfs_engine.storage.files import AtomicOutput, storage_error
from xbfs_engine.storage.waiting import in_thread, while_answering
from xbfs_engine.store.reader import ChunkReader

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from xbfs_engine.catalog.restore_point import DiskRecord, RestorePoint
    from xbfs_engine.codec.compress import Buffer
    from xbfs_engine.codec.wire import Value
    from xbfs_engine.formats.segments import Layout
    from xbfs_engine.store.reader import Locator
    from xbfs_engine.store.repository import Repository

REPORT_INTERVAL_S: Final = 0.2
_ZEROS: Final = bytes(MIB)


class ExportProgress(NamedTuple):
    """An export at one moment. ``written_bytes`` of about ``data_bytes`` (exact to 1 MiB per run of data)."""

    written_bytes: int
    data_bytes: int
    elapsed_s: float


@dataclass(frozen=True, slots=True)
class ExportStatistics:
    """What an export did. ``image_bytes`` is the file's size, ``written_bytes`` what of it was not left a hole."""

    image_bytes: int
    written_bytes: int
    chunks: int
    elapsed_s: float

    def to_record(self) -> dict[str, Value]:
        """For --json."""
        return {
            "image_bytes": self.image_bytes,
            "written_bytes": self.written_bytes,
            "chunks": self.chunks,
            "elapsed_ms": int(self.elapsed_s * 1000),
        }


async def export_image(
    repository: Repository,
    point: RestorePoint,
    disk: DiskRecord,
    layout: Layout,
    path: Path,
    *,
    overwrite: bool = False,
    threads: int = 2,
    locator: Locator | None = None,
    report: Callable[[ExportProgress], None] | None = None,
) -> ExportStatistics:
    """Write the image as a sparse file: under its name only when complete and durable, else nothing is left.

    ``layout`` is the image format laid over ``disk`` (``image_layout``). ``locator`` finds chunks whose hints are
    stale. ``report`` is called in the event loop. Raises TargetExists, TargetUnwritable, StorageFull (of the target),
    IntegrityError (naming point, disk and place), KeyNotHeld, StorageError (of the repository).
    """
    with AtomicOutput(path, overwrite=overwrite) as output:
        output.set_size(layout.size_bytes)
        export = _Export(repository, point, disk, layout, _File(output), locator)
        await while_answering(repository.storage, partial(export.run, threads, report, abandon=False))
        await in_thread(output.commit)
    return export.statistics()


async def stream_image(
    repository: Repository,
    point: RestorePoint,
    disk: DiskRecord,
    layout: Layout,
    fd: int,
    *,
    threads: int = 2,
    locator: Locator | None = None,
    report: Callable[[ExportProgress], None] | None = None,
) -> ExportStatistics:
    """Write the whole image in order to an open descriptor: a pipe, a socket, or a file at its position.

    When cancelled, a thread may still hang in a write to a pipe nobody reads: the process should then end. Raises
    TargetUnwritable (also when the reader has gone), StorageFull, and the errors of reading as ``export_image``.
    """
    stream = _Stream(partial(_write_some, fd))
    export = _Export(repository, point, disk, layout, stream, locator)
    await _stream(export, stream, layout.size_bytes, threads, report)
    return export.statistics()


async def send_image(
    repository: Repository,
    point: RestorePoint,
    disk: DiskRecord,
    layout: Layout,
    write: Callable[[memoryview], object],
    *,
    size_bytes: int,
    threads: int = 2,
    locator: Locator | None = None,
    report: Callable[[ExportProgress], None] | None = None,
) -> ExportStatistics:
    """Give the whole image in order to ``write``, which blocks until it has taken all of a piece, in worker threads.

    Zeros follow the image up to ``size_bytes``. When cancelled, ``write`` may still be called once: let it fail. Raises
    what ``write`` raises, and the errors of reading as ``export_image``.
    """

    def write_all(view: memoryview) -> int:
        write(view)
        return view.nbytes

    stream = _Stream(write_all)
    export = _Export(repository, point, disk, layout, stream, locator)
    await _stream(export, stream, size_bytes, threads, report)
    return export.statistics()


async def _stream(
    export: _Export, stream: _Stream, size_bytes: int, threads: int, report: Callable[[ExportProgress], None] | None
) -> None:
    await while_answering(export.storage, partial(export.run, threads, report, abandon=True))
    try:
        await trio.to_thread.run_sync(stream.fill, size_bytes, abandon_on_cancel=True)
    except trio.Cancelled:
        stream.stop()
        raise


class _Sink(Protocol):
    """Where parts go. Called by worker threads."""

    def write(self, batch: Batch, parts: Sequence[tuple[int, Buffer]]) -> None:
        """Write the bytes of a batch, each at its place."""
        ...

    def stop(self) -> None:
        """Let nobody wait any longer."""
        ...


class _File:
    """A file that can be written in any order."""

    def __init__(self, output: AtomicOutput) -> None:
        self._output = output

    def write(self, batch: Batch, parts: Sequence[tuple[int, Buffer]]) -> None:
        run: list[Buffer] = []
        start = end = -1
        for at, data in parts:
            if run and at != end:
                self._output.write_all_at(start, run)
                run = []
            if not run:
                start = at
            run.append(data)
            end = at + memoryview(data).nbytes
        if run:
            self._output.write_all_at(start, run)

    def stop(self) -> None:
        pass


class _Stream:
    """What is written in order: whoever has a later batch waits for its turn, holding only that one.

    ``write_some`` writes the beginning of what it gets, and says how many bytes.
    """

    def __init__(self, write_some: Callable[[memoryview], int]) -> None:
        self._write_some = write_some
        self._position = 0
        self._turn = 0
        self._stopped = False
        self._changed = threading.Condition()

    def write(self, batch: Batch, parts: Sequence[tuple[int, Buffer]]) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._stopped or self._turn == batch.number)
            if self._stopped:
                return
        # Nobody else writes until the turn moves on, so the lock need not be held.
        for at, data in parts:
            self.fill(at)
            self._write(data)
        with self._changed:
            self._turn += 1
            self._changed.notify_all()

    def stop(self) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    def fill(self, end: int) -> None:
        """Zeros up to ``end``."""
        while self._position < end and not self._stopped:
            self._write(memoryview(_ZEROS)[: end - self._position])

    def _write(self, data: Buffer) -> None:
        view = memoryview(data)
        while view.nbytes and not self._stopped:
            written = self._write_some(view)
            view = view[written:]
            self._position += written


def _write_some(fd: int, view: memoryview) -> int:
    try:
        return os.write(fd, view)
    except BrokenPipeError as exc:
        raise TargetUnwritable("the program that reads the image has gone", hint="see why it ended") from exc
    except OSError as exc:
        error = storage_error(exc, "write the image")
        if isinstance(error, StorageFull):
            raise StorageFull(error.message, hint="free space there, or choose another place") from exc
        raise TargetUnwritable(error.message) from exc


class _Export:
    """One export in progress."""

    def __init__(
        self,
        repository: Repository,
        point: RestorePoint,
        disk: DiskRecord,
        layout: Layout,
        sink: _Sink,
        locator: Locator | None,
    ) -> None:
        self.storage = repository.storage
        self._reader = ChunkReader(repository.storage, repository.keys, locator)
        self._clock = repository.runtime.clock
        self._point = point
        self._disk = disk
        self._layout = layout
        self._sink = sink
        self._stopped = self._finished = False
        self._failure: BaseException | None = None
        self._lock = threading.Lock()
        self._written = self._chunks = 0
        self._started_s = self._clock.monotonic_s()
        self._elapsed_s = 0.0

    async def run(self, threads: int, report: Callable[[ExportProgress], None] | None, *, abandon: bool) -> None:
        """Write everything. ``abandon``: do not wait for threads when cancelled."""
        feed = self._feed()

        def work() -> None:
            try:
                while (batch := take()) is not None:
                    self._copy(batch)
            except BaseException as exc:  # noqa: BLE001 - handed to the task that waits for all workers
                self._failure = self._failure or exc
                self._stop()

        def take() -> Batch | None:
            with self._lock:
                return None if self._stopped else next(feed, None)

        limiter = trio.CapacityLimiter(threads)
        in_a_thread = partial(trio.to_thread.run_sync, abandon_on_cancel=True) if abandon else in_thread
        try:
            async with trio.open_nursery() as nursery:
                if report is not None:
                    nursery.start_soon(self._watch, report)
                async with trio.open_nursery() as workers:
                    workers.start_soon(self._stop_on_cancel)
                    async with trio.open_nursery() as pool:
                        for _ in range(threads):
                            pool.start_soon(partial(in_a_thread, work, limiter=limiter))
                    self._finished = True
                    workers.cancel_scope.cancel()
                nursery.cancel_scope.cancel()
        finally:
            self._elapsed_s = self._clock.monotonic_s() - self._started_s
        if self._failure is not None:
            raise self._placed(self._failure)
        if report is not None:
            report(self._progress())

    def statistics(self) -> ExportStatistics:
        """The outcome."""
        return ExportStatistics(self._layout.size_bytes, self._written, self._chunks, self._elapsed_s)

    def _feed(self) -> Iterator[Batch]:
        blockmap = BlockMap(NodeStore(self._reader), self._disk.root, self._disk.chunks)
        yield from batches(self._layout, blockmap, self._disk.chunk_size)

    def _copy(self, batch: Batch) -> None:
        """Read, check and write one batch."""
        wanted = [part for part in batch.parts if isinstance(part, ChunkPart)]
        try:
            fetched = self._reader.fetch([part.ref for part in wanted], ObjectKind.DATA_PACK) if wanted else []
        except IntegrityError as exc:
            last = batch.parts[-1]
            what = f"between bytes {batch.parts[0].at} and {last.at} of the image: {exc.message}"
            raise type(exc)(what, hint=exc.hint) from exc
        chunks = iter(fetched)
        parts: list[tuple[int, Buffer]] = []
        for part in batch.parts:
            if isinstance(part, ChunkPart):
                parts.append((part.at, self._cut(part, next(chunks))))
            else:
                parts.append((part.at, part.data))
        if self._stopped:
            return  # given up while it hung in a read: what it would write to may be another file by now
        self._sink.write(batch, parts)
        with self._lock:
            self._written += sum(memoryview(data).nbytes for _, data in parts)
            self._chunks += len(wanted)

    def _cut(self, part: ChunkPart, chunk: Buffer) -> Buffer:
        view = memoryview(chunk)
        if part.skip == 0 and part.length == view.nbytes:
            return chunk
        if part.skip + part.length > view.nbytes:
            raise ChunkCorrupt(f"chunk {part.ref.id.hex()[:16]} has {view.nbytes} bytes, fewer than its place needs")
        return view[part.skip : part.skip + part.length]

    def _stop(self) -> None:
        self._stopped = True
        self._sink.stop()

    async def _stop_on_cancel(self) -> None:
        """Threads can not be interrupted: tell them when the task is cancelled."""
        try:
            await trio.sleep_forever()
        finally:
            if not self._finished:
                self._stop()

    async def _watch(self, report: Callable[[ExportProgress], None]) -> None:
        while True:
            report(self._progress())
            await trio.sleep(REPORT_INTERVAL_S)

    def _progress(self) -> ExportProgress:
        return ExportProgress(self._written, self._disk.data_bytes, self._clock.monotonic_s() - self._started_s)

    def _placed(self, failure: BaseException) -> BaseException:
        """A failure that says which disk of which point could not be restored."""
        if not isinstance(failure, IntegrityError):
            return failure
        where = f"disk {self._disk.number} of restore point {self._point.id[:12]} ({self._point.vm_name})"
        placed = type(failure)(f"{where}: {failure.message}", hint=failure.hint)
        placed.__cause__ = failure
        return placed
