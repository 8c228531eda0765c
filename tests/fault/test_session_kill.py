"""Sessions are made and erased in one step: none is there in part, whichever system call dies or fails."""

from __future__ import annotations

import errno
import os
import sys
from functools import partial
from typing import TYPE_CHECKING

import pytest

from tests.support.disks import MemoryDisk
from xbfs.instant import sessions
from xbfs.instant.session import DiskFormat, Export, Session, SessionDisk
from xbfs.instant.state import StateDirectory
from xbfs.vfs.live.stubs import stub_keys
from xbfs.view.overlay import open_overlay
from xbfs_engine.core.errors import SessionExists, SessionNotFound, UsageError, XbfsError
from xbfs_engine.core.ids import PointId

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

REPOSITORY = "0" * 32
DISKS = (SessionDisk(0, DiskFormat.RAW, "0.raw"), SessionDisk(3, DiskFormat.VHD, "sr/vdi.vhd"))
BASES = {disk.key: MemoryDisk.holding(1 << 20, [1]) for disk in DISKS}
CHANGES = frozenset(
    {"open", "os.mkdir", "os.link", "os.rename", "os.remove", "os.rmdir", "os.truncate", "shutil.rmtree", "fcntl.flock"}
)
"""Audit events (docs.python.org, Audit events table) of calls that change what is on disk."""
CALLS_MAX = 200
DIED = 9


def plan(name: str = "s") -> Session:
    return Session(name, PointId("a" * 64), "web", 1, Export.FILE, DISKS)


def create(state: StateDirectory) -> None:
    sessions.create(state, plan(), REPOSITORY, BASES)


def erase(state: StateDirectory) -> None:
    with state.changing():
        sessions.erase(state, "s")


def is_whole(state: StateDirectory) -> bool:
    """Whether the session is there, with all of its parts; if it is not, no name of it is told."""
    found = sessions.stored(state)
    if not found:
        return False
    assert found == [sessions.Stored("s", plan(), None)]
    directory = state.session("s")
    assert stub_keys(directory / "tree") == {disk.key: [disk.path] for disk in DISKS}
    for disk in DISKS:
        identity = disk.identity(REPOSITORY, plan().point)
        open_overlay(directory / "overlays" / disk.key, BASES[disk.key], identity=identity).close()
    return True


def dying(work: Callable[[], None], call: int) -> bool:
    """Do the work in a process that dies before its ``call``-th change; whether it died."""
    pid = os.fork()
    if pid == 0:
        count = 0

        def hook(event: str, _: object) -> None:
            nonlocal count
            if event in CHANGES:
                count += 1
                if count == call:
                    os._exit(DIED)

        sys.addaudithook(hook)
        try:
            work()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == DIED


def test_a_process_that_dies_while_it_makes_one_leaves_all_or_nothing(tmp_path: Path) -> None:
    outcomes = set()
    for call in range(1, CALLS_MAX):
        state = StateDirectory(tmp_path / str(call))
        if not dying(partial(create, state), call):
            break
        outcomes.add(is_whole(state))
        if not is_whole(state):
            create(state)  # what was left is in nobody's way
        assert is_whole(state)
        assert os.listdir(state.sessions) == ["s"]  # noqa: PTH208 - names
    else:
        pytest.fail("it never ended")
    assert call > 20
    assert False in outcomes


def test_a_process_that_dies_while_it_erases_one_leaves_all_or_nothing(tmp_path: Path) -> None:
    outcomes = set()
    for call in range(1, CALLS_MAX):
        state = StateDirectory(tmp_path / str(call))
        create(state)
        if not dying(partial(erase, state), call):
            break
        outcomes.add(is_whole(state))
        if is_whole(state):
            erase(state)
        assert not is_whole(state)
        create(state)
        assert is_whole(state)
    else:
        pytest.fail("it never ended")
    assert outcomes == {True, False}


def failing(real: Callable[..., object], call: int) -> Callable[..., object]:
    """``real``, whose ``call``-th call finds the disk full."""
    count = 0

    def counted(*words: object, **options: object) -> object:
        nonlocal count
        count += 1
        if count == call:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*words, **options)

    return counted


@pytest.mark.parametrize("function", ["fsync", "link", "open", "mkdir"])
def test_a_call_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str) -> None:
    real = getattr(os, function)
    for call in range(1, CALLS_MAX):
        state = StateDirectory(tmp_path / function / str(call))
        state.make()
        with monkeypatch.context() as patch:
            patch.setattr(os, function, failing(real, call))
            try:
                create(state)
            except XbfsError:
                pass
            else:
                break
        assert not is_whole(state)
        create(state)
        assert is_whole(state)
    else:
        pytest.fail("it never succeeded")
    assert call > 1
    assert is_whole(state)


def test_a_name_is_used_once_and_leads_nowhere_else(tmp_path: Path) -> None:
    state = StateDirectory(tmp_path)
    create(state)
    with pytest.raises(SessionExists):
        create(state)
    for name in ("..", ".hidden", "a/b", "", "x" * 64, "é", "a\n"):
        with pytest.raises(UsageError):
            sessions.create(state, plan(name), REPOSITORY, BASES)
        with pytest.raises(SessionNotFound):
            sessions.load(state, name)
    with state.changing(), pytest.raises(SessionNotFound):
        sessions.erase(state, "../s")


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b'{"version": 99}', b"\xff", b"[" * 100_000])
def test_a_record_that_is_damaged_is_told_and_can_be_erased(tmp_path: Path, content: bytes) -> None:
    state = StateDirectory(tmp_path)
    create(state)
    (state.session("s") / "session.json").write_bytes(content)
    (found,) = sessions.stored(state)
    assert found.session is None
    assert isinstance(found.problem, XbfsError)
    erase(state)
    assert sessions.stored(state) == []
