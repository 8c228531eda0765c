"""Writable disks to compare, each behind one interface: a session of ours by every export, qcow2 and nbdkit's cow
filter over the plain file. A disk is opened fresh, nothing written yet; QEMU's own block layer is the client of all.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from tests.support.instant_lab import blockdev as session_disk

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ROOT = Path(__file__).resolve().parent.parent
XBFS = ROOT / ".venv/bin/xbfs"
READY_S = 60
_SECONDS = re.compile(r"Run completed in ([\d.]+) seconds")


@dataclass
class Disk:
    """An open disk. ``blockdev``: QEMU's options; ``objects``: what they refer to; ``servers``: pids whose CPU time
    counts; ``ready_s``: from the command to a disk that can be opened."""

    blockdev: dict[str, Any]
    objects: list[str] = field(default_factory=list)
    servers: list[int] = field(default_factory=list)
    ready_s: float = 0.0

    def cpu_s(self) -> float:
        """User and system time of its servers and their children so far."""
        return sum(_cpu_s(pid) for pid in _descendants(self.servers))


@dataclass(frozen=True)
class Place:
    """Where things lie: the repository, state and scratch below ``work``; it has one point, of ``image``."""

    work: Path
    image: Path

    def environment(self) -> dict[str, str]:
        """For our own command line."""
        return {
            **os.environ,
            "XBFS_REPOSITORY": str(self.work / "repository"),
            "XBFS_CACHE": str(self.work / "cache"),
            "XBFS_STATE": str(self.work / "state"),
            "XBFS_PASSPHRASE": "a passphrase for benchmarks",
        }

    def xbfs(self, *words: str | Path) -> dict[str, Any]:
        """Run a command of ours with --json."""
        command = [str(XBFS), *map(str, words), "--json"]
        done = subprocess.run(command, env=self.environment(), capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)} ended with {done.returncode}: {done.stderr}")
        return dict(json.loads(done.stdout))

    def supervisors(self) -> list[int]:
        """Who serves sessions: one, or none."""
        pids = [int(lock.read_text()) for lock in (self.work / "state").glob("*/server.lock")]
        return [pid for pid in pids if self._is_ours(pid)]

    def end_servers(self) -> None:
        """End who serves sessions, if anybody: the next one starts with nothing decoded in memory."""
        for pid in self.supervisors():
            with suppress(ProcessLookupError):  # it ends by itself after the last session
                os.kill(pid, signal.SIGTERM)
            until = time.monotonic() + READY_S
            while self._is_ours(pid):
                if time.monotonic() > until:
                    raise SystemExit(f"the live server {pid} does not end")
                time.sleep(0.02)

    def _is_ours(self, pid: int) -> bool:
        """Whether a live process of this benchmark has that number: a lock may outlive who wrote it."""
        try:
            environment = Path(f"/proc/{pid}/environ").read_bytes()
        except OSError:
            return False
        return f"XBFS_STATE={self.work / 'state'}".encode() in environment.split(b"\0")


class Contender:
    """A way to a writable disk."""

    name: str
    is_ours: ClassVar[bool] = False

    @contextmanager
    def opened(self, place: Place) -> Iterator[Disk]:
        """A fresh one."""
        raise AssertionError
        yield Disk({})


@contextmanager
def _file_disk(driver: str, path: Path, make: Callable[[], object]) -> Iterator[Disk]:
    """A local file that ``make`` makes, and that is gone afterwards."""
    started = time.perf_counter()
    try:
        make()
        ready = time.perf_counter() - started
        yield Disk({"driver": driver, "file": {"driver": "file", "filename": str(path)}}, ready_s=ready)
    finally:
        path.unlink(missing_ok=True)


class Qcow2(Contender):
    """A qcow2 overlay on the plain file: the one to compare with."""

    name = "qcow2 on plain file"

    @contextmanager
    def opened(self, place: Place) -> Iterator[Disk]:
        """Nothing but a file."""
        overlay = place.work / "overlay.qcow2"
        command = ["qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", str(place.image), str(overlay)]
        with _file_disk("qcow2", overlay, lambda: subprocess.run(command, check=True)) as disk:
            yield disk


class Plain(Contender):
    """A copy of the plain file, written in place: what the disk below can do."""

    name = "copy of the plain file"

    @contextmanager
    def opened(self, place: Place) -> Iterator[Disk]:
        """Ready when it is copied."""
        copy = place.work / "copy.raw"
        with _file_disk("raw", copy, lambda: shutil.copyfile(place.image, copy)) as disk:
            yield disk


class NbdkitCow(Contender):
    """nbdkit's cow filter over the plain file; what is written is gone with the process."""

    name = "nbdkit cow"

    @contextmanager
    def opened(self, place: Place) -> Iterator[Disk]:
        """A server on a unix socket."""
        socket = place.work / "cow.sock"
        started = time.perf_counter()
        command = ["nbdkit", "-f", "-U", str(socket), "--filter=cow", "file", str(place.image)]
        with subprocess.Popen(command, env={**os.environ, "TMPDIR": str(place.work)}) as server:
            try:
                _wait_for(socket)
                ready = time.perf_counter() - started
                yield Disk(nbd_unix(socket, ""), servers=[server.pid], ready_s=ready)
            finally:
                server.terminate()
                server.wait()
                socket.unlink(missing_ok=True)


class Session(Contender):
    """A session of ours, on a live server of its own that ends with it. ``export`` and ``format`` as for ``xbfs boot``;
    ``by`` how the client gets there; hydrated ones are measured when all of the point has been copied, ``is_passed``:
    given to the kernel then."""

    is_ours = True

    def __init__(
        self, export: str, by: str = "", *, format: str = "raw", is_hydrated: bool = False, is_passed: bool = False
    ) -> None:
        self.export = export
        self.by = by
        self.format = format
        self.is_hydrated = is_hydrated or is_passed
        self.is_passed = is_passed
        state = "passthrough" if is_passed else "hydrated" if is_hydrated else ""
        more = (by, "" if format == "raw" else format, state)
        self.name = " ".join(part for part in ("ours:", export, *more) if part)

    @contextmanager
    def opened(self, place: Place) -> Iterator[Disk]:
        """A new session of the newest point."""
        options = ["--export", self.export, "--format", self.format]
        if self.export == "nfs":
            options += ["--client", "10.99.0.1"]
        if self.is_hydrated:
            options.append("--hydrate")
        if self.is_passed:
            options.append("--passthrough")
        place.end_servers()
        started = time.perf_counter()
        told = place.xbfs("boot", "guest@latest", "--name", "bench", *options)
        ready = time.perf_counter() - started
        try:
            while self.is_hydrated and place.xbfs("boot", "list")["sessions"][0]["hydrated"] != 1:
                time.sleep(0.5)
            blockdev, objects = session_disk(told["session"], self.by or self.export)
            disk = Disk(blockdev, objects, place.supervisors(), ready)
            yield disk
        finally:
            place.xbfs("boot", "discard", "bench", "--force")
            place.end_servers()


def nbd_unix(socket: Path, export: str) -> dict[str, Any]:
    """QEMU's options for NBD on a unix socket."""
    return {"driver": "nbd", "server": {"type": "unix", "path": str(socket)}, "export": export}


@dataclass(frozen=True)
class Load:
    """One run of ``qemu-img bench``. Places are ``step`` apart, modulo the disk: a large odd multiple of the size is
    as good as random, and the same for everybody."""

    name: str
    count: int
    size: int = 4096
    step: int = 4096 * 50_321
    write: bool = False
    flush_every: int = 0
    depth: int = 8

    def run(self, disk: Disk) -> float:
        """Operations a second."""
        command = ["qemu-img", "bench", "-t", "writeback", "-d", self.depth, "-c", self.count, "-s", self.size]
        command += ["-S", self.step]
        if self.write:
            command += ["-w", "--pattern=97"]
        if self.flush_every:
            command += [f"--flush-interval={self.flush_every}"]
        command.append("json:" + json.dumps(disk.blockdev))
        done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)
        found = _SECONDS.search(done.stdout)
        if done.returncode or found is None:
            raise SystemExit(f"qemu-img bench: {done.stderr}{done.stdout}")
        return self.count / max(float(found[1]), 0.001)


def drop_caches() -> None:
    """Page cache, dentries and inodes of the whole machine."""
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3")


def _wait_for(path: Path) -> None:
    until = time.monotonic() + READY_S
    while not path.exists():
        if time.monotonic() > until:
            raise SystemExit(f"{path} does not appear")
        time.sleep(0.005)


def _cpu_s(pid: int) -> float:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except OSError:  # it has ended meanwhile
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _descendants(pids: list[int]) -> list[int]:
    found = list(pids)
    for pid in found:
        for task in Path(f"/proc/{pid}/task").glob("*/children"):
            try:
                found += [int(child) for child in task.read_text().split()]
            except OSError:
                continue
    return found
