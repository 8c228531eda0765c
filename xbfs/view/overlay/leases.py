"""Who else has a file open, or mapped: the kernel says so when it is asked for a lease on it (fcntl(2), F_SETLEASE).

Programs that the kernel gave a disk's file to (``Overlay.passthrough_fd``) have it open without a descriptor, and those
that have mapped it keep it when they have closed it, all of them also when the server has ended.
"""

from __future__ import annotations

import errno
import fcntl
import os
import signal


def has_writers(path: str | os.PathLike[str]) -> bool:
    """Whether anybody has the file open for writing. Raises OSError if it can not be opened."""
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        return _is_refused(fd, fcntl.F_RDLCK)
    finally:
        os.close(fd)


def has_others(fd: int) -> bool:
    """Whether anybody has the file of a descriptor, which was opened for writing, open but by that."""
    return _is_refused(fd, fcntl.F_WRLCK)


def _is_refused(fd: int, kind: int) -> bool:
    try:
        # Whoever opens the file just then has this process get a signal, which is no harm if it is this one.
        fcntl.fcntl(fd, fcntl.F_SETSIG, signal.SIGURG)
        fcntl.fcntl(fd, fcntl.F_SETLEASE, kind)
    except OSError as exc:
        return exc.errno == errno.EAGAIN  # others: the file system has no leases, or the file is somebody else's
    fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    return False
