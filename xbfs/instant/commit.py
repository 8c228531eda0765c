"""A session's disks become a restore point: frozen by the live server, read here, where they differ from the session's
own point. Keeps no state.

The new point's parent is the point the session was made from, also for a second commit: what was written before the
first one is read again, and found in the repository. Nothing exists before the manifest is put, and the freeze ends
with this process.
"""

from __future__ import annotations

import os
from contextlib import AsyncExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from xbfs.control import wire
from xbfs.instant import sessions
from xbfs.instant.client import connected
from xbfs.instant.freezing import changed_of
from xbfs.instant.state import state_of
from xbfs_engine.core.errors import CommitRefused, PointNotFound, SourceError, SourceUnreadable
from xbfs_engine.ingest.backup import BackupRequest, BackupRun, DiskJob
from xbfs_engine.ingest.planner import chunk_runs
from xbfs_engine.ingest.vm.base import KEY, base_of
from xbfs_engine.source.image import ImageSource
from xbfs_engine.source.xapi.ledger import Ledgers, state_directory
from xbfs_engine.storage.waiting import in_thread

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from xbfs.control.client import Control
    from xbfs.instant.session import Session
    from xbfs.instant.state import StateDirectory
    from xbfs_engine.catalog.catalog import Catalog
    from xbfs_engine.catalog.restore_point import DiskRecord, RestorePoint
    from xbfs_engine.codec.wire import Value
    from xbfs_engine.ingest.statistics import Progress
    from xbfs_engine.source.base import Extent
    from xbfs_engine.store.index import ChunkIndex
    from xbfs_engine.store.repository import Repository

_TURNS: Final = "commits"
"""Below the state directory: who commits a session of a VM."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What a commit of ``session`` would read: ``read_bytes`` by number of each of its disks. ``base``: the parent."""

    session: Session
    base: RestorePoint
    read_bytes: dict[int, int]


class _Frozen:
    """The frozen disks of a session, for as long as the connection stands that asked for them."""

    def __init__(self, control: Control, name: str) -> None:
        self._control = control
        self._name = name
        answer = control.ask(wire.Request("freeze", {"name": name}))
        match answer:
            case {"directory": str() as directory, "time_ns": int() as time_ns}:
                self.time_ns = time_ns
                self._directory = Path(directory)
            case _:
                raise wire.not_understood()

    def source(self, number: int) -> ImageSource:
        """A disk. Raises SourceUnreadable."""
        return ImageSource(self._directory / f"{number}.raw")

    def changed(self, number: int) -> list[Extent]:
        """Where a disk is not the point's. Raises SourceUnreadable."""
        path = self._directory / f"{number}.changed"
        try:
            return changed_of(path.read_bytes())
        except OSError as exc:
            raise SourceUnreadable(f"{path} can not be read: {exc.strerror}") from exc

    def check(self) -> None:
        """Raises why the disks can not be read any more."""
        self._control.ask(wire.Request("frozen", {"name": self._name}))


def plan(repository: Repository, catalog: Catalog, name: str) -> Plan:
    """What a commit would read now. Blocks; raises as ``commit``."""
    state, session, base = _found(repository, catalog, name)
    chunk_size = repository.parameters.chunk_size
    with _frozen(state, name) as frozen:
        read_bytes: dict[int, int] = {}
        for disk in session.disks:
            source = frozen.source(disk.number)
            try:
                size = source.size_bytes
                _refuse_shrunk(base, disk.number, size)
                runs = chunk_runs(frozen.changed(disk.number), size, chunk_size)
                read_bytes[disk.number] = sum(min(end * chunk_size, size) - first * chunk_size for first, end in runs)
            finally:
                source.close()
    return Plan(session, base, read_bytes)


async def commit(
    repository: Repository,
    catalog: Catalog,
    index: ChunkIndex,
    name: str,
    *,
    program: str,
    report: Callable[[Progress], None],
) -> RestorePoint:
    """The new restore point of a session's VM, of the moment of the freeze. ``report`` as ``BackupRun`` has it.

    Raises SessionNotFound, LiveServerDown, SessionBusy while another commit of it runs, CommitRefused, PointNotFound,
    SourceError, StorageError; then there is no new point.
    """
    state, session, base = await in_thread(_found, repository, catalog, name)
    async with AsyncExitStack() as stack:
        for ledgers in _turns(state, repository):
            if not await stack.enter_async_context(ledgers.turn(base.vm_uuid)):
                raise CommitRefused(
                    f"{base.vm_name!r} is being backed up on this node, or another of its sessions committed",
                    hint="wait until that has ended, then run again",
                )
        frozen = await in_thread(stack.enter_context, _frozen(state, name))
        jobs = await in_thread(_jobs, stack, frozen, session, base)

        async def still_frozen() -> None:
            await in_thread(frozen.check)

        request = BackupRequest(
            vm_name=base.vm_name,
            vm_uuid=base.vm_uuid,
            disks=jobs,
            node=os.uname().nodename,
            program=program,
            vm=_without_bases(base.vm),
            base=base.id,
            before_commit=still_frozen,
            carried=_carried(session, base),
            time_ns=frozen.time_ns,
        )
        return await BackupRun(repository, catalog, index, request, report).run()


@contextmanager
def _frozen(state: StateDirectory, name: str) -> Iterator[_Frozen]:
    """A session frozen until left. Raises what the server answers; LiveServerDown, also if it goes away meanwhile."""
    with connected(state) as control:
        frozen = _Frozen(control, name)
        try:
            yield frozen
        except SourceError:
            frozen.check()  # which knows better why the disks can not be read
            raise


def _found(repository: Repository, catalog: Catalog, name: str) -> tuple[StateDirectory, Session, RestorePoint]:
    """A session, and the point it was made from. Raises SessionNotFound, PointNotFound, IntegrityError."""
    state = state_of(repository.id, os.environ)
    session = sessions.load(state, name)
    with suppress(PointNotFound):
        return state, session, catalog.find(session.point)
    catalog.refresh()
    return state, session, catalog.find(session.point)


def _turns(state: StateDirectory, repository: Repository) -> list[Ledgers]:
    """Who else makes points of the VM takes turns there; which pool it is of is not asked."""
    pools = sorted((state_directory(os.environ) / "pools").glob("*/runs"))
    return [Ledgers(directory, repository.runtime) for directory in (state.path / _TURNS, *pools)]


def _jobs(stack: AsyncExitStack, frozen: _Frozen, session: Session, base: RestorePoint) -> Sequence[DiskJob]:
    """The disks of the session; their sources are closed by ``stack``."""
    jobs: list[DiskJob] = []
    for disk in session.disks:
        source = frozen.source(disk.number)
        stack.callback(source.close)
        old = _refuse_shrunk(base, disk.number, source.size_bytes)
        reason = f"commit of session {session.name}: what was written since {base.id[:12]}"
        jobs.append(DiskJob(disk.number, old.name, old.vdi_uuid, source, frozen.changed(disk.number), reason))
    return jobs


def _refuse_shrunk(base: RestorePoint, number: int, size_bytes: int) -> DiskRecord:
    """The disk as the point has it. Raises CommitRefused if it is smaller now: maps of points only grow."""
    old = base.disk(number)
    if old is None:
        raise PointNotFound(f"restore point {base.id[:12]} has no disk {number}")
    if size_bytes < old.size_bytes:
        raise CommitRefused(
            f"disk {number} has {size_bytes} bytes, and {old.size_bytes} in the restore point: it was shrunk",
            hint="give it the old size again, or copy the disk and use `xbfs backup image --new-chain`",
        )
    return old


def _carried(session: Session, base: RestorePoint) -> dict[int, str]:
    """Disks of the point that the session does not have."""
    ours = {disk.number for disk in session.disks}
    reason = f"not in session {session.name}: as in {base.id[:12]}"
    return {disk.number: reason for disk in base.disks if disk.number not in ours}


def _without_bases(vm: dict[str, Value]) -> dict[str, Value]:
    """What is known of the VM, but for snapshots on a pool: what changed there since is no delta of this point."""
    rest = {name: value for name, value in vm.items() if name != KEY}
    xen = base_of(vm)
    return rest if xen is None else {**rest, KEY: replace(xen, snapshots={}).to_record()}
