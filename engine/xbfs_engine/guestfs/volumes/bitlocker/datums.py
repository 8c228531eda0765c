"""Datums: the records that BitLocker's metadata and its key files are made of, one after another and in each other.

Layout and numbers: libyal, "BitLocker Drive Encryption (BDE) format", "FVE metadata entry"; what newer versions of
Windows write was compared with cryptsetup's ``lib/bitlk``. Integers are little-endian. Pure; hostile bytes give
GuestDamaged.
"""

from __future__ import annotations

import struct
import uuid
from typing import Final, NamedTuple

from xbfs_engine.core.errors import GuestDamaged

PROPERTY: Final = 0x0000
VMK: Final = 0x0002
FVEK: Final = 0x0003
STARTUP_KEY: Final = 0x0006
DESCRIPTION: Final = 0x0007
VOLUME_HEADER: Final = 0x000F
"""Types of datums: what one is for."""

KEY: Final = 0x0001
STRING: Final = 0x0002
STRETCH_KEY: Final = 0x0003
SEALED: Final = 0x0005
PROTECTED_KEY: Final = 0x0008
EXTERNAL_KEY: Final = 0x0009
PLACE: Final = 0x000F
"""Kinds of values of datums: how one is laid out."""

_HEADER: Final = struct.Struct("<HHHH")
_METHOD_BYTES: Final = 4
_SALT_BYTES: Final = 16
_NONCE_BYTES: Final = 12
_MAC_BYTES: Final = 16
_PROTECTED_BYTES: Final = 28
_EXTERNAL_BYTES: Final = 24


class Datum(NamedTuple):
    """One record."""

    type: int
    value: int
    data: bytes


class Sealed(NamedTuple):
    """A datum encrypted with AES-CCM; the code that authenticates it follows the ciphertext."""

    nonce: bytes
    ciphertext: bytes


class Protector(NamedTuple):
    """The volume master key, encrypted so that one kind of key opens it."""

    uuid: str
    kind: int
    """Bits of what is needed: see `protectors`."""
    salt: bytes | None
    """For stretching a password."""
    clear_key: bytes | None
    sealed: Sealed | None


def datums(data: bytes) -> list[Datum]:
    """The datums that follow one another, up to the end or a size of zero."""
    found = []
    at = 0
    while at + _HEADER.size <= len(data):
        size, kind, value, _ = _HEADER.unpack_from(data, at)
        if not size:
            break
        if not _HEADER.size <= size <= len(data) - at:
            raise GuestDamaged(f"BitLocker: a datum at byte {at} of {len(data)} claims {size} bytes")
        found.append(Datum(kind, value, data[at + _HEADER.size : at + size]))
        at += size
    return found


def guid(raw: bytes) -> str:
    """A GUID as Windows and cryptsetup write it, in small letters."""
    return str(uuid.UUID(bytes_le=raw))


def text(datum: Datum) -> str:
    """The text of a STRING."""
    return datum.data.decode("utf-16-le", "replace").partition("\0")[0]


def sealed(datum: Datum) -> Sealed:
    """The parts of a SEALED datum, in the order that AES-CCM takes them."""
    data = datum.data
    if len(data) < _NONCE_BYTES + _MAC_BYTES + _HEADER.size:
        raise GuestDamaged(f"BitLocker: an encrypted datum has {len(data)} bytes only")
    mac_end = _NONCE_BYTES + _MAC_BYTES
    return Sealed(data[:_NONCE_BYTES], data[mac_end:] + data[_NONCE_BYTES:mac_end])


def key(datum: Datum) -> bytes:
    """The bytes of a KEY."""
    if datum.value != KEY or len(datum.data) <= _METHOD_BYTES:
        raise GuestDamaged("BitLocker: what should be a key is none")
    return datum.data[_METHOD_BYTES:]


def protector(datum: Datum) -> Protector:
    """A PROTECTED_KEY with what it says of the key that opens it; properties that are not known are passed over."""
    data = datum.data
    if datum.value != PROTECTED_KEY or len(data) < _PROTECTED_BYTES:
        raise GuestDamaged("BitLocker: what should be a key protector is none")
    salt = clear = own = None
    for inner in datums(data[_PROTECTED_BYTES:]):
        if inner.type != PROPERTY:
            continue
        if inner.value == STRETCH_KEY and len(inner.data) >= _METHOD_BYTES + _SALT_BYTES:
            salt = inner.data[_METHOD_BYTES : _METHOD_BYTES + _SALT_BYTES]
        elif inner.value == KEY:
            clear = key(inner)
        elif inner.value == SEALED:
            own = sealed(inner)
    return Protector(guid(data[:16]), int.from_bytes(data[26:28], "little"), salt, clear, own)


def external_key(datum: Datum) -> bytes | None:
    """The key in an EXTERNAL_KEY, as a startup key file holds it."""
    if datum.value != EXTERNAL_KEY:
        return None
    for inner in datums(datum.data[_EXTERNAL_BYTES:]):
        if inner.value == KEY:
            return key(inner)
    return None
