"""Decryption of dm-crypt's sectors: AES in XTS or CBC mode, each sector for itself.

Owns the modes and how the initial vector comes from the sector's number (Linux ``drivers/md/dm-crypt.c``: plain,
plain64, essiv). Runs of small sectors go through AES in one call and numpy does the rest, which is several times as
fast as a call each. Stateless after making, so callable from any thread.
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
from xbfs_engine.guestfs.volumes.sources import Derived

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from xbfs_engine.formats.source import BlockSource

SECTOR: Final = 512
_AES_BLOCK: Final = 16
_RUN: Final = 64 * KIB
"""Decrypted at once, so that what numpy makes of it stays in the processor's cache; a multiple of any sector."""


class CipherSpec(NamedTuple):
    """A cipher as dm-crypt names it: ``aes-xts-plain64``."""

    mode: str
    """``xts`` or ``cbc``."""
    vector: str
    """``plain``, ``plain64`` or ``essiv:<hash>``."""

    @classmethod
    def parse(cls, text: str, key_bytes: int) -> CipherSpec:
        """What a name means; GuestUnsupported if it is no cipher, or no length of key, that is decrypted here."""
        name, _, rest = text.partition("-")
        mode, _, vector = rest.partition("-")
        kind, _, digest = vector.partition(":")
        known = kind in ("plain", "plain64") or (kind == "essiv" and digest in ("sha256", "sha512"))
        lengths = {"xts": (32, 64), "cbc": (16, 24, 32)}.get(mode, ())
        if name != "aes" or not known or key_bytes not in lengths:
            raise GuestUnsupported(f"cipher {text[:64]!r} with a key of {8 * key_bytes} bits is not decrypted here")
        return cls(mode, vector)


class SectorCipher:
    """One cipher with its key, of a length that CipherSpec.parse allowed."""

    def __init__(self, spec: CipherSpec, key: bytes) -> None:
        self._spec = spec
        half = len(key) // 2
        if spec.mode == "xts" and key[:half] == key[half:]:
            raise GuestDamaged("both halves of an XTS key are the same, which no key has")
        self._xts = AES(key)
        self._data = Cipher(AES(key[:half] if spec.mode == "xts" else key), ECB())  # noqa: S305
        kind, _, digest = spec.vector.partition(":")
        if spec.mode == "xts":
            vector_key = key[half:]
        else:
            vector_key = hashlib.new(digest, key).digest()[:32] if kind == "essiv" else b""
        self._vector = Cipher(AES(vector_key), ECB()) if vector_key else None  # noqa: S305
        self._number_mask = 0xFFFF_FFFF if kind == "plain" else 0xFFFF_FFFF_FFFF_FFFF

    def decrypt(self, data: bytes, first: int, sector_bytes: int) -> bytes:
        """Plaintext of whole sectors; ``first`` numbers the first of them in units of 512 bytes."""
        step = sector_bytes // SECTOR
        if self._spec.mode == "xts" and step > 1:
            starts = range(0, len(data), sector_bytes)
            return b"".join(
                self._long_sector(data[start : start + sector_bytes], first + start // SECTOR) for start in starts
            )
        runs = range(0, len(data), _RUN)
        return b"".join(self._run(data[at : at + _RUN], first + at // SECTOR, sector_bytes) for at in runs)

    def _long_sector(self, data: bytes, number: int) -> bytes:
        tweak = (number & self._number_mask).to_bytes(_AES_BLOCK, "little")
        return Cipher(self._xts, XTS(tweak)).decryptor().update(data)

    def _run(self, data: bytes, first: int, sector_bytes: int) -> bytes:
        blocks = np.frombuffer(data, "<u8").reshape(-1, sector_bytes // _AES_BLOCK, 2)
        numbers = np.zeros((len(blocks), 2), "<u8")
        steps = np.arange(len(blocks), dtype="<u8") * np.uint64(sector_bytes // SECTOR)
        numbers[:, 0] = (np.uint64(first) + steps) & np.uint64(self._number_mask)
        vectors = numbers
        if self._vector is not None:
            raw = self._vector.encryptor().update(numbers.tobytes())
            vectors = np.frombuffer(raw, "<u8").reshape(-1, 2)
        if self._spec.mode == "xts":
            tweaks = _tweaks(vectors)
            plain = self._ecb(blocks ^ tweaks) ^ tweaks
        else:
            plain = self._ecb(blocks)
            plain[:, 0] ^= vectors
            plain[:, 1:] ^= blocks[:, :-1]
        return plain.tobytes()

    def _ecb(self, blocks: NDArray[np.uint64]) -> NDArray[np.uint64]:
        raw = bytearray(self._data.decryptor().update(blocks.tobytes()))
        return np.frombuffer(raw, "<u8").reshape(blocks.shape)


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
    """The plaintext of an encrypted range; ``first`` numbers its first sector in units of 512 bytes."""

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
