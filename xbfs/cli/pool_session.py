"""A session with a VM on a pool, as the commands make it that boot there; what fails leaves nothing, here or there."""

from __future__ import annotations

import ipaddress
import os
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import trio

from xbfs.cli import tasks
from xbfs.cli.boot import default_name
from xbfs.instant import client
from xbfs.instant.pool.build import build
from xbfs.instant.pool.plan import BootPlan, BootWishes, plan_boot
from xbfs.instant.pool.record import Journal
from xbfs.instant.pool.tear_down import tear_down
from xbfs.instant.session import DiskFormat, Export, Session, SessionDisk
from xbfs.instant.share import address_towards, checked_clients
from xbfs.instant.state import state_of
from xbfs_engine.core.errors import ExportFailed, SessionNotFound, UsageError, XbfsError
from xbfs_engine.core.runtime import system_runtime
from xbfs_engine.restore.vm.target import look_at
from xbfs_engine.source.xapi.session import open_pool

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from xbfs.cli.output import Output
    from xbfs.instant.client import NfsShare, Running
    from xbfs_engine.catalog.catalog import Catalog
    from xbfs_engine.catalog.restore_point import RestorePoint
    from xbfs_engine.restore.vm.machine import MadeVm
    from xbfs_engine.source.xapi.config import Credentials, PoolConfig
    from xbfs_engine.source.xapi.session import Pool, Ref
    from xbfs_engine.store.index import ChunkIndex
    from xbfs_engine.store.repository import Repository

_NFS_PORT = 2049
"""The only one that SM asks (SM, nfs.py)."""
_UNDO_S = 300.0


def check_server(address: str | None) -> None:
    """Raises UsageError for a --server that is no address."""
    if address is not None:
        try:
            ipaddress.ip_address(address)
        except ValueError as exc:
            raise UsageError(f"--server: {exc}", hint="give an address of this machine that the hosts reach") from exc


class Wanted(NamedTuple):
    """``name``: of the session, None for one like the VM's. ``server``: how hosts reach this machine, None for how it
    reaches them. ``clients``: who may mount beside the hosts."""

    wishes: BootWishes
    name: str | None = None
    server: str | None = None
    clients: Sequence[str] = ()
    hydrate_bytes_s: int | None = None


class OnPool(NamedTuple):
    """What was begun."""

    running: Running
    session: Session
    plan: BootPlan
    journal: Journal
    made: MadeVm


@dataclass(frozen=True, slots=True)
class PoolSessions:
    """Makes them on one pool."""

    repository: Repository
    catalog: Catalog
    index: ChunkIndex
    config: PoolConfig
    secrets: Credentials
    output: Output

    def begin(
        self, point: RestorePoint, wanted: Wanted, then: Callable[[Pool, Ref], Awaitable[None]] | None = None
    ) -> OnPool:
        """A session and its VM, halted; ``then`` gets that while all is taken back should it fail."""
        plan = tasks.run(partial(self._plan, point, wanted.wishes))
        session = self._session(plan, wanted)
        running = client.begin(self.repository, self.catalog, self.index, session)
        journal = None
        try:
            place = _place(running.nfs, wanted.server or address_towards(plan.master))
            journal = Journal.begin(state_of(self.repository.id, os.environ).session(session.name), plan.record)
            made = tasks.run(partial(self._build, journal, plan, place, then))
        except BaseException as exc:
            if not self.end(session.name, journal):
                exc.add_note(f"session {session.name} stays")
            raise
        return OnPool(running, session, plan, journal, made)

    def end(self, name: str, journal: Journal | None) -> bool:
        """Nothing stays; or the session does, with what can not be taken from the pool, and it is said."""
        try:
            if journal is not None:
                tasks.finish(partial(self._tear_down, journal))
            with suppress(SessionNotFound):  # somebody was faster
                client.discard(self.repository, name, force=True)
        except (XbfsError, trio.TooSlowError) as exc:
            why = exc.message if isinstance(exc, XbfsError) else f"it took longer than {_UNDO_S:.0f} s"
            self.output.warn(
                f"session {name} stays, for not all could be taken from pool {self.config.name}: {why}",
                f"`xbfs boot discard {name} --force` takes the rest when the pool can be reached",
            )
            return False
        return True

    async def _plan(self, point: RestorePoint, wishes: BootWishes) -> BootPlan:
        runtime = system_runtime()
        async with open_pool(self.config, self.secrets, runtime) as pool:
            return plan_boot(point, await look_at(pool), wishes, self.config.name, runtime.random)

    def _session(self, plan: BootPlan, wanted: Wanted) -> Session:
        point, runtime = plan.vm.point, self.repository.runtime
        clients = [host.address for host in plan.hosts] + list(wanted.clients)
        return Session(
            name=wanted.name or default_name(point.vm_name, runtime),
            point=point.id,
            vm_name=point.vm_name,
            created_ns=runtime.clock.now_ns(),
            export=Export.NFS,
            disks=tuple(SessionDisk(disk.number, DiskFormat.VHD, plan.path(disk.number)) for disk in plan.vm.disks),
            clients=tuple(dict.fromkeys(checked_clients(clients))),
            hydrate_bytes_s=wanted.hydrate_bytes_s,
        )

    async def _build(
        self,
        journal: Journal,
        plan: BootPlan,
        place: tuple[str, str],
        then: Callable[[Pool, Ref], Awaitable[None]] | None,
    ) -> MadeVm:
        async with open_pool(self.config, self.secrets, system_runtime()) as pool:
            made = await build(pool, journal, plan, os.uname().nodename, place, self.output.say_now)
            if then is not None:
                await then(pool, made.ref)
            return made

    async def _tear_down(self, journal: Journal) -> None:
        with trio.fail_after(_UNDO_S):
            async with open_pool(self.config, self.secrets, system_runtime()) as pool:
                await tear_down(pool, journal, lambda _: None, force=True)


def _place(share: NfsShare | None, server: str) -> tuple[str, str]:
    if share is None or share.port != _NFS_PORT:
        where = "not at all" if share is None else f"at port {share.port}"
        raise ExportFailed(f"the session is served {where}, and hosts ask port {_NFS_PORT} alone")
    return server, share.path
