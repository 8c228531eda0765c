"""The real command line with sessions: a repository, a state directory in memory, and nothing left behind."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.support.cli import Done, World, make_world
from xbfs.control import wire
from xbfs.fuse.mountpoint import mounts
from xbfs.instant.client import connected
from xbfs.instant.state import StateDirectory
from xbfs_engine.core.errors import LiveServerDown

if TYPE_CHECKING:
    from collections.abc import Iterator

GONE_S = 30


@dataclass(frozen=True)
class BootWorld(World):
    """A world whose sessions are kept in ``directory/s``."""

    def environment(self, **changes: str | None) -> dict[str, str]:
        ours = {"XBFS_STATE": str(self.directory / "s"), "XDG_RUNTIME_DIR": str(self.directory)}
        return super().environment(**{**ours, **changes})

    @property
    def state(self) -> Path:
        return self.directory / "s" / str(self.init["repository_id"])

    def boot(self, name: str, *words: str) -> Path:
        """Begin a session; the file of its only disk."""
        record = self.good("boot", "web@latest", "--name", name, "--json", *words).json["session"]
        return Path(record["places"][0]["file"])

    def sessions(self) -> dict[str, dict[str, Any]]:
        done: Done = self.run("boot", "list", "--json")
        assert done.code in (0, 3), done.err
        return {session["name"]: session for session in done.json["sessions"]}

    def names(self) -> list[str]:
        """Of the sessions on disk, without a command."""
        return sorted(place.name for place in (self.state / "sessions").glob("*"))

    def ask(self, verb: str, **arguments: object) -> Any:
        """Of the server, without a command."""
        with connected(StateDirectory(self.state)) as control:
            return control.ask(wire.Request(verb, arguments))

    def told(self, name: str) -> dict[str, Any]:
        """What the server tells of a session."""
        return next(session for session in self.ask("list") if session["name"] == name)

    def discard_all(self) -> None:
        """However it is done."""
        for name in self.names():
            try:
                self.ask("discard", name=name, force=True)
            except LiveServerDown:
                shutil.rmtree(self.state / "sessions" / name)

    def processes(self) -> list[int]:
        """Supervisors and servers of this world's sessions, and commands that run, oldest first."""
        wanted = f"XBFS_STATE={self.directory / 's'}".encode()
        found = []
        for process in Path("/proc").iterdir():
            with suppress(OSError):
                words = set((process / "cmdline").read_bytes().split(b"\0"))
                if words & {b"boot", b"test"} and wanted in (process / "environ").read_bytes().split(b"\0"):
                    found.append(int(process.name))
        return sorted(found, key=_started)  # numbers begin anew at 32768, often within one run of the tests

    def supervisor(self) -> int:
        return next(pid for pid in self.processes() if parent(pid) not in self.processes())

    def server(self) -> int:
        return next(pid for pid in self.processes() if parent(pid) == self.supervisor())

    def end(self) -> None:
        for pid in self.processes():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
        wait_until(lambda: not self.processes())
        if str(self.state / "live") in mounts():
            subprocess.run(["fusermount3", "-u", "-z", str(self.state / "live")], check=True)


@contextmanager
def boot_world() -> Iterator[BootWorld]:
    """In memory, as its paths must be short and its flushes fast."""
    directory = Path(tempfile.mkdtemp(prefix="xb-", dir="/dev/shm"))
    try:
        made = make_world(directory)
        world = BootWorld(made.directory, made.full, made.delta, made.init)
        try:
            yield world
        finally:
            world.end()
    finally:
        shutil.rmtree(directory)


def wait_until(holds: Any, limit_s: float = GONE_S) -> None:
    deadline = time.monotonic() + limit_s
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def parent(pid: int) -> int:
    return _stat(pid, 4)


def _started(pid: int) -> tuple[int, int]:
    return _stat(pid, 22), pid


def _stat(pid: int, field: int) -> int:
    """A number of proc(5)'s stat, counted as there; 0 if the process is gone."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[field - 3])
    except OSError:
        return 0
