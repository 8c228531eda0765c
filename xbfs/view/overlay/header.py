"""The header of an overlay: what it lies over, and how big it is. Pure; `docs/overlay-format.md` tells every byte.

Two equal copies lie in two pages. A change writes the first, durably, then the second: a crash leaves one whole.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass, replace
from typing import Final

from xbfs_engine.core.errors import FormatTooNew, IntegrityError
from xbfs_engine.core.limits import DISK_SIZE_MAX

COPY_OFFSETS: Final = (0, 4096)
"""Where the copies lie: never in one page, which the kernel writes at once."""
RECORD_BYTES: Final = 512
"""A copy is one sector, which a disk writes whole or not at all."""
FILE_BYTES: Final = COPY_OFFSETS[-1] + RECORD_BYTES
CLAIMS_OFFSET: Final = 8192
"""Where a byte for each page of the map lies; the file ends before it while none of them is set."""

_MAGIC: Final = b"XBFSOVL\0"
_VERSION: Final = 1
_FIELDS: Final = struct.Struct("<8sIHHQQQQ")
_HYDRATED: Final = 1
"""The one flag there is."""
_DIGEST_BYTES: Final = hashlib.sha256().digest_size
IDENTITY_BYTES_MAX: Final = RECORD_BYTES - _FIELDS.size - _DIGEST_BYTES
"""432 bytes: what is left of the sector."""
assert _FIELDS.size == 48
assert IDENTITY_BYTES_MAX == 432

_DAMAGED_HINT: Final = "the header can not be made up: begin a new overlay, or bring the file back from a copy"


@dataclass(frozen=True, slots=True)
class Header:
    """What an overlay remembers of itself; sizes in bytes."""

    identity: bytes
    """Of the point and disk that is the base; opaque, at most IDENTITY_BYTES_MAX."""
    base_size: int
    base_limit: int
    """Where the base ends for ever: the smallest size the overlay ever had, at most ``base_size``."""
    size: int
    """The present size, 0 to DISK_SIZE_MAX."""
    generation: int = 1
    """Counts the changes, from 1."""
    is_hydrated: bool = False
    """Whether everything that the base holds was copied: what is absent from the map are its zeros."""

    def resized(self, size_bytes: int) -> Header:
        """The next header, with another size. What is cut off never comes back: the base ends there from now on."""
        limit = min(self.base_limit, size_bytes)
        return replace(self, size=size_bytes, base_limit=limit, generation=self.generation + 1)

    def hydrated(self) -> Header:
        """The next header, of an overlay that does not need its base any more."""
        return replace(self, is_hydrated=True, generation=self.generation + 1)


def encode(header: Header) -> bytes:
    """One copy: RECORD_BYTES."""
    identity = header.identity
    assert len(identity) <= IDENTITY_BYTES_MAX
    flags = _HYDRATED if header.is_hydrated else 0
    sizes = (header.base_size, header.base_limit, header.size)
    body = _FIELDS.pack(_MAGIC, _VERSION, len(identity), flags, header.generation, *sizes) + identity.ljust(
        IDENTITY_BYTES_MAX, b"\0"
    )
    return body + hashlib.sha256(body).digest()


def decode(content: bytes) -> Header | None:
    """The latest header in the bytes of a header file; None if they are all zero or missing: it was never written.

    Raises FormatTooNew; IntegrityError if no copy is whole.
    """
    if not content.strip(b"\0"):
        return None
    copies = [_decode_copy(content[at : at + RECORD_BYTES]) for at in COPY_OFFSETS]
    whole = [copy for copy in copies if copy is not None]
    if not whole:
        raise IntegrityError("both copies of the overlay's header are damaged", hint=_DAMAGED_HINT)
    return max(whole, key=lambda header: header.generation)


def _decode_copy(record: bytes) -> Header | None:
    """One copy, or None if it is torn or damaged. Raises FormatTooNew, IntegrityError."""
    body, digest = record[:-_DIGEST_BYTES], record[-_DIGEST_BYTES:]
    if len(record) != RECORD_BYTES or not body.startswith(_MAGIC) or hashlib.sha256(body).digest() != digest:
        return None
    _, version, identity_bytes, flags, generation, base_size, base_limit, size = _FIELDS.unpack_from(body)
    if version != _VERSION:
        raise FormatTooNew(f"the overlay has version {version}, known is {_VERSION}")
    if flags & ~_HYDRATED:
        raise FormatTooNew(f"the overlay has flags {flags:#x}, known is {_HYDRATED:#x}")
    identity = body[_FIELDS.size :][:identity_bytes]
    header = Header(identity, base_size, base_limit, size, generation, is_hydrated=bool(flags & _HYDRATED))
    fits = base_limit <= min(base_size, size) and max(base_size, size) <= DISK_SIZE_MAX and generation >= 1
    if not fits or identity_bytes > IDENTITY_BYTES_MAX or encode(header) != record:
        raise IntegrityError("the overlay's header contradicts itself", hint=_DAMAGED_HINT)
    return header
