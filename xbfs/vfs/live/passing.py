"""Whether the kernel reads and writes a hydrated disk's file itself, without asking (FUSE passthrough): ADR 0008.

Owns the openings of one disk, all of which are of one kind: its file is the kernel's from the first opening, if it is
hydrated then, until the last is closed, and nobody has it mapped any more, which FUSE does not tell. Any thread may
call it.
"""

from __future__ import annotations

import os
import threading
from contextlib import suppress
from typing import TYPE_CHECKING, Protocol

from xbfs.view.overlay.leases import has_others
from xbfs_engine.core.errors import SessionBusy, XbfsError
from xbfs_engine.core.log import Logger

if TYPE_CHECKING:
    from xbfs.view.overlay import Overlay

_log = Logger("xbfs.live")


class Backings(Protocol):
    """Where files are registered that the kernel shall use."""

    def open(self, fd: int) -> int:
        """The number of the file of a descriptor. Raises OSError where the system does not allow it."""
        ...

    def close(self, number: int) -> None:
        """Nobody is told this number from now on; who was goes on."""
        ...


class Passing:
    """Of one disk whose session wants it. ``stub``: a path to its stub; ``label``: what the log calls it."""

    __slots__ = (
        "_backings",
        "_label",
        "_lock",
        "_moved_ns",
        "_number",
        "_openings",
        "_overlay",
        "_refused",
        "_stub",
        "fd",
    )

    def __init__(self, overlay: Overlay, stub: str, label: str) -> None:
        self._overlay = overlay
        self._stub = stub
        self._label = label
        self._lock = threading.Lock()
        self._openings = 0
        self._number: int | None = None
        self._backings: Backings | None = None
        self._moved_ns = 0
        self._refused = ""
        self.fd: int | None = None

    def open(self, backings: Backings) -> int | None:
        """One opening more: the number of the file that the kernel uses for it; None: it asks us. May block."""
        with self._lock:
            # Before we hear of a close the kernel has done with it: to the kernel there are never more than these.
            if self._openings == 0 and self._number is None:
                self._begin(backings)
            self._openings += 1
            return self._number

    def close(self) -> None:
        """One opening less."""
        with self._lock:
            self._openings -= 1
        self.settle()

    def settle(self) -> None:
        """End it if nobody has the disk open or mapped."""
        if self._openings or self._number is None:
            return
        with self._lock:
            if self._openings == 0 and self.fd is not None and not has_others(self.fd):
                self._end()

    def leave(self) -> None:
        """The disk is taken away: who has it open goes on in a file that is not the disk's any more."""
        with self._lock:
            self._end()

    def has_moved(self) -> bool:
        """Whether the kernel has written since the last call."""
        fd = self.fd
        if fd is None:
            return False
        before, self._moved_ns = self._moved_ns, os.fstat(fd).st_mtime_ns
        return self._moved_ns != before

    @property
    def is_longer(self) -> bool:
        """Whether something was written behind the disk's end, which the kernel does not ask about."""
        fd = self.fd
        return fd is not None and os.fstat(fd).st_size > self._overlay.size_bytes

    def _begin(self, backings: Backings) -> None:
        try:
            _try(backings, self._stub)
            fd = self._overlay.passthrough_fd()
        except OSError as exc:
            self._tell(f"the system refuses it: {exc.strerror}")
            return
        except SessionBusy:
            return  # a commit reads the disk: this time without
        except XbfsError as exc:
            self._tell(exc.message)
            return
        if fd is None:
            return
        try:
            self._number = backings.open(fd)
        except OSError as exc:
            self._overlay.end_passthrough()
            self._tell(f"the system refuses it: {exc.strerror}")
            return
        self._moved_ns = os.fstat(fd).st_mtime_ns
        self._backings, self.fd, self._refused = backings, fd, ""

    def _end(self) -> None:
        if self._number is None or self._backings is None:
            return
        if self.is_longer:
            _log.warning("what was written behind the end of a disk is cut off", file=self._label)
        self._backings.close(self._number)
        self._number = self._backings = self.fd = None
        with suppress(XbfsError):  # what could not be is told at the next flush
            self._overlay.end_passthrough()

    def _tell(self, problem: str) -> None:
        """Once for each reason."""
        if problem != self._refused:
            self._refused = problem
            _log.warning("a disk is not passed through", file=self._label, problem=problem)


def _try(backings: Backings, stub: str) -> None:
    """With the stub, which lies in the same file system: all units of a disk that was given to the kernel count as
    written from then on. Raises OSError."""
    fd = os.open(stub, os.O_RDONLY | os.O_CLOEXEC)
    try:
        backings.close(backings.open(fd))
    finally:
        os.close(fd)
