"""Programs run as children, with real programs: readiness, restarts, ends; what is told when they do not serve."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import trio

from tests.support.export_lab import wait_until
from tests.support.nbd_servers import free_port
from tests.support.servers import ROOT
from xbfs.serve import child
from xbfs.serve.child import Program, answers, check_free, keep_running
from xbfs_engine.core.errors import ExportFailed

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

GREETER = """\
import os, socket, sys
server = socket.create_server(("127.0.0.1", int(sys.argv[1])))
open(sys.argv[2], "a").write(f"{os.getpid()}\\n")
print("greeting", flush=True)
while True:
    connection, _ = server.accept()
    connection.sendall(b"hello")
    connection.close()
"""


@pytest.fixture
def port() -> int:
    return free_port()


def program(folder: Path, *arguments: str, name: str = "python3") -> Program:
    return Program(name, lambda: arguments, "some-package", folder, folder / "log", lambda log: f"about {log!r}")


def greeter(folder: Path, port: int) -> Program:
    return program(folder, "-c", GREETER, str(port), str(folder / "pids"))


def pids(folder: Path) -> list[int]:
    return [int(line) for line in (folder / "pids").read_text().split()]


def run(made: Program, port: int, then: Callable[[], Awaitable[None]]) -> None:
    """Run it; when it serves, ``then``."""

    async def main() -> None:
        started = trio.Event()
        with trio.fail_after(30):
            async with trio.open_nursery() as nursery:
                is_ready = partial(answers, "127.0.0.1", port)
                nursery.start_soon(partial(keep_running, made, is_ready, started=started.set))
                await started.wait()
                await then()
                nursery.cancel_scope.cancel()

    trio.run(main)


async def nothing() -> None:
    """Be content that it serves."""


def failure(made: Program, port: int) -> ExportFailed:
    with pytest.raises(ExceptionGroup) as failed:
        run(made, port, nothing)
    (error,) = failed.value.exceptions
    assert isinstance(error, ExportFailed)
    return error


def test_it_is_ended_with_us(tmp_path: Path, port: int) -> None:
    run(greeter(tmp_path, port), port, nothing)
    (pid,) = pids(tmp_path)
    assert not Path(f"/proc/{pid}").exists()


def test_one_that_ignores_sigterm_is_killed(tmp_path: Path, port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child, "_STOP_S", 0.2)
    stubborn = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + GREETER
    run(program(tmp_path, "-c", stubborn, str(port), str(tmp_path / "pids")), port, nothing)
    (pid,) = pids(tmp_path)
    assert not Path(f"/proc/{pid}").exists()


def test_one_that_must_not_tell_its_clients_is_killed_at_once(tmp_path: Path, port: int) -> None:
    telling = f"""
import ctypes, signal
signal.signal(signal.SIGTERM, lambda *_: open({str(tmp_path / "told")!r}, "w"))
ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # as nbdkit does
{GREETER}"""
    arguments = ("-c", telling, str(port), str(tmp_path / "pids"))
    run(replace(program(tmp_path, *arguments), is_killed=True), port, nothing)
    (pid,) = pids(tmp_path)
    assert not Path(f"/proc/{pid}").exists()
    assert not (tmp_path / "told").exists()


def test_it_is_started_anew_when_it_ends(tmp_path: Path, port: int) -> None:
    async def kill_twice() -> None:
        for number in (1, 2):
            os.kill(pids(tmp_path)[-1], signal.SIGKILL)
            while len(pids(tmp_path)) == number or not await answers("127.0.0.1", port):  # noqa: ASYNC110
                await trio.sleep(0.02)

    run(greeter(tmp_path, port), port, kill_twice)
    assert len(pids(tmp_path)) == 3


def test_it_is_started_anew_when_another_file_system_is_mounted(tmp_path: Path, port: int) -> None:
    """Whatever it has open is of the one that has gone."""
    seen = [1, 1, 2]

    async def device(_: Path) -> int:
        return seen.pop(0) if len(seen) > 1 else seen[0]

    async def until_anew() -> None:
        while len(pids(tmp_path)) == 1:  # noqa: ASYNC110 - another process does it
            await trio.sleep(0.02)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(child, "_device", device)
        patch.setattr(child, "_WATCH_S", 0.05)
        run(greeter(tmp_path, port), port, until_anew)


def test_a_missing_program_is_told(tmp_path: Path, port: int) -> None:
    error = failure(program(tmp_path, name="no-such-program"), port)
    assert str(error) == "no-such-program is not installed"
    assert error.hint == "apt install some-package"


def test_the_end_of_the_log_is_told(tmp_path: Path, port: int) -> None:
    lines = "".join(f"print('line {number}')\n" for number in range(2000))
    error = failure(program(tmp_path, "-c", f"{lines}raise SystemExit(7)"), port)
    assert str(error) == "python3 ended with status 7: line 1997 | line 1998 | line 1999"
    assert "line 1993" in error.hint


def test_one_that_never_serves_is_told(tmp_path: Path, port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child, "START_DEADLINE_S", 0.3)
    error = failure(program(tmp_path, "60", name="sleep"), port)
    assert "does not serve" in str(error)


def test_it_gets_no_environment_of_ours(tmp_path: Path, port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XBFS_PASSPHRASE", "secret")
    failure(program(tmp_path, "-c", "import os; print(sorted(os.environ), os.getsid(0) == os.getpid())"), port)
    assert (tmp_path / "log").read_text() == "['LC_ALL', 'PATH'] True\n"


@pytest.mark.parametrize("is_killed", [False, True])
def test_it_does_not_outlive_us(tmp_path: Path, port: int, is_killed: bool) -> None:
    """Also when we are killed; the child is of the event loop's thread, not of one that ends."""
    call = (
        "import trio; from pathlib import Path; from functools import partial;"
        "from dataclasses import replace; from tests.interop.test_serve_child import greeter, run;"
        f"made = replace(greeter(Path({str(tmp_path)!r}), {port}), is_killed={is_killed});"
        f"run(made, {port}, partial(trio.sleep, 25))"
    )
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'engine'}"}
    parent = subprocess.Popen([sys.executable, "-c", call], cwd=ROOT, env=environment)
    try:
        wait_until((tmp_path / "pids").exists, "it does not start")
        wait_until(lambda: len(pids(tmp_path)) == 1, "it does not start")
    finally:
        parent.kill()
        parent.wait()
    (pid,) = pids(tmp_path)
    wait_until(lambda: not Path(f"/proc/{pid}").exists(), "it outlives us")


def test_a_port_that_is_taken_is_refused(port: int) -> None:
    assert check_free("127.0.0.1", port, "hint") == port
    assert check_free("127.0.0.1", 0, "hint") > 0
    with socket.create_server(("127.0.0.1", port)), pytest.raises(ExportFailed, match=f"port {port}") as failed:
        check_free("127.0.0.1", port, "hint")
    assert failed.value.hint == "hint"
