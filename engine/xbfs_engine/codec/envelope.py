"""Sealed objects: a header with a fresh key sealed to the repository, and AES-256-GCM under that key.

Packs, index blobs and manifests all begin with the same 128-byte header (docs/format.md, "Object header"). Nonces are
ordinals under a key that is used for one object only, so no nonce is ever shared, whoever writes.
"""

from __future__ import annotations

import struct
from enum import IntEnum
from typing import TYPE_CHECKING, NamedTuple

from blake3 import blake3
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hpke import AEAD, KDF, KEM, Suite

from xbfs_engine.codec.compress import Compressor, Encoding, decompress
from xbfs_engine.core.errors import FormatTooNew, IntegrityError
from xbfs_engine.core.limits import OBJECT_SIZE_MAX

if TYPE_CHECKING:
    from xbfs_engine.codec.keys import KeySet

MAGIC = b"XBFSOBJ\0"
VERSION = 1
SUITE = 1
"""HPKE base mode DHKEM(X25519, HKDF-SHA256), HKDF-SHA256, AES-256-GCM (RFC 9180); payloads AES-256-GCM."""

KEY_SIZE = 32
TAG_SIZE = 16
_PREFIX = struct.Struct("<8sBBHI")
SEALED_KEY_SIZE = 32 + KEY_SIZE + TAG_SIZE
HEADER_SIZE = 128
assert _PREFIX.size + SEALED_KEY_SIZE + 32 == HEADER_SIZE

LAST_NONCE = b"\xff" * 12
_PAYLOAD = struct.Struct("<BxxxI")
_COMMITMENT_CONTEXT = "xbfs 2026-11 object key commitment"
_INFO = b"xbfs object key v1"


class ObjectKind(IntEnum):
    """What an object is; bound into its key, so that one kind never passes for another."""

    DATA_PACK = 1
    METADATA_PACK = 2
    INDEX = 3
    MANIFEST = 4
    FILE_INDEX = 5
    BOOT_TEST = 6


class OpenedHeader(NamedTuple):
    """A header whose key could be unsealed."""

    kind: ObjectKind
    epoch: int
    aead: AESGCM


def nonce(ordinal: int) -> bytes:
    """The nonce of the ordinal-th sealed piece of an object: 96 bits, big-endian."""
    return ordinal.to_bytes(12, "big")


def _suite() -> Suite:
    return Suite(KEM.X25519, KDF.HKDF_SHA256, AEAD.AES_256_GCM)


def make_header(keys: KeySet, kind: ObjectKind, object_key: bytes) -> bytes:
    """The header of a new object whose fresh random key is ``object_key`` (32 bytes)."""
    epoch = keys.current
    pair = epoch.data if kind is ObjectKind.DATA_PACK else epoch.metadata
    prefix = _PREFIX.pack(MAGIC, VERSION, kind, SUITE, epoch.number)
    public = X25519PublicKey.from_public_bytes(pair.public)
    sealed = _suite().encrypt(object_key, public, info=_INFO + keys.repository_id + prefix)
    commitment = blake3(object_key, derive_key_context=_COMMITMENT_CONTEXT).digest()
    return prefix + sealed + commitment


def open_header(keys: KeySet, header: bytes, kind: ObjectKind, what: str) -> OpenedHeader:
    """Unseal an object's key. ``what`` names the object in errors.

    Raises IntegrityError (damaged, of another kind or of another repository), FormatTooNew, KeyNotHeld.
    """
    if len(header) < HEADER_SIZE:
        raise IntegrityError(f"{what} is truncated: {len(header)} bytes, its header has {HEADER_SIZE}")
    magic, version, found_kind, suite, epoch = _PREFIX.unpack_from(header)
    if magic != MAGIC:
        raise IntegrityError(f"{what} does not begin with the object magic")
    if version != VERSION or suite != SUITE:
        raise FormatTooNew(f"{what} has object version {version}, suite {suite}")
    if found_kind != kind:
        raise IntegrityError(f"{what} is of kind {found_kind}, expected {kind.value}")
    private = X25519PrivateKey.from_private_bytes(keys.private(epoch, data=kind is ObjectKind.DATA_PACK))
    prefix = header[: _PREFIX.size]
    sealed = header[_PREFIX.size : _PREFIX.size + SEALED_KEY_SIZE]
    try:
        object_key = _suite().decrypt(bytes(sealed), private, info=_INFO + keys.repository_id + bytes(prefix))
    except InvalidTag as exc:
        raise IntegrityError(f"{what}: its key does not open with this repository's keys") from exc
    commitment = blake3(object_key, derive_key_context=_COMMITMENT_CONTEXT).digest()
    if commitment != header[_PREFIX.size + SEALED_KEY_SIZE : HEADER_SIZE]:
        raise IntegrityError(f"{what}: its key does not match the commitment in the header")
    return OpenedHeader(kind, epoch, AESGCM(object_key))


def seal_object(keys: KeySet, kind: ObjectKind, payload: bytes, object_key: bytes, *, level: int = 3) -> bytes:
    """A whole object with one payload: header, then the payload, compressed where that helps, sealed."""
    header = make_header(keys, kind, object_key)
    encoding, body = Compressor(level).encode(payload)
    plain = _PAYLOAD.pack(encoding, len(payload)) + bytes(body)
    return header + AESGCM(object_key).encrypt(nonce(0), plain, header)


def open_object(keys: KeySet, kind: ObjectKind, blob: bytes, what: str) -> bytes:
    """The payload of an object made by ``seal_object``. Raises IntegrityError, FormatTooNew, KeyNotHeld."""
    opened = open_header(keys, blob, kind, what)
    try:
        plain = opened.aead.decrypt(nonce(0), blob[HEADER_SIZE:], blob[:HEADER_SIZE])
    except InvalidTag as exc:
        raise IntegrityError(f"{what} does not authenticate: its bytes were changed") from exc
    if len(plain) < _PAYLOAD.size:
        raise IntegrityError(f"{what} has no payload")
    encoding, size = _PAYLOAD.unpack_from(plain)
    if size > OBJECT_SIZE_MAX:
        raise IntegrityError(f"{what} says it holds {size} bytes, more than the {OBJECT_SIZE_MAX} allowed")
    return bytes(decompress(Encoding.known(encoding, what), memoryview(plain)[_PAYLOAD.size :], size, what))
