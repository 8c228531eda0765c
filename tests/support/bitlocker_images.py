"""A formatter for BitLocker volumes: what Windows writes, in every variant, around the bytes of a filesystem.

Written after libyal's "BitLocker Drive Encryption (BDE) format" and Ferguson's paper on the diffuser, in the direction
that the product never goes, sector by sector. That it is BitLocker is for cryptsetup and dislocker to say:
tests/interop/test_bitlocker_peers.py.
"""

from __future__ import annotations

import hashlib
import struct
import uuid
import zlib
from dataclasses import dataclass, field
from functools import cache

from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.aead import AESCCM
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import CBC, ECB, XTS

KIB = 1 << 10
AREA = 64 * KIB
FILETIME = 0x01D5_3000_0000_0000
VOLUME = uuid.UUID("12345678-9abc-4def-8123-456789abcdef")
ON_WRITE = uuid.UUID("92a84d3b-dd80-4d0e-9e4e-b1e3284eaed8")
NORMAL = uuid.UUID("4967d63b-2e29-4ad8-8399-f6a339e3d001")
PASSWORD = "Grüße, 世界 🗝"
RECOVERY = "471207-278498-422125-177177-561902-537405-468006-693451"
OTHER_RECOVERY = "042647-302313-590458-071500-554323-116567-412181-516978"
EXTERNAL_KEY = hashlib.sha256(b"external").digest()
MASTER_KEY = hashlib.sha256(b"master").digest()
KINDS = {
    "clear": 0,
    "tpm": 0x100,
    "external": 0x200,
    "pin": 0x500,
    "recovery": 0x800,
    "card": 0x1000,
    "password": 0x2000,
}
METHODS = {
    "elephant-128": (0x8000, 64), "elephant-256": (0x8001, 64), "cbc-128": (0x8002, 16), "cbc-256": (0x8003, 32),
    "xts-128": (0x8004, 32), "xts-256": (0x8005, 64),
}  # fmt: skip


@dataclass(frozen=True)
class Recipe:
    """What a volume is to be like. Places are those of pattern volumes of 512 KiB."""

    method: str = "xts-128"
    sector: int = 512
    version: int = 2
    to_go: bool = False
    protectors: tuple[str, ...] = ("external",)
    places: tuple[int, int, int] = (128 * KIB, 256 * KIB, 384 * KIB)
    head_at: int = 192 * KIB
    head_bytes: int = 8 * KIB
    head_datum: bool = True
    encrypted: int | None = None
    state: tuple[int, int] = (4, 4)
    converting: int = 0
    identity: uuid.UUID = NORMAL
    label: str = "DESKTOP D: 1/2/2026"
    secrets: dict[str, str] = field(default_factory=dict, hash=False)
    """Other secrets than the constants above."""


def protector_id(number: int) -> uuid.UUID:
    return uuid.uuid5(VOLUME, f"protector {number}")


def datum(kind: int, value: int, data: bytes, version: int = 1) -> bytes:
    return struct.pack("<HHHH", 8 + len(data), kind, value, version) + data


def key_datum(key: bytes, method: int) -> bytes:
    return datum(0, 1, struct.pack("<I", method) + key)


def sealed(kind: int, plain: bytes, key: bytes, counter: int) -> bytes:
    nonce = struct.pack("<QI", FILETIME, counter)
    text = AESCCM(key).encrypt(nonce, plain, None)
    return datum(kind, 5, nonce + text[-16:] + text[:-16])


def string(kind: int, text: str) -> bytes:
    return datum(kind, 2, (text + "\0").encode("utf-16-le"))


@cache
def stretched(seed: bytes, salt: bytes) -> bytes:
    last = bytes(32)
    for count in range(0x100000):
        last = hashlib.sha256(last + seed + salt + struct.pack("<Q", count)).digest()
    return last


def password_key(password: str, salt: bytes) -> bytes:
    once = hashlib.sha256(password.encode("utf-16-le")).digest()
    return stretched(hashlib.sha256(once).digest(), salt)


def recovery_key(digits: str, salt: bytes) -> bytes:
    raw = struct.pack("<8H", *(int(group) // 11 for group in digits.split("-")))
    return stretched(hashlib.sha256(raw).digest(), salt)


def startup_file(number: int, key: bytes = EXTERNAL_KEY) -> bytes:
    """The .BEK file of a protector."""
    identity = protector_id(number).bytes_le
    inner = string(0, "ExternalKey") + key_datum(key, 0x2002)
    entry = datum(6, 9, identity + struct.pack("<Q", FILETIME) + inner)
    size = 48 + len(entry)
    return struct.pack("<IIII16sIIQ", size, 1, 48, size, identity, 1, 0, FILETIME) + entry


def _protector(recipe: Recipe, number: int, kind: str) -> bytes:
    salt = hashlib.md5(kind.encode(), usedforsecurity=False).digest()
    secret = recipe.secrets.get(f"{kind}{number}", "")
    if kind == "password":
        key, method = password_key(secret or PASSWORD, salt), 0x1001
    elif kind == "recovery":
        key, method = recovery_key(secret or RECOVERY, salt), 0x1000
    else:
        key, method = EXTERNAL_KEY, 0
    properties = b""
    if method:
        properties += datum(0, 3, struct.pack("<I", method) + salt + sealed(0, key_datum(bytes(32), 0x2003), key, 90))
    elif kind == "clear":
        properties += key_datum(key, 0x2000)
    elif kind == "external":
        used = sealed(0, key_datum(bytes(32), 0x2003), key, 91)
        properties += string(0, "ExternalKey") + datum(0, 4, struct.pack("<I", 0x2002) + used)
    else:
        properties += datum(0, 6, b"\xa5" * 100)
        key = hashlib.sha256(b"in the chip").digest()
    properties += sealed(0, key_datum(MASTER_KEY, 0x2003), key, 10 + number)
    head = protector_id(number).bytes_le + struct.pack("<QHH", FILETIME, 0, KINDS[kind])
    return datum(2, 8, head + properties, 3 if kind == "clear" else 1)


def sector_key(recipe: Recipe) -> bytes:
    """As the volume stores it."""
    key = hashlib.shake_256(recipe.method.encode()).digest(METHODS[recipe.method][1])
    return key[:16] + bytes(16) + key[32:48] + bytes(16) if recipe.method == "elephant-128" else key


def block(recipe: Recipe, size: int, mirror: int) -> bytes:
    """A block of metadata with what validates it, up to 64 KiB."""
    number = METHODS[recipe.method][0]
    entries = string(7, recipe.label)
    entries += b"".join(_protector(recipe, n, kind) for n, kind in enumerate(recipe.protectors))
    entries += sealed(3, key_datum(sector_key(recipe), number), MASTER_KEY, 2)
    if recipe.head_datum and recipe.version == 2:
        entries += datum(15, 15, struct.pack("<QQ", recipe.head_at, recipe.head_bytes))
    metadata = 48 + len(entries)
    total = -(-(64 + metadata) // 16) * 16
    encrypted = size if recipe.encrypted is None else recipe.encrypted
    if recipe.version == 1:
        # Both numbers mean nothing to Windows Vista; dislocker 0.7.3 wants the one, libbde the other.
        volume = (total, 1, *recipe.state, encrypted, 0, 16, *recipe.places, mirror)
    else:
        sectors = recipe.head_bytes // recipe.sector
        volume = (
            total // 16, 2, *recipe.state, encrypted, recipe.converting, sectors, *recipe.places, recipe.head_at,
        )  # fmt: skip
    head = struct.pack("<8sHHHHQII3QQ", b"-FVE-FS-", *volume)
    head += struct.pack("<IIII16sIHHQ", metadata, 1, 48, metadata, VOLUME.bytes_le, 99, number, 0, FILETIME)
    return validated((head + entries).ljust(total, b"\0"), recipe.version)


def validated(data: bytes, version: int = 2) -> bytes:
    """A block of metadata with the right checksum and, from version 2 on, the sealed hash."""
    if version == 1:
        return data + struct.pack("<HHI", 8, 1, zlib.crc32(data))
    digest = sealed(0, key_datum(hashlib.sha256(data).digest(), 0x2005), MASTER_KEY, 3)
    return data + struct.pack("<HHI", AREA - len(data), 2, zlib.crc32(data)) + digest


def encrypt(recipe: Recipe, data: bytes, offset: int) -> bytes:
    """Whole sectors, each for itself; ``offset`` is where they lie on the volume."""
    key = sector_key(recipe)
    out = []
    for at in range(0, len(data), recipe.sector):
        sector, place = data[at : at + recipe.sector], offset + at
        if recipe.method.startswith("xts"):
            mode: XTS | CBC = XTS((place // recipe.sector).to_bytes(16, "little"))
            out.append(Cipher(AES(key), mode).encryptor().update(sector))
            continue
        data_key = key if recipe.method.startswith("cbc") else key[: int(recipe.method[-3:]) // 8]
        if recipe.method.startswith("elephant"):
            sector = _diffused(sector, key[32 : 32 + len(data_key)], place)
        vector = Cipher(AES(data_key), ECB()).encryptor().update(place.to_bytes(16, "little"))
        out.append(Cipher(AES(data_key), CBC(vector)).encryptor().update(sector))
    return b"".join(out)


def _diffused(sector: bytes, tweak: bytes, place: int) -> bytes:
    """Sector key, diffuser A, diffuser B; the paper gives the way back, this undoes it step by step."""
    encryptor = Cipher(AES(tweak), ECB()).encryptor()
    number = place.to_bytes(16, "little")
    pad = encryptor.update(number) + encryptor.update(number[:15] + b"\x80")
    pad *= len(sector) // 32
    words = list(struct.unpack(f"<{len(sector) // 4}I", bytes(a ^ b for a, b in zip(sector, pad, strict=True))))
    count = len(words)
    for cycles, near, far, turns in ((5, -2, -5, (9, 0, 13, 0)), (3, 2, 5, (0, 10, 0, 25))):
        for _ in range(cycles):
            for i in range(count - 1, -1, -1):
                turn = turns[i % 4]
                word = words[(i + far) % count]
                word = (word << turn | word >> 32 - turn) & 0xFFFFFFFF
                words[i] = (words[i] - (words[(i + near) % count] ^ word)) & 0xFFFFFFFF
    return struct.pack(f"<{count}I", *words)


def boot_sector(recipe: Recipe) -> bytes:
    boot = bytearray(b"\xeb\x58\x90" + (b"MSWIN4.1" if recipe.to_go else b"-FVE-FS-"))
    boot += struct.pack("<HB", recipe.sector, 8)
    boot = boot.ljust(512, b"\0")
    at = 424 if recipe.to_go else 160
    boot[at : at + 40] = recipe.identity.bytes_le + struct.pack("<3Q", *recipe.places)
    boot[510:512] = b"\x55\xaa"
    return bytes(boot).ljust(recipe.sector, b"\0")


def shown(recipe: Recipe, plain: bytes) -> bytes:
    """What Windows shows of a volume: BitLocker's own files are zeros."""
    data = bytearray(plain)
    area = AREA if recipe.version == 2 else 16 * KIB
    hidden = [(place, area) for place in recipe.places]
    if recipe.version == 2:
        hidden.append((recipe.head_at, recipe.head_bytes))
    for start, length in hidden:
        data[start : start + length] = bytes(length)
    return bytes(data)


def volume(recipe: Recipe, plain: bytes, *, used_only: bool = False) -> bytes:
    """An encrypted volume; ``used_only``: sectors of zeros are left as they were, as for a new filesystem."""
    limit = len(plain) if recipe.encrypted is None else recipe.encrypted
    sector = recipe.sector

    def written(start: int, end: int, place: int) -> bytes:
        pieces = []
        for at in range(start, end, 4 * KIB):
            piece = plain[at : min(at + 4 * KIB, end)]
            border = max(0, min(len(piece), limit - (at - start + place)))
            if used_only and not any(piece):
                pieces.append(piece)
            else:
                pieces.append(encrypt(recipe, piece[:border], at - start + place) + piece[border:])
        return b"".join(pieces)

    data = bytearray(written(0, len(plain), 0))
    mirror = struct.unpack_from("<Q", plain, 56)[0]
    if recipe.version == 1:
        cluster = plain[13] * sector
        boot = bytearray(plain[:sector])
        boot[3:11] = b"-FVE-FS-"
        boot[56:64] = struct.pack("<Q", recipe.places[0] // cluster)
        data[: 16 * sector] = boot + plain[sector : 16 * sector]
        if plain[-sector:][3:11] == b"NTFS    ":
            data[-sector:] = boot
    else:
        data[recipe.head_at : recipe.head_at + recipe.head_bytes] = written(0, recipe.head_bytes, recipe.head_at)
        data[:sector] = boot_sector(recipe)
        data[sector : recipe.head_bytes] = bytes(recipe.head_bytes - sector)
    metadata = block(recipe, len(plain), mirror)
    for place in recipe.places:
        data[place : place + len(metadata)] = metadata
    return bytes(data)


def pattern(size: int = 512 * KIB, sector: int = 512) -> bytes:
    """Bytes that differ everywhere, with a boot sector of NTFS at both ends."""
    data = bytearray(b"".join(n.to_bytes(8, "little") for n in range(size // 8)))
    boot = bytearray(b"\xeb\x52\x90NTFS    " + struct.pack("<HB", sector, 8) + bytes(498))
    struct.pack_into("<QQQ", boot, 40, size // sector - 1, 4, 8)
    boot[510:512] = b"\x55\xaa"
    data[:512] = data[-sector : len(data) - sector + 512] = boot
    return bytes(data)
