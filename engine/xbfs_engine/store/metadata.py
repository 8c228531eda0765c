"""What metadata packs hold: a body that is hashed, and hints that are not.

The id of a metadata chunk covers its body only. Hints (where children lie) may therefore be written anew, by
compaction, without a change of any id up to the manifest. They are still authenticated by the pack's AEAD.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from xbfs_engine.core.errors import MapCorrupt

if TYPE_CHECKING:
    from xbfs_engine.codec.compress import Buffer

LENGTH = struct.Struct("<I")
"""Bytes of the body, before it."""


def metadata_chunk(body: bytes, hints: bytes) -> bytes:
    """The plaintext of a metadata chunk."""
    return LENGTH.pack(len(body)) + body + hints


def metadata_body(plaintext: Buffer) -> memoryview:
    """The hashed part of a metadata chunk. Raises MapCorrupt."""
    view = memoryview(plaintext)
    if len(view) < LENGTH.size or (end := LENGTH.size + LENGTH.unpack_from(view)[0]) > len(view):
        raise MapCorrupt("a metadata chunk is shorter than it says")
    return view[LENGTH.size : end]


def metadata_hints(plaintext: Buffer) -> memoryview:
    """The part after the body. Raises MapCorrupt."""
    return memoryview(plaintext)[LENGTH.size + len(metadata_body(plaintext)) :]
