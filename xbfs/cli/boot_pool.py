"""boot POINT --pool: the VM of a restore point runs on a pool, from a share of this machine, at once."""

from __future__ import annotations

from typing import TYPE_CHECKING

from xbfs.cli import text
from xbfs.cli.boot import boot, check_may_serve_nfs, session_record
from xbfs.cli.context import catalog_of, index_of, point_of, repository_of
from xbfs.cli.points import ID_DIGITS
from xbfs.cli.pool import configured
from xbfs.cli.pool_session import PoolSessions, Wanted, check_server
from xbfs.fuse import mountpoint
from xbfs.instant.pool.build import start
from xbfs.instant.pool.plan import BootWishes
from xbfs.instant.session import DiskFormat, Export
from xbfs_engine.core.errors import PoolError, UsageError

if TYPE_CHECKING:
    import argparse

    from xbfs.cli.output import Output
    from xbfs.cli.pool_session import OnPool
    from xbfs_engine.source.xapi.session import Pool, Ref


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
    check_may_serve_nfs()
    mountpoint.check_installed()
    config, secrets = configured(arguments.pool)
    repository = repository_of(arguments)
    catalog, index = catalog_of(repository, output), index_of(repository)
    point = point_of(catalog, arguments.point)
    starter = _Starter(output)
    begun = PoolSessions(repository, catalog, index, config, secrets, output).begin(
        point, _wanted(arguments), None if arguments.no_start else starter.start
    )
    _tell(begun, output, started=starter.has_started, warning=starter.warning)


class _Starter:
    """Starts a VM; that it does not start is told, and undoes nothing."""

    def __init__(self, output: Output) -> None:
        self._output = output
        self.has_started = False
        self.warning = ""

    async def start(self, pool: Pool, vm: Ref) -> None:
        self._output.say_now("starting the VM")
        try:
            await start(pool, vm)
        except PoolError as exc:
            # The VM is there, and whoever looks at it finds out more than we could.
            self.warning = f"the VM was not started: {exc.message}"
        else:
            self.has_started = True


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
    check_server(arguments.server)


def _wanted(arguments: argparse.Namespace) -> Wanted:
    wishes = BootWishes(
        sr_name=arguments.sr_name,
        host=arguments.host,
        name=arguments.vm_name,
        disks=frozenset(arguments.disk or ()),
        networks=dict(arguments.networks),
        isolated=arguments.isolated,
    )
    return Wanted(wishes, arguments.name, arguments.server, arguments.client, arguments.hydrate)


def _tell(begun: OnPool, output: Output, *, started: bool, warning: str) -> None:
    session, plan, made, record = begun.session, begun.plan, begun.made, begun.plan.record
    lost = (*plan.vm.left_out, *made.lost)
    output.result(
        {
            "session": session_record(begun.running),
            "pool": {
                "name": record.pool,
                "sr_uuid": record.sr_uuid,
                "vm": {"uuid": made.uuid, "name": plan.vm.name, "way": made.way, "started": started},
                "disks": [{"number": number, "vdi_uuid": uuid} for number, uuid in record.vdis.items()],
                "isolated": plan.isolated,
            },
            "not_restored": list(lost),
        }
    )
    point = plan.vm.point
    output.say(f"session {session.name}: {point.vm_name} as of {text.when(point.time_ns)}, {point.id[:ID_DIGITS]}")
    state = "is running" if started else "is halted"
    output.say(f"VM {plan.vm.name} {made.uuid} {state} on pool {record.pool}, from SR {plan.sr_name}")
    if plan.isolated:
        output.say("its network interfaces are in a network of their own, which leads nowhere (--isolated)")
    if lost:
        output.say("what does not come back:")
    for one in lost:
        output.say(f"  {one}")
    if warning:
        output.warn(warning, f"start it: `xe vm-start uuid={made.uuid}`")
    output.say(f"`xbfs boot migrate {session.name} --to SR` makes it stay; `xbfs boot discard {session.name}` ends it")
