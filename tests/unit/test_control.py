"""The control socket of a mount: what is asked and answered, and who may ask."""

from __future__ import annotations

import os
from functools import partial
from typing import TYPE_CHECKING

import pytest
import trio
import trio.lowlevel
from hypothesis import given
from hypothesis import strategies as st

from xbfs.control import client, place, wire
from xbfs.control import server as server_module
from xbfs.control.server import ControlServer
from xbfs_engine.core.errors import GuestLocked, MountError, XbfsError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping
    from contextlib import AsyncExitStack
    from pathlib import Path

ASKED = wire.Unlock("point", "0p2", b"secret \0 \xff")


async def ask(path: Path, unlock: Callable[[wire.Unlock], Awaitable[list[str]]], request: wire.Unlock) -> list[str]:
    """One request to a server that answers with ``unlock``."""

    async def handler(arguments: Mapping[str, object], _: AsyncExitStack) -> list[str]:
        return await unlock(wire.unlock_of(arguments))

    server = ControlServer(path, {wire.UNLOCK: handler})
    await server.listen()
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(server.serve)
            answer = await trio.to_thread.run_sync(partial(client.unlock, path, request))
            nursery.cancel_scope.cancel()
    finally:
        server.close()
    return answer


def test_a_key_arrives_and_what_it_opened_comes_back(tmp_path: Path) -> None:
    seen = []

    async def unlock(request: wire.Unlock) -> list[str]:
        seen.append(request)
        return ["0p2", "vg-root"]

    assert trio.run(ask, tmp_path / "s", unlock, ASKED) == ["0p2", "vg-root"]
    assert seen == [ASKED]
    assert not list(tmp_path.iterdir())


def test_an_error_arrives_as_what_it_is_and_a_bug_as_the_mounts(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def locked(_: wire.Unlock) -> list[str]:
        raise GuestLocked("no volume is opened by it", hint="another one")

    async def broken(_: wire.Unlock) -> list[str]:
        raise ZeroDivisionError

    with pytest.raises(ExceptionGroup) as caught:
        trio.run(ask, tmp_path / "s", locked, ASKED)
    error = caught.value.exceptions[0]
    assert isinstance(error, GuestLocked)
    assert (error.message, error.hint) == ("no volume is opened by it", "another one")
    with pytest.raises(ExceptionGroup) as caught:
        trio.run(ask, tmp_path / "s", broken, ASKED)
    assert "ZeroDivisionError" in str(caught.value.exceptions[0])


def test_only_its_owner_may_reach_the_socket(tmp_path: Path) -> None:
    async def modes() -> int:
        server = ControlServer(tmp_path / "s", {})
        await server.listen()
        try:
            return (tmp_path / "s").stat().st_mode & 0o777
        finally:
            server.close()

    assert trio.run(modes) == 0o600


def test_nobody_listens(tmp_path: Path) -> None:
    with pytest.raises(MountError, match="can not be reached"):
        client.unlock(tmp_path / "s", ASKED)


def test_a_directory_that_others_can_write_is_refused(tmp_path: Path) -> None:
    environment = {"XDG_RUNTIME_DIR": str(tmp_path)}
    directory = place.make_directory(environment)
    assert directory.stat().st_mode & 0o777 == 0o700
    directory.chmod(0o777)
    with pytest.raises(MountError, match="written by others"):
        place.make_directory(environment)


def test_sockets_of_the_dead_are_taken_away(tmp_path: Path) -> None:
    dead, living, other = (tmp_path / name for name in ("4194304.control", f"{os.getppid()}.control", "x.control"))
    for path in (dead, living, other):
        path.touch()
    assert place.socket_path(tmp_path) == tmp_path / f"{os.getpid()}.control"
    assert not dead.exists()
    assert living.exists()
    assert other.exists()


def test_a_secret_that_does_not_fit_is_refused_and_none_is_shown() -> None:
    with pytest.raises(MountError, match="longer than"):
        wire.Unlock("p", "", bytes(wire.SECRET_MAX + 1)).to_request()
    assert "secret" not in repr(ASKED).replace("secret=", "")


@given(st.binary(max_size=200))
def test_any_packet_is_understood_or_refused(packet: bytes) -> None:
    for decode in (wire.decode_request, wire.decode_answer):
        try:
            decode(packet)
        except XbfsError as error:
            assert error.message or error.message == ""  # noqa: PT017 - whatever it is, it is ours


def test_a_request_comes_back_as_it_was() -> None:
    request = wire.decode_request(wire.encode_request(ASKED.to_request()))
    assert wire.unlock_of(request.arguments) == ASKED


def test_what_a_request_began_ends_with_its_connection(tmp_path: Path) -> None:
    told: list[str] = []

    async def begin(_: Mapping[str, object], undone: AsyncExitStack) -> None:
        told.append("begun")
        undone.callback(told.append, "ended")

    async def look(_: Mapping[str, object], __: AsyncExitStack) -> list[str]:
        return list(told)

    def command() -> object:
        with client.Control(tmp_path / "s") as control:
            control.ask(wire.Request("begin", {}))
            return control.ask(wire.Request("look", {}))

    async def both() -> None:
        server = ControlServer(tmp_path / "s", {"begin": begin, "look": look})
        await server.listen()
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(server.serve)
                assert await trio.to_thread.run_sync(command) == ["begun"]
                with trio.fail_after(10):
                    while told != ["begun", "ended"]:  # noqa: ASYNC110 - it tells nobody
                        await trio.sleep(0.01)
                nursery.cancel_scope.cancel()
        finally:
            server.close()

    trio.run(both)


def test_a_verb_that_nobody_knows_is_refused(tmp_path: Path) -> None:
    async def asked() -> None:
        server = ControlServer(tmp_path / "s", {})
        await server.listen()
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(server.serve)
                with pytest.raises(MountError, match="not understood"):
                    await trio.to_thread.run_sync(client.unlock, tmp_path / "s", ASKED)
                nursery.cancel_scope.cancel()
        finally:
            server.close()

    trio.run(asked)


def test_a_server_whose_socket_was_taken_away_is_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "LOOK_S", 0.05)
    path = tmp_path / "runtime" / "s"
    path.parent.mkdir()

    async def look(_: Mapping[str, object], __: AsyncExitStack) -> object:
        return "here"

    def asked() -> object:
        with client.Control(path) as control:
            return control.ask(wire.Request("look", {}))

    async def both() -> None:
        server = ControlServer(path, {"look": look})
        await server.listen()
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(server.serve)
                assert await trio.to_thread.run_sync(asked) == "here"
                path.unlink()
                path.parent.rmdir()
                with trio.fail_after(10):
                    while not path.exists():  # noqa: ASYNC110 - it tells nobody
                        await trio.sleep(0.01)
                assert await trio.to_thread.run_sync(asked) == "here"
                nursery.cancel_scope.cancel()
        finally:
            server.close()

    trio.run(both)
    assert not path.exists()
