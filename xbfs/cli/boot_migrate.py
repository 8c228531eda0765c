"""boot migrate: the VM of a session moves to an SR of its pool, and the session ends."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from xbfs.cli import tasks, text
from xbfs.cli.boot_pool_end import have_it_served, journal_of
from xbfs.cli.context import repository_of
from xbfs.cli.pool import configured
from xbfs.instant import client
from xbfs.instant.pool.migrate import Listener
from xbfs.instant.pool.migrate import migrate as move
from xbfs_engine.core.errors import SessionNotFound, UsageError
from xbfs_engine.core.runtime import system_runtime
from xbfs_engine.source.xapi.session import open_pool

if TYPE_CHECKING:
    import argparse

    from xbfs.cli.output import Output
    from xbfs.instant.pool.migrate import Migrated
    from xbfs.instant.pool.record import Journal
    from xbfs_engine.source.xapi.config import Credentials, PoolConfig


def migrate(arguments: argparse.Namespace, output: Output) -> None:
    """Move its disks, then forget its SR and throw the session away."""
    repository = repository_of(arguments)
    name = arguments.name
    if all(running.name != name for running in client.running(repository)):
        raise SessionNotFound(f"there is no session {name}")
    journal = journal_of(repository, name)
    if journal is None:
        raise UsageError(f"session {name} has no VM on a pool", hint="`xbfs boot POINT --pool POOL` begins such a one")
    config, secrets = configured(journal.record.pool)
    have_it_served(repository, output)
    done = tasks.run(partial(_migrate, config, secrets, journal, arguments.to, output))
    output.clear_status()
    client.discard(repository, name, force=True)
    disks = [{"number": number, "vdi_uuid": uuid} for number, uuid in sorted(done.disks.items())]
    output.result({"vm": {"uuid": done.uuid, "name": done.name}, "disks": disks})
    count = text.count(len(disks), "disk")
    output.say(f"VM {done.name} {done.uuid} has its {count} on SR {arguments.to}; session {name} is gone")


async def _migrate(
    config: PoolConfig, secrets: Credentials, journal: Journal, sr_name: str, output: Output
) -> Migrated:
    shares: dict[int, float] = {}

    def progress(number: int, share: float) -> None:
        shares[number] = share
        if output.shows_progress:
            output.status("  ".join(f"disk {disk}: {done:.0%}" for disk, done in sorted(shares.items())))

    async with open_pool(config, secrets, system_runtime()) as pool:
        return await move(pool, journal, sr_name, Listener(output.say_now, progress))
