"""Opening a LUKS volume: from a secret to the volume key, and to a source of plaintext.

Owns the costs that are accepted: a hostile header can ask for any number of iterations and any amount of memory, and
gets no more than what cryptsetup itself would make. Deterministic, and slow on purpose: up to a minute and 4 GiB for
each key slot. Callable from any thread.
"""

from __future__ import annotations

import hashlib
import hmac
from typing import TYPE_CHECKING, Final

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.kdf.argon2 import Argon2i, Argon2id

from xbfs_engine.core.errors import GuestDamaged, GuestLocked, GuestUnsupported
from xbfs_engine.core.limits import GIB, KIB, MIB
from xbfs_engine.guestfs.volumes.crypt import SECTOR, CipherSpec, CryptSource, SectorCipher
from xbfs_engine.guestfs.volumes.sources import Slice

if TYPE_CHECKING:
    from xbfs_engine.formats.source import BlockSource
    from xbfs_engine.guestfs.volumes.luks.header import Kdf, Keyslot, LuksHeader

_PBKDF2_ITERATIONS_MAX: Final = 100_000_000
"""cryptsetup aims at two seconds, on fast machines ten million."""

_ARGON2_MEMORY_KIB_MAX: Final = 4 * GIB // KIB
_ARGON2_WORK_KIB_MAX: Final = 64 * GIB // KIB
"""Memory times passes: about a minute."""

_ARGON2_LANES_MAX: Final = 64
_SALT_BYTES: Final = range(8, 1025)
_STRIPES_MAX: Final = 1 << 16
"""cryptsetup always makes 4000."""

_AREA_BYTES_MAX: Final = 16 * MIB
_HASHES: Final = frozenset({"sha1", "sha224", "sha256", "sha384", "sha512", "ripemd160", "sha3-256", "sha3-512"})
_DIGEST_BYTES: Final = range(16, 65)


def unlock(source: BlockSource, header: LuksHeader, secret: bytes) -> BlockSource | None:
    """The plaintext of a volume, or None if ``secret`` opens none of its key slots.

    GuestLocked: it opens none, but not all of them could be tried. GuestUnsupported or GuestDamaged if no secret could
    open it.
    """
    if header.problem:
        raise GuestUnsupported(header.problem)
    refused: GuestDamaged | GuestUnsupported | None = None
    tried = False
    for slot in header.keyslots:
        try:
            key = _open_slot(source, header, slot, secret)
        except (GuestDamaged, GuestUnsupported) as error:
            refused = refused or error
            continue
        tried = True
        if key is not None:
            return _plaintext(source, header, key)
    if not tried:
        raise refused or GuestUnsupported("no key slot takes a passphrase")
    if refused is not None:
        raise GuestLocked(f"not every key slot could be tried: {refused.message}") from refused
    return None


def _plaintext(source: BlockSource, header: LuksHeader, key: bytes) -> BlockSource:
    cipher = SectorCipher(CipherSpec.parse(header.cipher, len(key)), key)
    size = source.size_bytes - header.data_start if header.data_bytes is None else header.data_bytes
    return CryptSource(Slice(source, header.data_start, size), cipher, header.sector_bytes, header.first_sector)


def _open_slot(source: BlockSource, header: LuksHeader, slot: Keyslot, secret: bytes) -> bytes | None:
    """The volume key if the secret is this slot's."""
    CipherSpec.parse(header.cipher, slot.key_bytes)
    area_cipher = CipherSpec.parse(slot.area_cipher, slot.area_key_bytes)
    if not 0 < slot.stripes <= _STRIPES_MAX or slot.key_bytes * slot.stripes > _AREA_BYTES_MAX:
        raise GuestDamaged(f"a LUKS key slot claims {slot.stripes} stripes of {slot.key_bytes} bytes")
    if len(header.digest.value) not in _DIGEST_BYTES:
        raise GuestDamaged(f"a LUKS digest of {len(header.digest.value)} bytes can not be")
    split_bytes = slot.key_bytes * slot.stripes
    area = Slice(source, slot.area_start, -(-split_bytes // SECTOR) * SECTOR).read_at(
        0, -(-split_bytes // SECTOR) * 512
    )
    key = _derive(slot.kdf, secret, slot.area_key_bytes)
    split = SectorCipher(area_cipher, key).decrypt(area, 0, SECTOR)[:split_bytes]
    candidate = _merge(split, slot.key_bytes, slot.split_hash)
    digest = _derive(header.digest.kdf, candidate, len(header.digest.value))
    return candidate if hmac.compare_digest(digest, header.digest.value) else None


def _derive(kdf: Kdf, secret: bytes, length: int) -> bytes:
    if len(kdf.salt) not in _SALT_BYTES:
        raise GuestDamaged(f"a LUKS salt of {len(kdf.salt)} bytes can not be")
    if kdf.kind == "pbkdf2":
        if not 0 < kdf.iterations <= _PBKDF2_ITERATIONS_MAX:
            raise GuestUnsupported(f"a LUKS key slot asks for {kdf.iterations} iterations of PBKDF2")
        return hashlib.pbkdf2_hmac(_hash(kdf.hash), secret, kdf.salt, kdf.iterations, length)
    if kdf.kind not in ("argon2i", "argon2id"):
        raise GuestUnsupported(f"a LUKS key slot uses {kdf.kind[:32]!r}, which is not known here")
    if (
        not 0 < kdf.lanes <= _ARGON2_LANES_MAX
        or not 8 * kdf.lanes <= kdf.memory_kib <= _ARGON2_MEMORY_KIB_MAX
        or not 0 < kdf.iterations * kdf.memory_kib <= _ARGON2_WORK_KIB_MAX
    ):
        raise GuestUnsupported(
            f"a LUKS key slot asks for {kdf.iterations} passes over {kdf.memory_kib} KiB with {kdf.lanes} lanes"
        )
    algorithm = Argon2i if kdf.kind == "argon2i" else Argon2id
    try:
        return algorithm(
            salt=kdf.salt, length=length, iterations=kdf.iterations, lanes=kdf.lanes, memory_cost=kdf.memory_kib
        ).derive(secret)
    except MemoryError as error:
        raise GuestUnsupported(
            f"{kdf.memory_kib} KiB of memory, which a LUKS key slot needs, are not to be had"
        ) from error
    except UnsupportedAlgorithm as error:
        raise GuestUnsupported(f"this system's OpenSSL has no {kdf.kind}") from error


def _hash(name: str) -> str:
    """Python's name of a hash of cryptsetup's; not every OpenSSL has all of them."""
    python_name = name.replace("-", "_")
    if name in _HASHES:
        try:
            hashlib.new(python_name)
        except ValueError:
            pass
        else:
            return python_name
    raise GuestUnsupported(f"hash {name[:32]!r} of LUKS is not known here")


def _merge(split: bytes, key_bytes: int, hash_name: str) -> bytes:
    """The key from its stripes (LUKS1 specification, 2.4, AFmerge)."""
    name = _hash(hash_name)
    state = bytes(key_bytes)
    last = len(split) - key_bytes
    for start in range(0, last, key_bytes):
        state = _diffuse(_xor(state, split[start : start + key_bytes]), name)
    return _xor(state, split[last:])


def _xor(one: bytes, other: bytes) -> bytes:
    return (int.from_bytes(one, "big") ^ int.from_bytes(other, "big")).to_bytes(len(one), "big")


def _diffuse(block: bytes, name: str) -> bytes:
    size = hashlib.new(name).digest_size
    pieces = []
    for index, start in enumerate(range(0, len(block), size)):
        piece = block[start : start + size]
        pieces.append(hashlib.new(name, index.to_bytes(4, "big") + piece).digest()[: len(piece)])
    return b"".join(pieces)
