"""One backup run: the disks of one VM become one restore point.

Nothing is visible before the manifest is put; an interrupted run leaves packs and index blobs that later runs may
deduplicate against.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING

from xbfs_engine.catalog.blockmap import NodeStore
from xbfs_engine.catalog.mapwriter import MapWriter
from xbfs_engine.catalog.restore_point import DiskRecord, ReadStatistics, RestorePoint, RunRecord
from xbfs_engine.core.errors import DiskShrunk, NoBasePoint, PointNotFound, UsageError
from xbfs_engine.core.ids import PointId
from xbfs_engine.core.limits import LEAF_FANOUT
from xbfs_engine.core.log import Logger
from xbfs_engine.ingest.assembler import DataMap, MapAssembler
from xbfs_engine.ingest.pipeline import run_pipeline
from xbfs_engine.ingest.planner import chunk_runs, grown_edge, plan
from xbfs_engine.ingest.statistics import Progress, WorkerCounters, stage_seconds, total
from xbfs_engine.ingest.worker import Worker
from xbfs_engine.storage.waiting import in_thread, while_answering
from xbfs_engine.store.reader import ChunkReader
from xbfs_engine.store.session import WriteSession

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence

    from xbfs_engine.catalog.catalog import Catalog
    from xbfs_engine.codec.wire import Value
    from xbfs_engine.ingest.planner import Segment
    from xbfs_engine.source.base import DiskSource, Extent
    from xbfs_engine.store.index import ChunkIndex
    from xbfs_engine.store.repository import Repository
    from xbfs_engine.store.session import MetadataWriter

SECOND_NS = 1_000_000_000
THREADS_MAX = 4
"""More cores are not used by one run: packs are buffered per worker, and memory stays within its bound."""

_log = Logger("xbfs.backup")


@dataclass(frozen=True, slots=True)
class DiskJob:
    """One disk to back up. ``changed``: extents that may differ from the base point, or None to read all data."""

    number: int
    name: str
    vdi_uuid: str
    source: DiskSource
    changed: Sequence[Extent] | None
    reason: str


@dataclass(frozen=True, slots=True)
class BackupRequest:
    """What to back up. ``base``: the point that ``changed`` is relative to; None means the VM's newest.

    ``carried``: by number, disks that are taken over from the base point as they are, and why. ``time_ns``: of what
    moment the disks are; None means when the run begins.
    ``before_commit``: awaited when all is stored but the manifest; if it raises, there is no point.
    """

    vm_name: str
    vm_uuid: str
    disks: Sequence[DiskJob]
    node: str
    program: str
    vm: dict[str, Value]
    base: PointId | None = None
    new_chain: bool = False
    threads: int | None = None
    before_commit: Callable[[], Awaitable[None]] | None = None
    carried: Mapping[int, str] = field(default_factory=dict)
    time_ns: int | None = None


class BackupRun:
    """Runs one request. ``report`` is called about five times a second from the event loop."""

    def __init__(
        self,
        repository: Repository,
        catalog: Catalog,
        index: ChunkIndex,
        request: BackupRequest,
        report: Callable[[Progress], None],
    ) -> None:
        self._repository = repository
        self._catalog = catalog
        self._request = request
        self._report = report
        self._session = WriteSession(repository, index)
        self._nodes = NodeStore(ChunkReader(repository.storage, repository.keys, index))
        self._index = index

    async def run(self) -> RestorePoint:
        """Back up and commit. Raises SourceError, StorageError, NoBasePoint, DiskShrunk; then no point exists."""
        return await while_answering(self._repository.storage, self._run)

    async def _run(self) -> RestorePoint:
        clock = self._repository.runtime.clock
        started_ns, started = clock.now_ns(), clock.monotonic_s()
        await in_thread(self._prepare)
        base = self._base_point()
        metadata = self._session.metadata_writer()
        jobs = sorted(self._request.disks, key=lambda job: job.number)
        disks = [await self._back_up_disk(job, base, metadata) for job in jobs]
        disks += [self._carried(base, number, reason) for number, reason in self._request.carried.items()]
        await in_thread(metadata.finish)
        for job in self._request.disks:
            job.source.check_unchanged()
        point = RestorePoint(
            id=PointId(""),
            vm_uuid=self._request.vm_uuid,
            vm_name=self._request.vm_name,
            time_ns=self._free_time(self._request.time_ns or started_ns),
            parent=base.id if base else None,
            disks=tuple(sorted(disks, key=lambda disk: disk.number)),
            run=RunRecord(
                program=self._request.program,
                node=self._request.node,
                started_ns=started_ns,
                elapsed_ms=int((clock.monotonic_s() - started) * 1000),
                stored_bytes=self._session.stored_bytes,
                metadata_bytes=self._session.metadata_bytes,
                packs=self._session.packs,
            ),
            vm=self._request.vm,
        )
        if self._request.before_commit is not None:
            await self._request.before_commit()
        return await in_thread(self._catalog.commit, point)

    def _prepare(self) -> None:
        numbers = [*(job.number for job in self._request.disks), *self._request.carried]
        if not self._request.disks or len(set(numbers)) != len(numbers):
            raise UsageError(f"a run needs disks with different numbers, got {numbers}")
        self._catalog.refresh()
        self._index.refresh()

    def _base_point(self) -> RestorePoint | None:
        """The point this run continues."""
        request = self._request
        if request.new_chain:
            return None
        if request.base is None:
            return self._catalog.latest(request.vm_uuid)
        base = next((point for point in self._catalog.points() if point.id == request.base), None)
        if base is None or base.vm_uuid != request.vm_uuid:
            raise PointNotFound(f"restore point {request.base[:12]} is not one of {request.vm_name!r}")
        return base

    def _base_disk(self, job: DiskJob, base: RestorePoint | None) -> DiskRecord | None:
        """The disk as the base point has it, checked for what the job asks."""
        disk = base.disk(job.number) if base else None
        if disk is None:
            if job.changed is not None:
                raise NoBasePoint(
                    f"disk {job.number} of {self._request.vm_name!r} is in no earlier point, so a delta has no base"
                )
            return None
        if job.source.size_bytes < disk.size_bytes:
            raise DiskShrunk(
                f"disk {job.number} of {self._request.vm_name!r} has {job.source.size_bytes} bytes; "
                f"it had {disk.size_bytes} in restore point {base.id[:12] if base else ''}"
            )
        if job.changed is not None and disk.vdi_uuid != job.vdi_uuid:
            raise NoBasePoint(
                f"disk {job.number} of {self._request.vm_name!r} is VDI {job.vdi_uuid}, in the base point it is VDI "
                f"{disk.vdi_uuid}: a bitmap of one says nothing about the other"
            )
        if disk.chunk_size != self._repository.parameters.chunk_size:
            if job.changed is not None:
                raise NoBasePoint("the base point was written with another chunk size")
            return None
        return disk

    async def _back_up_disk(
        self, job: DiskJob, base_point: RestorePoint | None, metadata: MetadataWriter
    ) -> DiskRecord:
        parameters = self._repository.parameters
        keys = self._repository.keys
        size, chunk_size = job.source.size_bytes, parameters.chunk_size
        base = self._base_disk(job, base_point)
        carry = job.changed is not None
        open_map = partial(
            MapWriter,
            self._nodes,
            metadata,
            keys.node_id,
            base=base.root if base else None,
            carry=carry,
            chunks=-(-size // chunk_size),
        )
        maps = await in_thread(open_map)
        data_map = DataMap(size, chunk_size, base.data_map.bits() if base and carry else b"")
        assembler = MapAssembler(maps, data_map)
        workers = [
            Worker(self._session, keys.chunk_id, chunk_size=chunk_size, level=parameters.compression_level)
            for _ in range(self._request.threads or min(THREADS_MAX, len(os.sched_getaffinity(0))))
        ]
        planned, extents = await in_thread(_planned, job, base, chunk_size)
        job.source.read_ahead(_reads(plan(extents(), size, chunk_size), size, chunk_size))
        counters = [worker.counters for worker in workers]
        await run_pipeline(
            plan(extents(), size, chunk_size),
            job.source,
            maps,
            assembler,
            workers,
            carry=carry,
            report=lambda: self._tell(job, planned, counters),
        )
        root = await in_thread(maps.finish)
        return DiskRecord(
            number=job.number,
            name=job.name,
            vdi_uuid=job.vdi_uuid,
            size_bytes=size,
            chunk_size=chunk_size,
            root=root,
            data_map=data_map.map(),
            method="cbt" if carry else "full",
            reason=job.reason,
            statistics=total(counters),
        )

    def _carried(self, base: RestorePoint | None, number: int, reason: str) -> DiskRecord:
        """A disk of the base point of which nothing is read."""
        disk = base.disk(number) if base else None
        if disk is None:
            raise NoBasePoint(f"disk {number} of {self._request.vm_name!r} is in no earlier point, to be taken over")
        return replace(disk, method="cbt", reason=reason, statistics=ReadStatistics(0, 0, 0, 0, 0))

    def _tell(self, job: DiskJob, planned_bytes: int, counters: Sequence[WorkerCounters]) -> None:
        self._report(
            Progress(job.number, planned_bytes, total(counters), self._session.stored_bytes, stage_seconds(counters))
        )

    def _free_time(self, now_ns: int) -> int:
        """The point's time: later than every point of this VM, and in a second of its own.

        Names in the mount have seconds; and the newest point must be the last one by time, whatever clocks say.
        """
        latest = self._catalog.latest(self._request.vm_uuid)
        if latest is None or now_ns // SECOND_NS > latest.time_ns // SECOND_NS:
            return now_ns
        if latest.time_ns - now_ns > 60 * SECOND_NS:
            _log.warning("clock is behind the newest restore point", point=latest.id, behind_ns=latest.time_ns - now_ns)
        return (latest.time_ns // SECOND_NS + 1) * SECOND_NS


def _planned(job: DiskJob, base: DiskRecord | None, chunk_size: int) -> tuple[int, Callable[[], Iterator[Extent]]]:
    """Bytes that will be read, and where the extents come from (asked again: they are not kept)."""
    size = job.source.size_bytes
    source: Callable[[], Iterator[Extent]]
    if job.changed is None:
        source = job.source.data_extents
    else:
        edge = grown_edge(base.size_bytes, size, chunk_size) if base else []
        listed = sorted([*job.changed, *edge])
        source = listed.__iter__
    planned = sum(
        min(end * chunk_size, size) - first * chunk_size for first, end in chunk_runs(source(), size, chunk_size)
    )
    return planned, source


def _reads(segments: Iterator[Segment], size_bytes: int, chunk_size: int) -> Iterator[Extent]:
    """The reads that workers make of these segments: one for each run, see ``ingest.worker``."""
    for segment in segments:
        for first, count in segment.runs:
            start = (segment.leaf * LEAF_FANOUT + first) * chunk_size
            yield start, min(start + count * chunk_size, size_bytes) - start
