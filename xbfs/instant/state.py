"""Where the sessions of a repository lie on this machine. Pure, but for who serves them: one process at a time."""

from __future__ import annotations

import fcntl
import os
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from xbfs_engine.core.errors import SessionBusy
from xbfs_engine.storage.files import make_directories, storage_error

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

VARIABLE: Final = "XBFS_STATE"
_SYSTEM: Final = Path("/var/lib/xbfs")
_PID_BYTES: Final = 10


@dataclass(frozen=True, slots=True)
class StateDirectory:
    """``path`` holds all that is kept of one repository's sessions."""

    path: Path

    @property
    def sessions(self) -> Path:
        """A directory of each session."""
        return self.path / "sessions"

    @property
    def live(self) -> Path:
        """Where the live mount is."""
        return self.path / "live"

    @property
    def nfs(self) -> Path:
        """What the NFS server keeps."""
        return self.path / "nfs"

    @property
    def device_file(self) -> Path:
        """The live mount's device number, which NFS clients' handles hold (``xbfs.serve.device``)."""
        return self.path / "device"

    @property
    def log_file(self) -> Path:
        """What a server in the background logs."""
        return self.path / "server.log"

    @property
    def control_file(self) -> Path:
        """Says where the server's control socket is: its directory is another user's or service's choice."""
        return self.path / "control"

    def session(self, name: str) -> Path:
        """The directory of a session."""
        return self.sessions / name

    def make(self) -> None:
        """Have the directories, but for the mount point, which may be of a mount that is dead. Raises StorageError."""
        make_directories(self.sessions)

    @contextmanager
    def changing(self) -> Iterator[None]:
        """Only one process at a time makes, opens or erases sessions. Waits; raises StorageError."""
        self.make()
        with _lock(self.path / "sessions.lock", fcntl.LOCK_EX):
            yield

    def server(self) -> int | None:
        """The process that is ``serving``, if that can be told."""
        with suppress(OSError, ValueError):
            pid = int(self._server_lock.read_text())
            lock = self._server_lock.stat()
            for descriptor in Path(f"/proc/{pid}/fd").iterdir():
                with suppress(OSError):
                    if os.path.samestat(descriptor.stat(), lock):
                        return pid
        return None

    @property
    def _server_lock(self) -> Path:
        return self.path / "server.lock"

    @contextmanager
    def serving(self) -> Iterator[None]:
        """Only one process, with those it forks, serves the sessions. Raises SessionBusy, StorageError."""
        self.make()
        path = self._server_lock
        try:
            with _lock(path, fcntl.LOCK_EX | fcntl.LOCK_NB) as descriptor:
                # It only tells who it is. In its place, always as long: a full disk has room for that.
                with suppress(OSError):
                    os.pwrite(descriptor, f"{os.getpid():<{_PID_BYTES}}".encode(), 0)
                yield
        except BlockingIOError:
            raise SessionBusy(
                f"process {path.read_text().strip() or '?'} serves the sessions already",
                hint="end it with SIGTERM, or let it",
            ) from None


def state_of(repository_id: str, environment: Mapping[str, str]) -> StateDirectory:
    """XBFS_STATE, else /var/lib/xbfs for root, else xbfs below XDG_STATE_HOME or ~/.local/state; one a repository."""
    chosen = environment.get(VARIABLE)
    if chosen:
        base = Path(chosen).absolute()
    elif os.geteuid() == 0:
        base = _SYSTEM
    else:
        base = Path(environment.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "xbfs"
    return StateDirectory(base / repository_id)


@contextmanager
def _lock(path: Path, how: int) -> Iterator[int]:
    """Inside ``with``; the file's descriptor."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as exc:
        raise storage_error(exc, f"lock {path}") from exc
    try:
        fcntl.flock(descriptor, how)
        yield descriptor
    finally:
        os.close(descriptor)
