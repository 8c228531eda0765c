"""boot list: the sessions of a repository on this machine."""

from __future__ import annotations

from typing import TYPE_CHECKING

from xbfs.cli import text
from xbfs.cli.boot import session_record
from xbfs.cli.boot_pool_end import journal_of
from xbfs.cli.context import repository_of
from xbfs.instant import client
from xbfs_engine.core.errors import XbfsError

if TYPE_CHECKING:
    import argparse

    from xbfs.cli.output import Output
    from xbfs.instant.client import Running
    from xbfs_engine.store.repository import Repository

_HOUR_S = 3600


def list_sessions(arguments: argparse.Namespace, output: Output) -> None:
    """List them."""
    repository = repository_of(arguments)
    found = client.running(repository)
    pools = {running.name: _pool_of(repository, running.name, output) for running in found}
    output.result({"sessions": [session_record(running) | {"pool": pools[running.name]} for running in found]})
    if not found:
        output.say("no sessions")
        return
    now_ns = repository.runtime.clock.now_ns()
    rows: list[tuple[str, ...]] = [("NAME", "VM", "POINT", "AGE", "EXPORT", "WRITTEN", "HERE", "STATE")]
    rows += [_row(running, pools[running.name], now_ns) for running in found]
    for line in text.table(rows, right=frozenset({3, 5, 6})):
        output.say(line)
    for running in found:
        if running.problem is not None:
            message, hint = running.problem
            output.warn(f"session {running.name}: {message}", hint)


def _pool_of(repository: Repository, name: str, output: Output) -> str | None:
    """The name of the pool that a session has something on."""
    try:
        journal = journal_of(repository, name)
    except XbfsError as exc:
        output.warn(f"session {name}: {exc.message}", exc.hint)
        return None
    return None if journal is None else journal.record.pool


def _row(running: Running, pool: str | None, now_ns: int) -> tuple[str, ...]:
    state = "not served" if not running.is_served else "in use" if running.is_busy else "served"
    if any(place.is_passed for place in running.places.values()):
        state += ", passed through"
    session = running.session
    if session is None:
        return running.name, "?", "?", "?", "?", "?", "?", state
    return (
        running.name,
        session.vm_name,
        session.point[:12],
        _age(max(now_ns - session.created_ns, 0) / 1e9),
        session.export.value if pool is None else f"pool {pool}",
        text.size(running.dirty_bytes) if running.is_served else "?",
        "-" if running.hydrated is None else f"{running.hydrated:.0%}",
        state,
    )


def _age(seconds: float) -> str:
    """ "0:07", "2:03:07", or "3 days"."""
    days = int(seconds // (24 * _HOUR_S))
    return text.count(days, "day") if days else text.clock(seconds)
