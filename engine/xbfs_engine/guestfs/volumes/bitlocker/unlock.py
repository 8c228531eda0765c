"""Opening a BitLocker volume: from a secret to the volume's key, and to a source of plaintext.

Owns what a secret may be, and how each kind becomes a key. Deterministic, and slow on purpose: a second for each
protector that a password is tried on, of which `header` takes no more than a few. Callable from any thread.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import struct
from typing import TYPE_CHECKING, Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESCCM

from xbfs_engine.core.errors import GuestDamaged, GuestUnsupported
from xbfs_engine.guestfs.volumes.bitlocker import datums
from xbfs_engine.guestfs.volumes.bitlocker.plain import plaintext
from xbfs_engine.guestfs.volumes.bitlocker.protectors import CLEAR, EXTERNAL, PASSWORD, RECOVERY

if TYPE_CHECKING:
    from collections.abc import Iterator

    from xbfs_engine.formats.source import BlockSource
    from xbfs_engine.guestfs.volumes.bitlocker.datums import Datum, Protector, Sealed
    from xbfs_engine.guestfs.volumes.bitlocker.header import BitLockerHeader

_ROUNDS: Final = 1 << 20
_KEY_BYTES: Final = (16, 24, 32)
_RECOVERY: Final = re.compile(rb"\d{6}(?:[- ]?\d{6}){7}")
_RECOVERY_STEP: Final = 11
"""Each group of six digits is 16 bits of the key times this (libyal, "Recovery key")."""

_FILE_HEADER: Final = struct.Struct("<III4x16s16x")
_FILE_BYTES_MAX: Final = 4096

assert _FILE_HEADER.size == 48


def unlock(source: BlockSource, header: BitLockerHeader, secret: bytes | None) -> BlockSource | None:
    """The plaintext of a volume, or None if ``secret`` opens none of its protectors.

    A secret is a password in UTF-8, a recovery password in digits, or the content of a startup key file; without one
    the volume opens if its protection is suspended, so that it holds its own key. GuestUnsupported or GuestDamaged if
    no secret could open it.
    """
    if header.problem:
        raise GuestUnsupported(header.problem)
    for protector, key in _keys(header.protectors, secret):
        master = _unsealed(protector.sealed, key)
        if master is not None:
            return plaintext(source, header, _volume_key(header, datums.key(master)))
    return None


def _keys(protectors: tuple[Protector, ...], secret: bytes | None) -> Iterator[tuple[Protector, bytes]]:
    """What may open which protector."""
    if secret is None:
        yield from ((p, p.clear_key) for p in protectors if p.kind == CLEAR and p.clear_key is not None)
        return
    external = _startup_key(secret)
    if external is not None:
        yield from ((protector, external) for protector in protectors if protector.kind == EXTERNAL)
        return
    recovery = _recovery_key(secret)
    kind, seed = (PASSWORD, _password_seed(secret)) if recovery is None else (RECOVERY, _sha256(recovery))
    for protector in protectors:
        if protector.kind == kind and protector.salt is not None and seed is not None:
            yield protector, _stretched(seed, protector.salt)


def _startup_key(secret: bytes) -> bytes | None:
    """The key, if the secret is the content of a startup key file (``.BEK``)."""
    if not _FILE_HEADER.size < len(secret) <= _FILE_BYTES_MAX:
        return None
    size, version, header_bytes, _ = _FILE_HEADER.unpack_from(secret)
    if size != len(secret) or version != 1 or header_bytes != _FILE_HEADER.size:
        return None
    try:
        for datum in datums.datums(secret[header_bytes:]):
            if datum.type == datums.STARTUP_KEY:
                return datums.external_key(datum)
    except GuestDamaged:
        return None
    return None


def _recovery_key(secret: bytes) -> bytes | None:
    """The 128 bits of a recovery password, if the secret is one: all of its groups can be checked."""
    digits = secret.strip()
    if not _RECOVERY.fullmatch(digits):
        return None
    digits = re.sub(rb"[- ]", b"", digits)
    groups = [divmod(int(digits[at : at + 6]), _RECOVERY_STEP) for at in range(0, 48, 6)]
    if any(rest or number > 0xFFFF for number, rest in groups):
        return None
    return struct.pack("<8H", *(number for number, _ in groups))


def _password_seed(secret: bytes) -> bytes | None:
    """None if the secret is no text, which a password is."""
    try:
        words = secret.decode("utf-8").encode("utf-16-le")
    except UnicodeError:
        return None
    return _sha256(_sha256(words)) if words else None


def _sha256(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


def _stretched(seed: bytes, salt: bytes) -> bytes:
    """The key after 2^20 rounds (libyal, "Recovery key", "User key")."""
    fixed = seed + salt
    last = bytes(32)
    sha256 = hashlib.sha256
    for count in range(_ROUNDS):
        last = sha256(last + fixed + count.to_bytes(8, "little")).digest()
    return last


def _unsealed(sealed: Sealed | None, key: bytes) -> Datum | None:
    """The datum in a sealed one; None if the key is another's. GuestDamaged if it holds something else."""
    if sealed is None or len(key) not in _KEY_BYTES:
        return None
    try:
        data = AESCCM(key).decrypt(sealed.nonce, sealed.ciphertext, None)
    except InvalidTag:
        return None
    found = datums.datums(data)
    if len(found) != 1:
        raise GuestDamaged("BitLocker: what was encrypted is no key")
    return found[0]


def _volume_key(header: BitLockerHeader, master: bytes) -> bytes:
    """The key of the sectors, once the metadata have proved to be those that Windows wrote."""
    if header.validation is not None:
        digest = _unsealed(header.validation, master)
        if digest is None or not hmac.compare_digest(datums.key(digest), header.digest):
            raise GuestDamaged("BitLocker's metadata were changed by something else than Windows")
    datum = _unsealed(header.key, master)
    if datum is None:
        raise GuestDamaged("BitLocker's volume master key does not open the key of the volume")
    key = datums.key(datum)
    method = header.method
    if len(key) != method.key_bytes:
        raise GuestDamaged(f"BitLocker's key has {len(key)} bytes, of which {method.key_bytes} should be")
    return b"".join(key[part] for part in method.parts)
