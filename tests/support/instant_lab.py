"""Instant recoveries of disks that boot, through the real command line: sessions, guests, and kill -9 of all."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, unquote, urlsplit

from tests.support.cli import World
from xbfs.fuse.mountpoint import mounts

if TYPE_CHECKING:
    from collections.abc import Iterator

VM = "guest"
_GONE_S = 20
_SERVED_S = 60


class Lab(World):
    """A repository with one point of a disk, and a state directory of its own."""

    def environment(self, **changes: str | None) -> dict[str, str]:
        return super().environment(**{"XBFS_STATE": str(self.directory / "state"), **changes})

    def boot(self, *options: str) -> dict[str, Any]:
        """A session of the newest point; what the command told of it."""
        told: dict[str, Any] = self.good("boot", f"{VM}@latest", *options, "--json").json["session"]
        return told

    def session(self, name: str) -> dict[str, Any] | None:
        """What `xbfs boot list` tells of a session."""
        return next((one for one in self.sessions() if one["name"] == name), None)

    def sessions(self) -> list[dict[str, Any]]:
        """All of `xbfs boot list`, which warns of those that nobody serves."""
        told: list[dict[str, Any]] = self.run("boot", "list", "--json").json["sessions"]
        return told

    @contextmanager
    def serving(self) -> Iterator[None]:
        """`xbfs boot serve`, as a service does when the machine has come up again; everything is gone afterwards."""
        with self.started("boot", "serve"):
            end = time.monotonic() + _SERVED_S
            while not all(one["served"] for one in self.sessions()):
                assert time.monotonic() < end
                time.sleep(0.2)
            try:
                yield
            finally:
                self.kill_all()

    def processes(self) -> list[int]:
        """Pids of all that serves this lab's sessions or uses them: its directory is in their environment or words."""
        mark = os.fsencode(self.directory / "state")
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                if mark in (process / "environ").read_bytes() + (process / "cmdline").read_bytes():
                    found.append(int(process.name))
        return sorted(set(found) - {os.getpid()})

    def server(self) -> int:
        """The live server: the child of who holds the lock."""
        (lock,) = (self.directory / "state").glob("*/server.lock")
        supervisor = int(lock.read_text())
        children: list[str] = []
        end = time.monotonic() + _SERVED_S
        while not children:
            assert time.monotonic() < end
            children = Path(f"/proc/{supervisor}/task/{supervisor}/children").read_text().split()
        return int(children[0])

    def kill_all(self) -> None:
        """kill -9 of the supervisor, the server and the exports, at once; the stale mount stays."""
        victims = self.processes()
        for number in (signal.SIGSTOP, signal.SIGKILL):
            for pid in victims:
                with suppress(ProcessLookupError):
                    os.kill(pid, number)
        end = time.monotonic() + _GONE_S
        while any(Path(f"/proc/{pid}/cmdline").exists() and _is_alive(pid) for pid in victims):
            assert time.monotonic() < end
            time.sleep(0.02)

    def clean(self) -> None:
        """No process, no mount."""
        self.kill_all()
        for mount in sorted(mounts(), reverse=True):
            if mount.startswith(f"{self.directory}/"):
                subprocess.run(["umount", "--lazy", mount], check=False)


@contextmanager
def lab(disk: Path) -> Iterator[Lab]:
    """A lab with a point of ``disk``; everything is gone afterwards. Its path is short, for sockets are in it."""
    with TemporaryDirectory(prefix="xbfs-") as directory:
        made = Lab(Path(directory))
        made.good("init")
        made.good("backup", "image", disk, "--vm", VM, "-q")
        try:
            yield made
        finally:
            made.clean()


def blockdev(told: dict[str, Any], by: str) -> tuple[dict[str, Any], list[str]]:
    """QEMU's options for the only disk of a session, and objects they refer to; ``by``: file, unix, tls or nfs."""
    (disk,), (place,) = told["disks"], told["places"]
    driver = "vpc" if disk["format"] == "vhd" else "raw"
    if by == "file":
        return {"driver": driver, "file": {"driver": "file", "filename": place["file"]}}, []
    url = urlsplit(place["local_uri"] if by == "unix" else place["uri"])
    path, query = unquote(url.path), parse_qs(url.query)
    if by == "nfs":
        server = {"type": "inet", "host": url.hostname}
        return {"driver": driver, "file": {"driver": "nfs", "server": server, "path": path}}, []
    options = {"driver": "nbd", "export": path[1:]}
    if by == "unix":
        return {**options, "server": {"type": "unix", "path": query["socket"][0]}}, []
    server = {"type": "inet", "host": url.hostname, "port": str(url.port)}
    credentials = f"tls-creds-x509,id=tls,endpoint=client,dir={query['tls-certificates'][0]}"
    return {**options, "server": server, "tls-creds": "tls"}, [credentials]


def _is_alive(pid: int) -> bool:
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in {"Z", "X"}
    return False
