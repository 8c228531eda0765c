"""Real mounts for tests: a repository on disk, a server process, and a clean-up that leaves nothing mounted."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import suppress
from typing import TYPE_CHECKING, ClassVar, Self

from tests.support.engine import Engine
from tests.support.servers import ServerProcess
from xbfs.fuse.mount import DataPlaneKind
from xbfs.fuse.mountpoint import mounts
from xbfs_engine.storage.local import LocalStorage

if TYPE_CHECKING:
    from pathlib import Path
    from types import TracebackType


class Mounted(ServerProcess):
    """A repository below ``folder`` and, inside ``with``, a server process that has it mounted."""

    data_plane: ClassVar[DataPlaneKind] = DataPlaneKind.DEVICE

    def __init__(self, folder: Path, *, deadline_s: float = 30.0, engine: Engine | None = None) -> None:
        super().__init__(folder / "log")
        self.storage = folder / "repository"
        self.directory = folder / "mnt"
        self.control = folder / "control"
        self.deadline_s = deadline_s
        for path in (self.directory, self.control):
            path.mkdir(exist_ok=True)
        self.engine = engine or Engine.fresh(folder / "cache", LocalStorage(self.storage))
        self.user: int | None = None
        self.allow_other = False

    @property
    def vm(self) -> Path:
        return self.directory / "vms" / "vm"

    @property
    def disk(self) -> Path:
        return self.vm / "latest" / "disks" / "0.raw"

    @property
    def is_mounted(self) -> bool:
        return str(self.directory) in mounts()

    def start(self) -> None:
        """Start the server and wait until the mount is usable."""
        words = [self.storage, self.directory, self.control, "--deadline", self.deadline_s]
        words += ["--allow-other"] if self.allow_other else []
        words += ["--data-plane", self.data_plane.value]
        words += [] if self.user is None else ["--user", self.user]
        assert self.spawn("tests.support.mount_server", *words) == "ready\n"

    def signal(self, number: signal.Signals) -> int:
        """Send a signal and wait; the exit code."""
        assert self.server is not None
        self.server.send_signal(number)
        return self.wait()

    def hang(self, blob: str) -> None:
        """Let reads of a blob (or "*": of any) hang."""
        temporary = self.control / "hang.new"
        temporary.write_text(blob)
        temporary.rename(self.control / "hang")

    def release(self) -> None:
        (self.control / "hang").unlink(missing_ok=True)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()
        if self.server is not None and self.server.poll() is None:
            self.server.send_signal(signal.SIGTERM)
            try:
                self.wait()
            except subprocess.TimeoutExpired:
                self.server.kill()
                self.wait()
        elif self.server is not None and self.server.stdout is not None:
            self.server.stdout.close()
        if self.is_mounted:
            with suppress(subprocess.CalledProcessError):
                subprocess.run(["fusermount3", "-u", "-z", str(self.directory)], check=True)
        if exc is not None:
            sys.stderr.write(self.log.read_text())


def drop_page_cache(path: Path) -> None:
    """Make the kernel forget the pages of one file."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)
