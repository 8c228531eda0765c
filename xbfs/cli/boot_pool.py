"""boot POINT --pool: the VM of a restore point runs on a pool, from a share of this machine, at once."""

from __future__ import annotations

import ipaddress
import os
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import trio

from xbfs.cli import tasks, text
from xbfs.cli.boot import boot, default_name, session_record
from xbfs.cli.context import catalog_of, index_of, point_of, repository_of
from xbfs.cli.points import ID_DIGITS
from xbfs.cli.pool import configured
from xbfs.fuse import mountpoint
from xbfs.instant import client
from xbfs.instant.pool.build import build, start
from xbfs.instant.pool.plan import BootPlan, BootWishes, plan_boot
from xbfs.instant.pool.record import Journal
from xbfs.instant.pool.tear_down import tear_down
from xbfs.instant.session import DiskFormat, Export, Session, SessionDisk
from xbfs.instant.share import address_towards, checked_clients
from xbfs.instant.state import state_of
from xbfs_engine.core.errors import ExportFailed, PoolError, UsageError, XbfsError
from xbfs_engine.core.runtime import system_runtime
from xbfs_engine.restore.vm.target import look_at
from xbfs_engine.source.xapi.session import open_pool

if TYPE_CHECKING:
    import argparse

    from xbfs.cli.output import Output
    from xbfs.instant.client import NfsShare, Running
    from xbfs_engine.catalog.restore_point import RestorePoint
    from xbfs_engine.core.runtime import Runtime
    from xbfs_engine.restore.vm.machine import MadeVm
    from xbfs_engine.source.xapi.config import Credentials, PoolConfig
    from xbfs_engine.store.repository import Repository

_NFS_PORT = 2049
"""The only one that SM asks (SM, nfs.py)."""
_UNDO_S = 300.0


class _Done(NamedTuple):
    made: MadeVm
    started: bool
    warning: str


def begin(arguments: argparse.Namespace, output: Output) -> None:
    """Begin a session, here or on a pool."""
    if arguments.pool is not None:
        boot_on_pool(arguments, output)
    else:
        _check_no_pool(arguments)
        boot(arguments, output)


def boot_on_pool(arguments: argparse.Namespace, output: Output) -> None:
    """Begin a session, and have its VM on the pool. Whatever fails leaves nothing, here or there."""
    _check(arguments)
    mountpoint.check_installed()
    config, secrets = configured(arguments.pool)
    repository = repository_of(arguments)
    catalog, index = catalog_of(repository, output), index_of(repository)
    point = point_of(catalog, arguments.point)
    plan = tasks.run(partial(_plan, arguments, config, secrets, point))
    session = _session(arguments, plan, repository.runtime)
    began = client.begin(repository, catalog, index, session)
    directory = state_of(repository.id, os.environ).session(session.name)
    journal = None
    try:
        place = _place(began.nfs, arguments.server or address_towards(plan.master))
        journal = Journal.begin(directory, plan.record)
        to_start = not arguments.no_start
        done = tasks.run(partial(_build, config, secrets, journal, plan, place, output, to_start=to_start))
    except BaseException as exc:
        _undo(repository, session.name, config, secrets, journal, output, exc)
        raise
    _tell(began, session, plan, done, output)


def _check_no_pool(arguments: argparse.Namespace) -> None:
    """Raises UsageError for wishes about a pool where none is named."""
    pool_only = (arguments.vm_name, arguments.sr_name, arguments.host, arguments.server)
    if any(wish is not None for wish in pool_only) or arguments.networks or arguments.isolated or arguments.no_start:
        raise UsageError(
            "--as, --sr-name, --host, --server, --network, --isolated and --no-start are about a VM on a pool",
            hint="name it with --pool POOL, or leave them out",
        )


def _check(arguments: argparse.Namespace) -> None:
    if arguments.export not in (None, Export.NFS.value) or arguments.format not in (None, DiskFormat.VHD.value):
        raise UsageError("a pool gets at disks by NFS, as VHD", hint="leave --export and --format out with --pool")
    if arguments.passthrough:
        raise UsageError("--passthrough is for raw disks, and a pool takes VHD", hint="leave it out with --pool")
    sources = [source for source, _ in arguments.networks]
    if len(set(sources)) != len(sources):
        raise UsageError("--network says twice where one network goes", hint="give it once")
    if arguments.server is not None:
        try:
            ipaddress.ip_address(arguments.server)
        except ValueError as exc:
            raise UsageError(f"--server: {exc}", hint="give an address of this machine that the hosts reach") from exc


async def _plan(
    arguments: argparse.Namespace, config: PoolConfig, secrets: Credentials, point: RestorePoint
) -> BootPlan:
    runtime = system_runtime()
    wishes = BootWishes(
        sr_name=arguments.sr_name,
        host=arguments.host,
        name=arguments.vm_name,
        disks=frozenset(arguments.disk or ()),
        networks=dict(arguments.networks),
        isolated=arguments.isolated,
    )
    async with open_pool(config, secrets, runtime) as pool:
        return plan_boot(point, await look_at(pool), wishes, config.name, runtime.random)


def _session(arguments: argparse.Namespace, plan: BootPlan, runtime: Runtime) -> Session:
    point = plan.vm.point
    clients = [host.address for host in plan.hosts] + arguments.client
    return Session(
        name=arguments.name or default_name(point.vm_name, runtime),
        point=point.id,
        vm_name=point.vm_name,
        created_ns=runtime.clock.now_ns(),
        export=Export.NFS,
        disks=tuple(SessionDisk(disk.number, DiskFormat.VHD, plan.path(disk.number)) for disk in plan.vm.disks),
        clients=tuple(dict.fromkeys(checked_clients(clients))),
        hydrate_bytes_s=arguments.hydrate,
    )


def _place(share: NfsShare | None, server: str) -> tuple[str, str]:
    if share is None or share.port != _NFS_PORT:
        where = "not at all" if share is None else f"at port {share.port}"
        raise ExportFailed(f"the session is served {where}, and hosts ask port {_NFS_PORT} alone")
    return server, share.path


async def _build(
    config: PoolConfig,
    secrets: Credentials,
    journal: Journal,
    plan: BootPlan,
    place: tuple[str, str],
    output: Output,
    *,
    to_start: bool,
) -> _Done:
    async with open_pool(config, secrets, system_runtime()) as pool:
        made = await build(pool, journal, plan, os.uname().nodename, place, output.say_now)
        if not to_start:
            return _Done(made, started=False, warning="")
        output.say_now("starting the VM")
        try:
            await start(pool, made.ref)
        except PoolError as exc:
            # The VM is there, and whoever looks at it finds out more than we could.
            return _Done(made, started=False, warning=f"the VM was not started: {exc.message}")
    return _Done(made, started=True, warning="")


def _undo(
    repository: Repository,
    name: str,
    config: PoolConfig,
    secrets: Credentials,
    journal: Journal | None,
    output: Output,
    why: BaseException,
) -> None:
    """Nothing stays; or the session does, with what can not be taken from the pool, and says so."""
    try:
        if journal is not None:
            trio.run(_tear_down, config, secrets, journal)
        client.discard(repository, name, force=True)
    except (XbfsError, trio.TooSlowError) as exc:
        output.warn(
            f"session {name} stays, for not all could be taken from pool {config.name}: {exc}",
            f"`xbfs boot discard {name} --force` takes the rest when the pool can be reached",
        )
        why.add_note(f"session {name} stays")


async def _tear_down(config: PoolConfig, secrets: Credentials, journal: Journal) -> None:
    with trio.fail_after(_UNDO_S):
        async with open_pool(config, secrets, system_runtime()) as pool:
            await tear_down(pool, journal, lambda _: None, force=True)


def _tell(began: Running, session: Session, plan: BootPlan, done: _Done, output: Output) -> None:
    made, record = done.made, plan.record
    lost = (*plan.vm.left_out, *made.lost)
    output.result(
        {
            "session": session_record(began),
            "pool": {
                "name": record.pool,
                "sr_uuid": record.sr_uuid,
                "vm": {"uuid": made.uuid, "name": plan.vm.name, "way": made.way, "started": done.started},
                "disks": [{"number": number, "vdi_uuid": uuid} for number, uuid in record.vdis.items()],
                "isolated": plan.isolated,
            },
            "not_restored": list(lost),
        }
    )
    point = plan.vm.point
    output.say(f"session {session.name}: {point.vm_name} as of {text.when(point.time_ns)}, {point.id[:ID_DIGITS]}")
    state = "is running" if done.started else "is halted"
    output.say(f"VM {plan.vm.name} {made.uuid} {state} on pool {record.pool}, from SR {plan.sr_name}")
    if plan.isolated:
        output.say("it has no network interface (--isolated)")
    if lost:
        output.say("what does not come back:")
    for one in lost:
        output.say(f"  {one}")
    if done.warning:
        output.warn(done.warning, f"start it: `xe vm-start uuid={made.uuid}`")
    output.say(f"`xbfs boot migrate {session.name} --to SR` makes it stay; `xbfs boot discard {session.name}` ends it")
