"""What a session has on a pool, for the commands that end it."""

from __future__ import annotations

import os
from functools import partial
from typing import TYPE_CHECKING

from xbfs.cli import tasks
from xbfs.cli.context import catalog_of, index_of
from xbfs.cli.pool import configured
from xbfs.instant import client
from xbfs.instant.pool.record import Journal
from xbfs.instant.pool.tear_down import tear_down
from xbfs.instant.state import state_of
from xbfs_engine.core.errors import XbfsError
from xbfs_engine.core.runtime import system_runtime
from xbfs_engine.source.xapi.session import open_pool

if TYPE_CHECKING:
    from xbfs.cli.output import Output
    from xbfs_engine.source.xapi.config import Credentials, PoolConfig
    from xbfs_engine.store.repository import Repository


def journal_of(repository: Repository, name: str) -> Journal | None:
    """What is noted of a session on a pool; None if it has nothing on one. Raises StorageError, IntegrityError."""
    return Journal.of(state_of(repository.id, os.environ).session(name))


def have_it_served(repository: Repository, output: Output) -> None:
    """Hosts that let go of a share want to talk to its server. Raises what starting it does."""
    client.ensure_server(repository, catalog_of(repository, output), index_of(repository))


def leave_pool(repository: Repository, journal: Journal, output: Output, *, force: bool) -> None:
    """Take from the pool what the session has there; the session stays. Raises SessionBusy, PoolError."""
    config, secrets = configured(journal.record.pool)
    try:
        have_it_served(repository, output)
    except XbfsError as exc:
        output.warn(f"the session is not served ({exc.message}): hosts may be slow to let go of it")
    tasks.run(partial(_leave, config, secrets, journal, output, force=force))


async def _leave(config: PoolConfig, secrets: Credentials, journal: Journal, output: Output, *, force: bool) -> None:
    async with open_pool(config, secrets, system_runtime()) as pool:
        await tear_down(pool, journal, output.say_now, force=force)
