"""boot discard: throw a session away."""

from __future__ import annotations

from typing import TYPE_CHECKING

from xbfs.cli import text
from xbfs.cli.boot import session_record
from xbfs.cli.boot_pool_end import journal_of, leave_pool
from xbfs.cli.context import repository_of
from xbfs.instant import client
from xbfs_engine.core.errors import SessionNotFound

if TYPE_CHECKING:
    import argparse

    from xbfs.cli.output import Output


def discard(arguments: argparse.Namespace, output: Output) -> None:
    """Say what is lost, and lose it."""
    repository = repository_of(arguments)
    found = next((running for running in client.running(repository) if running.name == arguments.name), None)
    if found is None:
        raise SessionNotFound(f"there is no session {arguments.name}")
    output.result({"session": session_record(found), "dry_run": arguments.dry_run})
    written = f"{text.size(found.dirty_bytes)} that were written" if found.is_served else "what was written"
    vm_name = found.session.vm_name if found.session else "?"
    if arguments.dry_run:
        in_use = "; its disks are in use, so it needs --force" if found.is_busy else ""
        on_pool = journal_of(repository, found.name)
        if on_pool is not None:
            output.say(f"would delete its VM on pool {on_pool.record.pool}, and have the pool forget its SR")
        output.say(f"would throw away session {found.name} of {vm_name} with {written}{in_use}")
        return
    on_pool = journal_of(repository, found.name)
    if on_pool is not None:
        leave_pool(repository, on_pool, output, force=arguments.force)
    client.discard(repository, found.name, force=arguments.force or on_pool is not None)
    output.say(f"session {found.name} of {vm_name} is gone, with {written}; the restore point is as it was")
