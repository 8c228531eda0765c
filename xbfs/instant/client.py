"""Instant recoveries as commands see them: begin one, see which there are, end one. Blocking; keeps no state.

The server is started by whoever needs it first, by a fork: before this process has threads, if it may be.
"""

from __future__ import annotations

import os
import time
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple, cast

from xbfs.control import wire
from xbfs.control.client import Control, Unreachable
from xbfs.fuse import mountpoint
from xbfs.fuse.background import run_in_background
from xbfs.instant import sessions
from xbfs.instant.bases import Bases
from xbfs.instant.session import RECORD
from xbfs.instant.state import state_of
from xbfs_engine.core.errors import LiveServerDown, SessionBusy, SessionNotFound
from xbfs_engine.storage.files import make_directories

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from xbfs.instant.session import Session
    from xbfs.instant.state import StateDirectory
    from xbfs_engine.catalog.catalog import Catalog
    from xbfs_engine.core.runtime import Clock
    from xbfs_engine.store.reader import Locator
    from xbfs_engine.store.repository import Repository

START_S: Final = 40.0
"""In which somebody else's start of the server has to succeed."""
_REACH_HINT: Final = "run this as the user who started it, or end it (kill {}) and run this again"
_POLL_S: Final = 0.1
_PATH_MAX: Final = 4096


class DiskPlace(NamedTuple):
    """Where a disk is: ``file`` in the live mount (None: a client has removed it); by NBD or NFS at ``uri``, and for
    programs of this machine at ``local_uri``. ``is_passed``: the kernel reads and writes it without the server."""

    file: Path | None
    uri: str | None = None
    local_uri: str | None = None
    is_passed: bool = False


class NfsShare(NamedTuple):
    """What a client mounts for a session."""

    address: str
    port: int
    path: str


class Running(NamedTuple):
    """A session, and where its disks are by key while it ``is_served``. ``problem``: what is wrong with it, and what to
    do. ``session`` is None if its record can not be read. ``read_bytes``: about, since it is served. ``hydrated``: from
    0 to 1, None if it is not asked for."""

    name: str
    session: Session | None
    places: Mapping[str, DiskPlace]
    nfs: NfsShare | None
    is_served: bool
    is_busy: bool
    read_bytes: int
    dirty_bytes: int
    hydrated: float | None
    problem: tuple[str, str] | None


def begin(repository: Repository, catalog: Catalog, index: Locator, plan: Session) -> Running:
    """Make a session, durably, and have it served. On any error nothing of it stays.

    Raises UsageError, SessionExists, PointNotFound, ImageUnsupported, ExportFailed, LiveServerDown, StorageError.
    """
    state = state_of(repository.id, os.environ)
    sessions.create(state, plan, repository.id, Bases(repository, catalog, index).of(plan))
    try:
        answer = _opened(repository, catalog, index, plan.name)
    except BaseException:
        _discard(state, plan.name, repository.runtime.clock, force=True)
        raise
    return _running(sessions.Stored(plan.name, plan, None), _record(answer))


def running(repository: Repository) -> list[Running]:
    """All sessions of a repository on this machine, by name. Raises StorageError, MountError."""
    state = state_of(repository.id, os.environ)
    told: dict[str, Mapping[str, object]] = {}
    try:
        with connected(state) as control:
            answer = control.ask(wire.Request("list", {}))
            told = {str(record["name"]): record for record in map(_record, cast("list[object]", answer))}
    except LiveServerDown:
        server = state.server()
        if server is not None:
            problem = [f"process {server} serves it and can not be reached", _REACH_HINT.format(server)]
            told = {stored.name: {"problem": problem} for stored in sessions.stored(state)}
    return [_running(stored, told.get(stored.name, {})) for stored in sessions.stored(state)]


def places(repository: Repository) -> dict[str, str]:
    """Where each session is shown while it is served, by name. Raises StorageError."""
    state = state_of(repository.id, os.environ)
    return {name: str(state.live / name) for name in sessions.names(state)}


def discard(repository: Repository, name: str, *, force: bool = False) -> None:
    """Throw a session away, with all that was written. ``force``: even if somebody has a disk open.

    Raises SessionNotFound, SessionBusy, StorageError, MountError.
    """
    state = state_of(repository.id, os.environ)
    if name not in sessions.names(state):
        raise SessionNotFound(f"there is no session {name}")
    _discard(state, name, repository.runtime.clock, force=force)


def ensure_server(repository: Repository, catalog: Catalog, index: Locator) -> None:
    """Have a live server in the background, unless there is one. Raises what it ends with, LiveServerDown."""
    state = state_of(repository.id, os.environ)
    clock = repository.runtime.clock
    until_s = clock.monotonic_s() + START_S
    busy: SessionBusy | None = None
    while clock.monotonic_s() < until_s:
        try:
            with connected(state):
                return
        except LiveServerDown:
            pass
        try:
            run_in_background(partial(serve, repository, catalog, index, stays=False), state.log_file)
        except SessionBusy as exc:
            busy = exc
            time.sleep(_POLL_S)
    raise _unreachable(state, busy)


def serve(
    repository: Repository, catalog: Catalog, index: Locator, ready: Callable[[], None], *, stays: bool = True
) -> None:
    """Supervise a live server until SIGTERM or SIGINT, or, unless it ``stays``, until there are no sessions; ``ready``
    is called when it serves. Needs a process that has no threads. Raises SessionBusy if there is one already, and what
    the first server ends with."""
    from xbfs.instant import server
    from xbfs.instant.supervisor import supervise

    state = state_of(repository.id, os.environ)
    mountpoint.check_installed()
    clock = repository.runtime.clock

    def run(told: Callable[[], None]) -> bool:
        return server.serve(state, Bases(repository, catalog, index), repository.id, clock, told, stays=stays)

    with state.serving():
        mountpoint.let_go(state.live)  # what a server left that was killed with its supervisor
        make_directories(state.live)
        supervise(run, after_death=partial(mountpoint.let_go, state.live), ready=ready, clock=clock)


@contextmanager
def connected(state: StateDirectory) -> Iterator[Control]:
    """A connection to the live server. Raises LiveServerDown, also if the server goes away; MountError."""
    try:
        path = Path(state.control_file.read_bytes()[:_PATH_MAX].decode(errors="surrogateescape"))
    except OSError as exc:
        raise LiveServerDown("nobody serves the sessions of this repository") from exc
    try:
        with Control(path) as control:
            yield control
    except Unreachable as exc:
        raise LiveServerDown(f"nobody serves the sessions of this repository: {exc.message}") from exc


def _unreachable(state: StateDirectory, why: SessionBusy | None) -> LiveServerDown:
    """Of a server that is there, or that ends as soon as it was started."""
    server = state.server()
    hint = f"its log is {state.log_file}" if server is None else _REACH_HINT.format(server)
    return LiveServerDown(f"the live server can not be reached: {why}", hint=hint)


def _opened(repository: Repository, catalog: Catalog, index: Locator, name: str) -> object:
    """What the server answers of a new session: one that was about to end for want of sessions may not any more."""
    clock = repository.runtime.clock
    until_s = clock.monotonic_s() + START_S
    while True:
        ensure_server(repository, catalog, index)
        try:
            with connected(state_of(repository.id, os.environ)) as control:
                return control.ask(wire.Request("open", {"name": name}))
        except LiveServerDown:
            if clock.monotonic_s() > until_s:
                raise


def _discard(state: StateDirectory, name: str, clock: Clock, *, force: bool) -> None:
    """By the server, or by ourselves while nobody has the session open."""
    until_s = clock.monotonic_s() + START_S
    record = state.session(name) / RECORD
    while True:
        try:
            with connected(state) as control:
                control.ask(wire.Request("discard", {"name": name, "force": force}))
        except LiveServerDown:
            is_done = not record.exists()  # the server may have died over it
        else:
            is_done = True
        if is_done:
            return
        try:
            with state.changing():
                sessions.erase(state, name)
        except SessionBusy as exc:
            if clock.monotonic_s() > until_s:
                raise _unreachable(state, exc) from exc
            time.sleep(_POLL_S)
        else:
            return


def _record(answer: object) -> Mapping[str, object]:
    if not isinstance(answer, dict):
        raise wire.not_understood()
    return answer


def _running(stored: sessions.Stored, told: Mapping[str, object]) -> Running:
    problem = None if stored.problem is None else (stored.problem.message, stored.problem.hint)
    match told:
        case {
            "files": dict() as files,
            "uris": dict() as uris,
            "local_uris": dict() as local_uris,
            "nfs": list() | None as nfs,
            "read_bytes": int() as read,
            "dirty_bytes": int() as dirty,
            "hydrated": float() | None as hydrated,
            "passed": list() as passed,
            "busy": bool() as is_busy,
            "served": bool() as is_served,
            "problem": list() | None as said,
        }:
            places = {
                disk.key: DiskPlace(
                    Path(files[disk.key]) if disk.key in files else None,
                    uris.get(disk.key),
                    local_uris.get(disk.key),
                    disk.key in passed,
                )
                for disk in (stored.session.disks if stored.session else ())
            }
            share = None if nfs is None else NfsShare(*nfs)
            found = problem if said is None else (str(said[0]), str(said[1]))
            return Running(stored.name, stored.session, places, share, is_served, is_busy, read, dirty, hydrated, found)
        case {"problem": [str() as message, str() as hint]}:
            problem = (message, hint)
        case _ if problem is None:
            problem = ("nobody serves it", "`xbfs boot serve`, or the next `xbfs boot`, does")
    return Running(stored.name, stored.session, {}, None, False, False, 0, 0, None, problem)
