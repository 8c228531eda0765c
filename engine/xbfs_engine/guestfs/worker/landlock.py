"""Landlock with no exceptions: no file can be opened, changed or run, no port used (Linux uapi/linux/landlock.h)."""

from __future__ import annotations

import os
import struct
from typing import Final

from xbfs_engine.guestfs.worker.kernel import syscall

_CREATE_RULESET: Final = 444
_RESTRICT_SELF: Final = 446
"""Of all architectures."""
_ASK_VERSION: Final = 1

_FILE_RIGHTS: Final = (0, 13, 14, 15, 15, 16)
"""How many rights on files there are, by ABI; the last one's are those of later ones."""
_PORT_RIGHTS: Final = (4, 0b11)
_SCOPES: Final = (6, 0b11)
"""Abstract sockets and signals of others. Both: first ABI, and bits."""


def restrict() -> str:
    """Put it in force; which ABI. Raises OSError where the kernel has none."""
    abi = syscall(_CREATE_RULESET, None, 0, _ASK_VERSION)
    rights = (1 << _FILE_RIGHTS[min(abi, len(_FILE_RIGHTS) - 1)]) - 1
    attributes = struct.pack("=Q", rights)
    for first_abi, bits in (_PORT_RIGHTS, _SCOPES):
        if abi >= first_abi:
            attributes += struct.pack("=Q", bits)
    ruleset = syscall(_CREATE_RULESET, attributes, len(attributes), 0)
    try:
        syscall(_RESTRICT_SELF, ruleset, 0)
    finally:
        os.close(ruleset)
    return f"ABI {abi}"
