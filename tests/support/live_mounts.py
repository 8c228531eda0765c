"""A live mount for tests: one session in a state directory of its own, a server process, and a clean-up."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Self

from tests.support.servers import ServerProcess
from xbfs.fuse.mountpoint import mounts
from xbfs.vfs.live.stubs import place_stub

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path
    from types import TracebackType

ASLEEP_S = 10
SESSION = "vm"


class LiveMounted(ServerProcess):
    """Inside ``with`` a server shows a session whose disks are ``disk``s; everything lies below ``folder``."""

    def __init__(self, folder: Path, *, deadline_s: float = 30.0, passes: bool = False) -> None:
        super().__init__(folder / "log")
        self.state = folder / "sessions"
        self.mount = folder / "live"
        self.control = folder / "control"
        self.deadline_s = deadline_s
        self.passes = passes
        for path in (self.state, self.mount, self.control):
            path.mkdir(parents=True, exist_ok=True)

    @property
    def directory(self) -> Path:
        """The session in the mount."""
        return self.mount / SESSION

    @property
    def backing(self) -> Path:
        return self.state / SESSION / "tree"

    def disk(self, path: str, key: str, size: int, chunks: Sequence[int] = (), *, session: str = SESSION) -> None:
        """A disk of ``size`` bytes whose ``chunks`` (of 64 KiB) hold something."""
        home = self.state / session
        (home / "disks").mkdir(parents=True, exist_ok=True)
        (home / "disks" / key).write_text(f"{size};{','.join(map(str, chunks))}")
        place_stub(home / "tree", path, key)

    def start(self) -> None:
        words = (self.state, self.mount, self.control, "--deadline", self.deadline_s, *["--passes"] * self.passes)
        assert self.spawn("tests.support.live_server", *words) == "ready\n"

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Signal the server, and take what it leaves mounted away."""
        assert self.server is not None
        self.server.send_signal(number)
        try:
            code = self.wait()
        except subprocess.TimeoutExpired:
            self.server.kill()
            code = self.wait()
        if str(self.mount) in mounts():
            with suppress(subprocess.CalledProcessError):
                subprocess.run(["fusermount3", "-u", "-z", str(self.mount)], check=True)
        return code

    @contextmanager
    def asleep(self) -> Iterator[None]:
        """Whatever is done inside is done by the kernel alone. It asks once, before the first write after a stat."""
        server = self.server
        assert server is not None
        awake = threading.Event()

        def wake() -> None:
            awake.set()
            server.send_signal(signal.SIGCONT)

        alarm = threading.Timer(ASLEEP_S, wake)
        server.send_signal(signal.SIGSTOP)
        alarm.start()
        try:
            yield
        finally:
            alarm.cancel()
            server.send_signal(signal.SIGCONT)
        assert not awake.is_set(), "the server was asked"

    def restart(self, number: signal.Signals = signal.SIGTERM) -> None:
        self.stop(number)
        self.start()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        (self.control / "hang").unlink(missing_ok=True)
        if self.server is not None and self.server.poll() is None:
            self.stop()
        if exc is not None:
            sys.stderr.write(self.log.read_text())
