"""What a filesystem or another thing on a device says of itself at first sight, and how text of a disk is shown."""

from __future__ import annotations

import uuid
from typing import Final, NamedTuple

HEAD_BYTES: Final = 68 << 10
"""The beginning of a device that filesystems are recognised by: up to the superblock of btrfs."""


class Signature(NamedTuple):
    """What a device holds."""

    kind: str
    """As ``blkid`` names it; ``unknown`` if nothing is known that looks like it."""
    label: str = ""
    uuid: str = ""
    """As ``blkid`` writes it."""
    size_bytes: int = 0
    """What it claims to need of the device; 0 if it does not say."""
    note: str = ""
    """A sentence that whoever opens it should know; empty if there is none."""


def plain_uuid(raw: bytes) -> str:
    """The usual spelling of a UUID in the order of its bytes; empty for one of zeros, which means none."""
    return str(uuid.UUID(bytes=raw)) if any(raw) else ""


def text_of(raw: bytes) -> str:
    """Text up to the first NUL, without spaces at its end."""
    return raw.partition(b"\0")[0].decode("utf-8", "replace").rstrip()
