"""Sessions on disk: made, listed, read and erased so that none is ever there in part.

A session is there when its record is: it is written last, and removed first. A directory without one is what a
process left that was killed; whoever makes the next session takes it away. Blocking; any thread.
"""

from __future__ import annotations

import json
import re
import shutil
from contextlib import suppress
from typing import TYPE_CHECKING, Final, NamedTuple

from xbfs.instant.session import OVERLAYS, RECORD, TREE, overlay_directory, session_of
from xbfs.vfs.live.stubs import place_stub
from xbfs.view.overlay import create_overlay, is_open
from xbfs_engine.core.errors import (
    BlobNotFound,
    IntegrityError,
    SessionBusy,
    SessionExists,
    SessionNotFound,
    StorageFull,
    UsageError,
    XbfsError,
)
from xbfs_engine.storage.files import make_directories, remove, storage_error, write_new

if TYPE_CHECKING:
    from collections.abc import Mapping

    from xbfs.instant.session import Session
    from xbfs.instant.state import StateDirectory
    from xbfs.view.base import RandomAccess

SESSIONS_MAX: Final = 64
"""Of one repository on one machine: what one answer of the server tells about fits a packet."""
_NAME: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,62}")
_RECORD_MAX: Final = 1 << 20


class Stored(NamedTuple):
    """A session as it is on disk; ``problem`` if its record can not be used."""

    name: str
    session: Session | None
    problem: XbfsError | None


def create(state: StateDirectory, plan: Session, repository_id: str, bases: Mapping[str, RandomAccess]) -> None:
    """Make a session, durably or not at all; ``bases`` are the points' disks by key.

    Raises UsageError, SessionExists, StorageError; then nothing of it stays.
    """
    if not _NAME.fullmatch(plan.name):
        raise UsageError(
            f"{plan.name!r} is no name for a session", hint="letters, digits, '_', '.' and '-', at most 63"
        )
    directory = state.session(plan.name)
    with state.changing():
        _clean(state)
        if directory.exists():
            raise SessionExists(f"there is a session {plan.name} already")
        if len(names(state)) >= SESSIONS_MAX:
            raise UsageError(f"there are {SESSIONS_MAX} sessions already", hint="`xbfs boot discard` those not needed")
        try:
            make_directories(directory / OVERLAYS)
            make_directories(directory / TREE)
            for disk in plan.disks:
                identity = disk.identity(repository_id, plan.point)
                create_overlay(overlay_directory(directory, disk), bases[disk.key], identity=identity).close()
                place_stub(directory / TREE, disk.path, disk.key)
            write_new(directory / RECORD, [json.dumps(plan.to_record(), indent=1).encode()])
        except BaseException as exc:
            _take_away(state, plan.name)
            if isinstance(exc, StorageFull):
                raise StorageFull(exc.message, hint=f"free space where sessions are kept: {state.path}") from exc
            raise


def names(state: StateDirectory) -> list[str]:
    """Of all sessions, sorted. Raises StorageError."""
    return [name for name in _directories(state) if (state.session(name) / RECORD).exists()]


def stored(state: StateDirectory) -> list[Stored]:
    """All sessions, by name. Raises StorageError."""
    found: list[Stored] = []
    for name in names(state):
        try:
            found.append(Stored(name, load(state, name), None))
        except SessionNotFound:
            continue
        except XbfsError as exc:
            found.append(Stored(name, None, exc))
    return found


def load(state: StateDirectory, name: str) -> Session:
    """A session. Raises SessionNotFound, IntegrityError, FormatTooNew, StorageError."""
    path = state.session(name) / RECORD
    missing = SessionNotFound(f"there is no session {name}")
    if not _NAME.fullmatch(name):
        raise missing
    try:
        with path.open("rb") as file:
            record = json.loads(file.read(_RECORD_MAX))
    except FileNotFoundError:
        raise missing from None
    except OSError as exc:
        raise storage_error(exc, f"read {path}") from exc
    except (ValueError, RecursionError) as exc:
        raise IntegrityError(f"{path} is not JSON", hint="bring it back from a copy, or discard the session") from exc
    found = session_of(record)
    if found.name != name:
        raise IntegrityError(f"{path} is of session {found.name!r}", hint="move its directory to that name")
    return found


def erase(state: StateDirectory, name: str) -> None:
    """Have a session no more; for who is ``changing``. Raises SessionNotFound, SessionBusy if somebody has a disk of it
    open, StorageError."""
    if not _NAME.fullmatch(name):
        raise SessionNotFound(f"there is no session {name}")
    for overlay in (state.session(name) / OVERLAYS).glob("*"):
        if is_open(overlay):
            raise SessionBusy(f"disk {overlay.name} of session {name} is open")
    try:
        remove(state.session(name) / RECORD)
    except BlobNotFound:
        raise SessionNotFound(f"there is no session {name}") from None
    _take_away(state, name)


def _clean(state: StateDirectory) -> None:
    """Take away what was never finished, or not all taken away."""
    for name in _directories(state):
        if not (state.session(name) / RECORD).exists():
            _take_away(state, name)


def _take_away(state: StateDirectory, name: str) -> None:
    with suppress(BlobNotFound):
        remove(state.session(name) / RECORD)
    shutil.rmtree(state.session(name), ignore_errors=True)


def _directories(state: StateDirectory) -> list[str]:
    try:
        return sorted(entry.name for entry in state.sessions.iterdir() if entry.is_dir())
    except FileNotFoundError:
        return []
    except OSError as exc:
        raise storage_error(exc, f"list {state.sessions}") from exc
