"""How a worker gives up its rights before it meets a disk."""

from __future__ import annotations

import ctypes
import os
import signal
from typing import NamedTuple

_PR_SET_PDEATHSIG = 1


class Confinement(NamedTuple):
    """What of the sandbox is in force, and what this kernel or container does not allow; each a few words."""

    in_force: tuple[str, ...]
    missing: tuple[str, ...]


def die_with(parent: int) -> None:
    """Be killed when the parent ends."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(0)


def confine(memory_bytes: int) -> Confinement:
    """Give up everything but the open sockets and memory."""
    return Confinement((), ("everything",))
