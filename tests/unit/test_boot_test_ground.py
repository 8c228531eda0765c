"""What tests on a pool ask the live server, and which sessions of killed tests they throw away."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pytest
import trio

from xbfs.cli import boot_test_ground, boot_test_pool
from xbfs.cli.boot_test_ground import throw_away_what_is_left
from xbfs.instant import client
from xbfs.instant.boottest.on_pool import Usage
from xbfs_engine.core.errors import LiveServerDown, SessionNotFound

if TYPE_CHECKING:
    from xbfs.cli.boot_test_ground import Ground
    from xbfs.cli.output import Output
    from xbfs.cli.pool_session import OnPool
    from xbfs_engine.store.repository import Repository


def session(name: str, read: int = 0, dirty: int = 0, *, served: bool = True) -> client.Running:
    return client.Running(name, None, {}, None, served, False, read, dirty, None, None)


def told(monkeypatch: pytest.MonkeyPatch, *sessions: client.Running) -> None:
    monkeypatch.setattr(client, "running", lambda _: list(sessions))


def read() -> Usage | None:
    ground = cast("Ground", SimpleNamespace(repository=None))
    begun = cast("OnPool", SimpleNamespace(session=SimpleNamespace(name="mine")))
    return trio.run(boot_test_pool._Meter(ground, begun).read)


def test_the_use_is_that_of_the_own_session(monkeypatch: pytest.MonkeyPatch) -> None:
    told(monkeypatch, session("other", 9, 9), session("mine", 5, 3))
    assert read() == Usage(5, 3)


def test_the_use_of_a_session_that_nobody_serves_is_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    told(monkeypatch, session("mine", served=False))
    assert read() is None


def test_a_live_server_that_is_gone_tells_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(_: object) -> Any:
        raise LiveServerDown("it is gone")

    monkeypatch.setattr(client, "running", gone)
    assert read() is None


def test_what_is_left_is_told_by_the_process_and_when_it_began(monkeypatch: pytest.MonkeyPatch) -> None:
    began = boot_test_ground._started(os.getpid())
    assert began > 0
    own, older = f"test-{os.getpid()}-{began}-abcd", f"test-{os.getpid()}-{began - 1}-abcd"
    told(monkeypatch, *map(session, (own, older, "tested-1-abcd", "web-1f3c", "test-x")))
    monkeypatch.setattr(boot_test_ground, "journal_of", lambda *_: None)
    thrown: list[str] = []

    def discard(_: object, name: str, *, force: bool) -> None:
        assert force
        thrown.append(name)
        raise SessionNotFound("another test was faster")

    monkeypatch.setattr(client, "discard", discard)
    output = SimpleNamespace(say=pytest.fail, warn=pytest.fail)
    throw_away_what_is_left(cast("Repository", None), cast("Output", output))
    assert thrown == [older]
