"""Ways to look at a backed-up disk, each behind one interface: ours, restic mount, borg mount, nbdkit, the plain file.

All are driven by their own command lines; a View is opened cold (new server process, kernel caches dropped).
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Protocol

from bench_nbd import NbdReader
from bench_peers import PASSPHRASE, BorgFixed, Restic, Xbfs

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

ROOT = Path(__file__).resolve().parent.parent
SITE = ROOT / ".venv/lib/python3.11/site-packages"
READY_S = 60


class Reader(Protocol):
    """An opened disk."""

    def pread(self, size: int, offset: int) -> bytes:
        """Exactly that many bytes."""
        ...


class FileReader:
    """A disk that is a file."""

    def __init__(self, path: Path, *, in_order: bool) -> None:
        self._fd = os.open(path, os.O_RDONLY)
        os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_NORMAL if in_order else os.POSIX_FADV_RANDOM)

    def pread(self, size: int, offset: int) -> bytes:
        """Read."""
        return os.pread(self._fd, size, offset)

    def close(self) -> None:
        """Close."""
        os.close(self._fd)


class View:
    """A way to look at a disk. ``work`` is this tool's own folder; ``path`` the disk's file where it is one."""

    name: ClassVar[str]

    def prepare(self, work: Path, disk: Path) -> None:
        """Back the disk up, once."""

    @contextmanager
    def opened(self, work: Path, disk: Path) -> Iterator[Path]:
        """A fresh server; gives the path of the disk's file (or of a socket)."""
        raise AssertionError
        yield work

    def server_cpu_s(self, work: Path) -> float:
        """User and system time of the server so far, where it is ours."""
        return 0.0

    @contextmanager
    def reader(self, path: Path, *, in_order: bool) -> Iterator[Reader]:
        """Open what ``opened`` gave."""
        file = FileReader(path, in_order=in_order)
        try:
            yield file
        finally:
            file.close()


class Plain(View):
    """The disk image itself: the ceiling."""

    name = "plain file"

    @contextmanager
    def opened(self, work: Path, disk: Path) -> Iterator[Path]:
        """Nothing to start."""
        yield disk


class XbfsView(View):
    """`xbfs mount`."""

    name = "xbfs"

    def prepare(self, work: Path, disk: Path) -> None:
        """A full backup."""
        Xbfs().begin(work)
        Xbfs().full(work, disk)

    @contextmanager
    def opened(self, work: Path, disk: Path, *options: str) -> Iterator[Path]:
        """Mount in the background; the server's pid is in its status."""
        del disk
        mount = work / "mnt"
        mount.mkdir(exist_ok=True)
        command: list[str | Path] = [ROOT / ".venv/bin/xbfs", "mount", mount, "--background", *options]
        assert quietly(command, environment(work)) == 0, "xbfs mount failed"
        try:
            yield mount / "vms/guest/latest/disks/0.raw"
        finally:
            assert quietly([command[0], "umount", mount]) == 0, "xbfs umount failed"

    def server_cpu_s(self, work: Path) -> float:
        """User and system time of the server so far."""
        pid = json.loads((work / "mnt/.xbfs/status.json").read_text())["pid"]
        return cpu_s(pid)


class ResticView(View):
    """`restic mount`."""

    name = "restic mount"

    def prepare(self, work: Path, disk: Path) -> None:
        """A full backup."""
        Restic().begin(work)
        Restic().full(work, disk)

    @contextmanager
    def opened(self, work: Path, disk: Path) -> Iterator[Path]:
        """Mount in the foreground of a child process."""
        variables = {
            "RESTIC_PASSWORD": PASSPHRASE,
            "RESTIC_CACHE_DIR": str(work / "cache"),
            "RESTIC_REPOSITORY": str(work / "repo"),
        }
        with _fuse_server(["restic", "mount", work / "mnt"], variables, work / "mnt") as mount:
            yield next((mount / "snapshots/latest").glob(f"**/{disk.name}"))


class BorgView(View):
    """`borg mount` of chunks of 1 MiB, with the FUSE library this project has anyway."""

    name = "borg mount"

    def prepare(self, work: Path, disk: Path) -> None:
        """A full backup."""
        BorgFixed().begin(work)
        BorgFixed().full(work, disk)

    @contextmanager
    def opened(self, work: Path, disk: Path) -> Iterator[Path]:
        """Mount in the foreground of a child process."""
        # Only these: borg refuses the msgpack that stands beside them.
        modules = work / "modules"
        modules.mkdir(exist_ok=True)
        for name in ("pyfuse3", "trio", "attr", "attrs", "outcome", "sniffio", "sortedcontainers", "idna"):
            if not (modules / name).exists():
                (modules / name).symlink_to(SITE / name)
        variables = {
            "BORG_PASSPHRASE": PASSPHRASE,
            "BORG_BASE_DIR": str(work / "borg"),
            "BORG_RELOCATED_REPO_ACCESS_IS_OK": "yes",
            "BORG_FUSE_IMPL": "pyfuse3",
            "PYTHONPATH": str(modules),
        }
        command = ["borg", "mount", "--foreground", f"{work / 'repo'}::one", work / "mnt"]
        with _fuse_server(command, variables, work / "mnt") as mount:
            yield next(mount.glob(f"**/{disk.name}"))


class NbdkitView(View):
    """nbdkit's file plugin over the plain image: neither encrypted nor compressed, the network block device to beat."""

    name = "nbdkit file"

    @contextmanager
    def opened(self, work: Path, disk: Path) -> Iterator[Path]:
        """A server on a Unix socket."""
        socket = work / "nbd.sock"
        socket.unlink(missing_ok=True)
        server = start(["nbdkit", "-f", "-r", "-U", socket, "file", disk])
        try:
            _wait_for(socket.exists)
            yield socket
        finally:
            server.terminate()
            server.wait()

    @contextmanager
    def reader(self, path: Path, *, in_order: bool) -> Iterator[Reader]:
        """A connection."""
        del in_order
        with NbdReader(path) as nbd:
            yield nbd


def start(command: Sequence[object], variables: dict[str, str] | None = None) -> subprocess.Popen[bytes]:
    """A server without a terminal; ``variables`` are added to the environment."""
    nothing = subprocess.DEVNULL
    words = [str(word) for word in command]
    return subprocess.Popen(
        words, env={**os.environ, **(variables or {})}, stdin=nothing, stdout=nothing, stderr=nothing
    )


def quietly(command: Sequence[object], variables: dict[str, str] | None = None) -> int:
    """Run a command to its end; returns its exit status."""
    return start(command, variables).wait()


VIEWS: list[View] = [XbfsView(), ResticView(), BorgView(), NbdkitView(), Plain()]


def cpu_s(pid: int) -> float:
    """User and system time of a process so far (proc(5), stat)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def environment(work: Path) -> dict[str, str]:
    """What our own command line needs."""
    place = {"XBFS_REPOSITORY": str(work / "repo"), "XBFS_CACHE": str(work / "cache"), "XBFS_PASSPHRASE": PASSPHRASE}
    return {**os.environ, **place}


@contextmanager
def _fuse_server(command: Sequence[object], variables: dict[str, str], mount: Path) -> Iterator[Path]:
    mount.mkdir(exist_ok=True)
    server = start(command, variables)
    try:
        _wait_for(lambda: mount.is_mount() and any(mount.iterdir()))
        yield mount
    finally:
        for _ in range(50):
            if quietly(["fusermount3", "-u", mount]) == 0:
                break
            time.sleep(0.1)
        server.send_signal(signal.SIGINT)
        server.wait()


def _wait_for(condition: object) -> None:
    assert callable(condition)
    until = time.monotonic() + READY_S
    while not condition():
        assert time.monotonic() < until, "the server does not come up"
        time.sleep(0.02)


def available(view: View) -> bool:
    """Whether the tool a view needs is installed."""
    program = {"restic mount": "restic", "borg mount": "borg", "nbdkit file": "nbdkit"}.get(view.name)
    return program is None or shutil.which(program) is not None
