"""Boot tests on a pool: isolated VMs there, over disks that are served from here."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import trio

from xbfs.cli.boot import check_may_serve_nfs
from xbfs.cli.boot_test_ground import Ground
from xbfs.cli.pool import configured
from xbfs.cli.pool_session import Wanted, check_server
from xbfs.instant import client
from xbfs.instant.boottest.choose import BIOS, recorded_firmware
from xbfs.instant.boottest.on_pool import ACCELERATOR, Usage, examine_on_pool
from xbfs.instant.pool.plan import BootWishes
from xbfs_engine.core.errors import UsageError, XbfsError
from xbfs_engine.core.runtime import system_runtime
from xbfs_engine.restore.vm.calls import patiently
from xbfs_engine.source.xapi.session import open_pool

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable
    from contextlib import ExitStack

    from xbfs.cli.boot_test_ground import Trial
    from xbfs.cli.pool_session import OnPool, PoolSessions
    from xbfs.instant.boottest.verdict import Observed
    from xbfs_engine.catalog.boottests import BootTest
    from xbfs_engine.catalog.restore_point import RestorePoint
    from xbfs_engine.source.xapi.config import Credentials, PoolConfig
    from xbfs_engine.source.xapi.session import Pool, Ref

_METER_S: Final = 5.0
_OF_QEMU: Final = ("accel", "firmware", "bus", "memory")


def login(arguments: argparse.Namespace) -> tuple[PoolConfig, Credentials]:
    """The pool, and what to log in with. Raises UsageError for what a pool has not, PoolUnknown, CredentialsUnsafe."""
    if any(getattr(arguments, name) is not None for name in _OF_QEMU):
        raise UsageError("--accel, --firmware, --bus and --memory are about QEMU", hint="leave them out with --pool")
    if arguments.marker is not None:
        raise UsageError(
            "a pool shows no serial console, where --marker would come",
            hint="leave it out: the guest's agent decides, where there is one",
        )
    check_server(arguments.server)
    check_may_serve_nfs()
    return configured(arguments.pool)


@dataclass(frozen=True, slots=True)
class There(Ground):
    """On the pool of ``on_pool``."""

    on_pool: PoolSessions

    def prepare(self, point: RestorePoint, sessions: ExitStack) -> Trial:
        """A session with a VM that is halted, in a network that leads nowhere."""
        arguments = self.arguments
        wishes = BootWishes(host=arguments.host, name=f"{point.vm_name} (boot test)", isolated=True)
        begun = self.on_pool.begin(point, Wanted(wishes, self.session_name(point), arguments.server), _unprotect)
        if not arguments.keep:
            sessions.callback(self.on_pool.end, begun.session.name, begun.journal)
        what = self.examination(point, ACCELERATOR, recorded_firmware(point.vm) or BIOS)

        async def trial(report: Callable[[Observed], None]) -> BootTest:
            ground = self.on_pool
            async with open_pool(ground.config, ground.secrets, system_runtime()) as pool:
                clock = self.repository.runtime.clock
                return await examine_on_pool(what, pool, begun.made.ref, _Meter(self, begun).read, clock, report)

        return trial


async def _unprotect(pool: Pool, vm: Ref) -> None:
    """What the original is protected from, starting among it, is no wish about its copy."""
    await patiently(pool, "VM.set_blocked_operations", vm, {})


class _Meter:
    """What a session's disks have seen."""

    def __init__(self, ground: Ground, begun: OnPool) -> None:
        self._repository = ground.repository
        self._name = begun.session.name
        self._turn = trio.CapacityLimiter(1)  # a thread that hangs is one, not one more each time

    async def read(self) -> Usage | None:
        """As it is now; None if the live server does not tell soon."""
        with trio.move_on_after(_METER_S):
            return await trio.to_thread.run_sync(self._read, abandon_on_cancel=True, limiter=self._turn)
        return None

    def _read(self) -> Usage | None:
        with suppress(XbfsError):
            for running in client.running(self._repository):
                if running.name == self._name and running.is_served:
                    return Usage(running.read_bytes, running.dirty_bytes)
        return None
