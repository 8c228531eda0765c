"""A supervised server: the first one's error is told, later ones are started anew, and all end when they are told."""

from __future__ import annotations

import os
import signal
import threading
import time
from typing import TYPE_CHECKING

import pytest

from xbfs.instant.supervisor import supervise
from xbfs_engine.core.errors import LiveServerDown, MountPointNotEmpty
from xbfs_engine.core.runtime import SystemClock

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

END_S = 20


def test_what_the_first_server_ended_with_is_told() -> None:
    def refused(_: Callable[[], None]) -> bool:
        raise MountPointNotEmpty("it holds 'x'", hint="empty it")

    deaths: list[None] = []
    with pytest.raises(MountPointNotEmpty, match="it holds") as caught:
        supervise(refused, after_death=lambda: deaths.append(None), ready=lambda: None, clock=SystemClock())
    assert caught.value.hint == "empty it"
    assert len(deaths) == 1


def test_one_that_is_killed_before_it_serves_is_told() -> None:
    def killed(_: Callable[[], None]) -> bool:
        os.kill(os.getpid(), signal.SIGKILL)
        return True

    with pytest.raises(LiveServerDown, match="before it served"):
        supervise(killed, after_death=lambda: None, ready=lambda: None, clock=SystemClock())


def test_one_that_nobody_needs_any_more_is_not_started_anew(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.touch()

    def serve(ready: Callable[[], None]) -> bool:
        """Ends once because it was told, then because nobody needs it."""
        ready()
        with log.open("a") as file:
            file.write(f"{os.getpid()}\n")
        return len(log.read_text().split()) == 2

    deaths: list[None] = []
    supervise(serve, after_death=lambda: deaths.append(None), ready=lambda: None, clock=SystemClock())
    assert len(log.read_text().split()) == len(deaths) == 2


def test_servers_are_started_anew_until_sigterm_ends_both(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.touch()

    def serve(ready: Callable[[], None]) -> bool:
        """Serves twice in vain, then until it is told to end."""
        with log.open("a") as file:
            file.write(f"{os.getpid()}\n")
        ready()
        if len(log.read_text().split()) < 3:
            os.kill(os.getpid(), signal.SIGKILL)
        signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
        while True:
            time.sleep(1)

    supervisor = os.getpid()

    def stop() -> None:
        end = time.monotonic() + END_S
        while len(log.read_text().split()) < 3 and time.monotonic() < end:
            time.sleep(0.02)
        time.sleep(0.2)
        os.kill(supervisor, signal.SIGTERM)

    ready: list[None] = []
    deaths: list[None] = []
    # Made here, the thread keeps SIGTERM from us: it is blocked there as well.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    stopper = threading.Thread(target=stop)
    stopper.start()
    try:
        supervise(serve, after_death=lambda: deaths.append(None), ready=lambda: ready.append(None), clock=SystemClock())
    finally:
        stopper.join()
    assert (len(ready), len(deaths)) == (1, 3)
    for pid in map(int, log.read_text().split()):
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
