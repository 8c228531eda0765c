"""What workers may use, and how long their callers wait."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from xbfs_engine.core.limits import GIB, KIB, MIB

BLOCK_BYTES_MAX: Final = 1 * MIB
"""Longest read of a disk that a worker may ask for at once."""

CACHED_BLOCK_BYTES: Final = 64 * KIB
"""Reads of a disk shorter than this go through the worker's cache, which holds blocks of this size."""
CACHE_BYTES: Final = 16 * MIB

FRAME_BYTES_MAX: Final = 16 * MIB
"""Longest message: all attributes of a file with room to spare (guest.XATTRS_BYTES_MAX)."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of one guest's worker. Seconds of a request count only while the worker itself is busy, not while the
    storage answers it; memory is on top of what a worker has before it sees a disk."""

    metadata_s: float = 10.0
    """A request that reads no content."""
    read_s: float = 30.0
    """A read of content."""
    open_s: float = 30.0
    """The search for volumes, the opening of one, and the guest's own tree."""
    unlock_s: float = 120.0
    """The search for volumes when keys are given: each costs what cryptsetup's parameters say."""
    start_s: float = 30.0
    """Start of a process, all of its imports included."""
    whole_s: float = 900.0
    """Any request with everything: a worker that is taken over could keep the storage busy for ever."""
    waiting_s: float = 60.0
    """How long a caller waits for requests before its own."""
    memory_bytes: int = 1 * GIB
    unlock_memory_bytes: int = 4 * GIB
    """On top of it when keys are given: the most memory that LUKS2 uses for Argon2."""
    ends_max: int = 5
    """After more ends of workers over one volume it is not read again."""
