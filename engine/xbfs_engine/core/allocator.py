"""How the C library's allocator is set for programs that use and free buffers of some MiB all day."""

from __future__ import annotations

import ctypes
from typing import Final

from xbfs_engine.core.limits import MIB

_M_TRIM_THRESHOLD: Final = -1
_M_MMAP_THRESHOLD: Final = -3
"""Numbers of mallopt(3)."""
KEPT_BYTES: Final = 64 * MIB


def keep_freed_memory() -> None:
    """Let freed buffers be used again instead of being given back to the kernel and faulted in anew, page by page.

    Of memory that was used at once nothing more is kept than before; up to KEPT_BYTES of it are kept for longer. Where
    the C library has no mallopt nothing happens.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return
    mallopt(_M_MMAP_THRESHOLD, 32 * MIB)
    mallopt(_M_TRIM_THRESHOLD, KEPT_BYTES)
