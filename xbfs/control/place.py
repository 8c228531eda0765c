"""Where control sockets are, and how both ends make sure of each other. Keeps no state."""

from __future__ import annotations

import os
import socket
import stat
import struct
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final, Protocol

from xbfs_engine.core.errors import MountError

if TYPE_CHECKING:
    from collections.abc import Mapping

_SUFFIX: Final = ".control"
_PEER: Final = struct.Struct("3i")
"""struct ucred: pid, uid, gid (unix(7), SO_PEERCRED)."""


def make_directory(environment: Mapping[str, str]) -> Path:
    """The directory for this user's sockets: below XDG_RUNTIME_DIR, /run for root, else the cache of the user.

    Raises MountError unless it is ours alone: whoever else could write there could take a mount's place.
    """
    base = environment.get("XDG_RUNTIME_DIR") or ("/run" if os.geteuid() == 0 else str(Path.home() / ".cache"))
    directory = Path(base) / "xbfs"
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = directory.lstat()
    except OSError as exc:
        raise MountError(f"{directory} can not be made: {exc.strerror}") from exc
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
        raise MountError(f"{directory} does not belong to this user")
    if status.st_mode & 0o022:
        raise MountError(f"{directory} can be written by others", hint=f"chmod 700 {directory}")
    return directory


def socket_path(directory: Path) -> Path:
    """The socket of this process; those of processes that are gone are taken away."""
    for old in directory.glob(f"*{_SUFFIX}"):
        if old.stem.isdigit() and not Path("/proc", old.stem).exists():
            with suppress(OSError):
                old.unlink()
    return directory / f"{os.getpid()}{_SUFFIX}"


class Connection(Protocol):
    """What is used of a socket of either library."""

    def getsockopt(self, level: int, option: int, size: int, /) -> bytes:
        """As getsockopt(2)."""
        ...


def is_trusted(peer: Connection) -> bool:
    """Whether the other end of a connection is root's or this user's."""
    _, uid, _ = _PEER.unpack(peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size))
    return uid in (0, os.geteuid())
