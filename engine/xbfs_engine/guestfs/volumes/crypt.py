"""Decryption of disks' sectors as dm-crypt names it: AES in XTS or CBC mode, each sector for itself.

Owns the modes and how the initial vector comes from the sector's number (Linux ``drivers/md/dm-crypt.c``: plain,
plain64, essiv for LUKS; eboiv and elephant for BitLocker). Runs of small sectors go through AES in one call and numpy
does the rest, which is several times as fast as a call each. Stateless after making, so callable from any thread.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import ECB, XTS

from xbfs_engine.core.errors import GuestDamaged, GuestUnsupported
from xbfs_engine.core.limits import KIB
from xbfs_engine.guestfs.volumes.elephant import undiffuse
from xbfs_engine.guestfs.volumes.sources import Derived

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from xbfs_engine.formats.source import BlockSource

SECTOR: Final = 512
_AES_BLOCK: Final = 16
_RUN: Final = 64 * KIB
"""Decrypted at once, so that what numpy makes of it stays in the processor's cache; a multiple of any sector."""

_DIFFUSED_RUN: Final = 512 * KIB
"""The diffuser goes through thousands of small steps, whatever the length: longer runs are better for it."""

_MARK: Final = np.uint64(1 << 63)
"""In the last byte of a sector's number for the second half of its key (Ferguson, "AES-CBC + Elephant diffuser")."""


class CipherSpec(NamedTuple):
    """A cipher as dm-crypt names it: ``aes-xts-plain64``."""

    mode: str
    """``xts`` or ``cbc``."""
    vector: str
    """``plain``, ``plain64``, ``essiv:<hash>``; ``eboiv``: the number encrypted with the key of the data itself;
    ``elephant``: that, and the diffuser, with a key of two halves."""
    unit_bytes: int = SECTOR
    """What sectors are numbered in: SECTOR, the sector's own size, or 1 for the offset in bytes."""

    @classmethod
    def parse(cls, text: str, key_bytes: int) -> CipherSpec:
        """What a name in LUKS means; GuestUnsupported if it is no cipher, or no length of key, that is decrypted."""
        name, _, rest = text.partition("-")
        mode, _, vector = rest.partition("-")
        kind, _, digest = vector.partition(":")
        known = kind in ("plain", "plain64") or (kind == "essiv" and digest in ("sha256", "sha512"))
        lengths = {"xts": (32, 64), "cbc": (16, 24, 32)}.get(mode, ())
        if name != "aes" or not known or key_bytes not in lengths:
            raise GuestUnsupported(f"cipher {text[:64]!r} with a key of {8 * key_bytes} bits is not decrypted here")
        return cls(mode, vector)


class SectorCipher:
    """One cipher with its key, of a length that the cipher takes."""

    def __init__(self, spec: CipherSpec, key: bytes) -> None:
        self._spec = spec
        half = len(key) // 2
        if spec.mode == "xts" and key[:half] == key[half:]:
            raise GuestDamaged("both halves of an XTS key are the same, which no key has")
        kind, _, digest = spec.vector.partition(":")
        self._is_diffused = kind == "elephant"
        data_key = key[:half] if spec.mode == "xts" or self._is_diffused else key
        if spec.mode == "xts":
            vector_key = key[half:]
        elif kind == "essiv":
            vector_key = hashlib.new(digest, key).digest()[:32]
        else:
            vector_key = data_key if kind in ("eboiv", "elephant") else b""
        self._xts = AES(key) if spec.mode == "xts" else None
        self._data = Cipher(AES(data_key), ECB())  # noqa: S305
        self._vector = Cipher(AES(vector_key), ECB()) if vector_key else None  # noqa: S305
        self._tweak = Cipher(AES(key[half:]), ECB()) if self._is_diffused else None  # noqa: S305
        self._number_mask = 0xFFFF_FFFF if kind == "plain" else 0xFFFF_FFFF_FFFF_FFFF

    def decrypt(self, data: bytes, first: int, sector_bytes: int) -> bytes:
        """Plaintext of whole sectors; ``first`` says where the first of them lies, in units of 512 bytes."""
        if self._xts is not None and sector_bytes > SECTOR:
            starts = range(0, len(data), sector_bytes)
            return b"".join(
                self._long_sector(self._xts, data[start : start + sector_bytes], first * SECTOR + start)
                for start in starts
            )
        run = _DIFFUSED_RUN if self._is_diffused else _RUN
        runs = range(0, len(data), run)
        return b"".join(self._run(data[at : at + run], first * SECTOR + at, sector_bytes) for at in runs)

    def _long_sector(self, cipher: AES, data: bytes, offset: int) -> bytes:
        number = offset // self._spec.unit_bytes
        tweak = (number & self._number_mask).to_bytes(_AES_BLOCK, "little")
        return Cipher(cipher, XTS(tweak)).decryptor().update(data)

    def _run(self, data: bytes, offset: int, sector_bytes: int) -> bytes:
        unit = self._spec.unit_bytes
        blocks = np.frombuffer(data, "<u8").reshape(-1, sector_bytes // _AES_BLOCK, 2)
        numbers = np.zeros((len(blocks), 2), "<u8")
        steps = np.arange(len(blocks), dtype="<u8") * np.uint64(sector_bytes // unit)
        numbers[:, 0] = (np.uint64(offset // unit) + steps) & np.uint64(self._number_mask)
        vectors = numbers if self._vector is None else _encrypted(self._vector, numbers)
        if self._spec.mode == "xts":
            tweaks = _tweaks(vectors)
            return (self._ecb(blocks ^ tweaks) ^ tweaks).tobytes()
        plain = self._ecb(blocks)
        plain[:, 0] ^= vectors
        plain[:, 1:] ^= blocks[:, :-1]
        if self._tweak is not None:
            plain = undiffuse(plain.view("<u4").reshape(len(blocks), -1)).view("<u8").reshape(blocks.shape)
            plain[:, 0::2] ^= _encrypted(self._tweak, numbers)[:, None]
            numbers[:, 1] = _MARK
            plain[:, 1::2] ^= _encrypted(self._tweak, numbers)[:, None]
        return plain.tobytes()

    def _ecb(self, blocks: NDArray[np.uint64]) -> NDArray[np.uint64]:
        raw = bytearray(self._data.decryptor().update(blocks.tobytes()))
        return np.frombuffer(raw, "<u8").reshape(blocks.shape)


def _encrypted(cipher: Cipher[ECB], blocks: NDArray[np.uint64]) -> NDArray[np.uint64]:
    return np.frombuffer(cipher.encryptor().update(blocks.tobytes()), "<u8").reshape(blocks.shape)


def _tweaks(first: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The tweak of each of a sector's 32 blocks: the first times x^n in GF(2^128) (IEEE 1619-2018, 5.2).

    A shift, whose overflow comes back times x^7 + x^2 + x + 1.
    """
    one, two, seven = np.uint64(1), np.uint64(2), np.uint64(7)
    power = np.arange(SECTOR // _AES_BLOCK, dtype="<u8")
    down = np.uint64(63) - power
    low, high = first[:, :1], first[:, 1:]
    over = high >> one >> down
    tweaks = np.empty((len(first), len(power), 2), "<u8")
    tweaks[:, :, 0] = low << power ^ over ^ over << one ^ over << two ^ over << seven
    tweaks[:, :, 1] = high << power | low >> one >> down
    return tweaks


class CryptSource(Derived):
    """The plaintext of an encrypted range; ``first`` says where it lies for the cipher, in units of 512 bytes."""

    def __init__(self, source: BlockSource, cipher: SectorCipher, sector_bytes: int, first: int) -> None:
        super().__init__(source.size_bytes // sector_bytes * sector_bytes)
        self._source = source
        self._cipher = cipher
        self._sector_bytes = sector_bytes
        self._first = first

    def _read(self, offset: int, length: int) -> bytes:
        skip = offset % self._sector_bytes
        start = offset - skip
        end = -(-(offset + length) // self._sector_bytes) * self._sector_bytes
        data = self._source.read_at(start, end - start)
        plain = self._cipher.decrypt(data, self._first + start // SECTOR, self._sector_bytes)
        return plain[skip : skip + length]
