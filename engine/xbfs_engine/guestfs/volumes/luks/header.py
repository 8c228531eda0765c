"""The header of a LUKS volume: LUKS1's, or LUKS2's with its backup, as one record.

Layouts: "LUKS1 On-Disk Format Specification" 1.2.3, figure 1; "LUKS2 On-Disk Format Specification" 1.1.1, chapters 2
and 3. Integers are big-endian; LUKS2's JSON has 64-bit numbers as strings. Pure; hostile headers give GuestDamaged or
GuestUnsupported.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import struct
from typing import TYPE_CHECKING, Final, NamedTuple, TypeAlias

from xbfs_engine.core.errors import GuestDamaged, GuestUnsupported, XbfsError
from xbfs_engine.core.limits import KIB, MIB
from xbfs_engine.guestfs.volumes.crypt import SECTOR

if TYPE_CHECKING:
    from xbfs_engine.formats.source import BlockSource

_MAGIC: Final = b"LUKS\xba\xbe"
_UNFINISHED_MAGIC: Final = b"LUKS\xde\xad"
"""What cryptsetup-reencrypt leaves in place of _MAGIC until it is done."""

_BACKUP_MAGIC: Final = b"SKUL\xba\xbe"
_LUKS1: Final = struct.Struct(">6sH32s32s32sII20s32sI40s")
_SLOT1: Final = struct.Struct(">II32sII")
_SLOT1_ACTIVE: Final = 0x00AC71F3
_SLOTS1: Final = 8
_LUKS2: Final = struct.Struct(">6sHQQ48s32s64s40s48sQ184s64s")
_LUKS2_BYTES: Final = 4096
_CHECKSUM_AT: Final = 448
_BACKUPS_AT: Final = tuple(16 * KIB << n for n in range(9))
"""Where the backup of a LUKS2 header may lie (specification, 2.2)."""

_HEADER_BYTES_MAX: Final = 4 * MIB
_DETACHED: Final = "it is only the header of a LUKS volume that lies elsewhere"
_TOKEN_TYPE_MAX: Final = 64
_KEEPERS_MAX: Final = 8
_SECTOR_BYTES: Final = frozenset({512, 1024, 2048, 4096})

assert _LUKS1.size == 208
assert _SLOT1.size == 48
assert _LUKS2.size == 512

Json: TypeAlias = "str | int | float | bool | list[Json] | dict[str, Json] | None"


class Kdf(NamedTuple):
    """How a secret becomes a key."""

    kind: str
    """``pbkdf2``, ``argon2i`` or ``argon2id``."""
    salt: bytes
    hash: str
    """Of PBKDF2."""
    iterations: int
    memory_kib: int = 0
    lanes: int = 0


class Keyslot(NamedTuple):
    """The volume key, split and encrypted with a key that comes from a secret."""

    kdf: Kdf
    area_start: int
    area_cipher: str
    area_key_bytes: int
    key_bytes: int
    """Of the volume key."""
    stripes: int
    split_hash: str


class Digest(NamedTuple):
    """What tells whether a volume key is the right one."""

    kdf: Kdf
    value: bytes


class LuksHeader(NamedTuple):
    """All that is needed to open a LUKS volume with one encrypted segment."""

    version: int
    uuid: str
    label: str
    cipher: str
    sector_bytes: int
    data_start: int
    data_bytes: int | None
    """None: to the end of the device."""
    first_sector: int
    """Number of the first data sector for the initial vector, in units of 512 bytes."""
    keyslots: tuple[Keyslot, ...]
    digest: Digest
    keepers: tuple[str, ...] = ()
    """Types of tokens: what other than people keeps keys of it, such as ``systemd-tpm2`` or ``clevis``."""
    notes: tuple[str, ...] = ()
    problem: str = ""
    """Why it can not be opened whatever the secret; then what is above but version, uuid and label means nothing."""


_NOTHING: Final = Digest(Kdf("", b"", "", 0), b"")


def find_luks(source: BlockSource) -> LuksHeader | None:
    """The header, or None if there is none. One that can not be used is returned with its ``problem``."""
    head = source.read_at(0, min(_LUKS2_BYTES, source.size_bytes))
    if len(head) < _LUKS2_BYTES:
        return None
    version = int.from_bytes(head[6:8], "big")
    if head[:6] == _UNFINISHED_MAGIC and version == 1:
        return _unusable(1, _text(_LUKS1.unpack_from(head)[10]), "", "its encryption anew was left unfinished")
    if head[:6] == _MAGIC and version == 1:
        return _luks1(head, source.read_at(0, 1024))
    return _luks2(source, head, version)


def _unusable(version: int, uuid: str, label: str, problem: str) -> LuksHeader:
    return LuksHeader(version, uuid, label, "", SECTOR, 0, None, 0, (), _NOTHING, problem=problem)


def _text(raw: bytes) -> str:
    return raw.partition(b"\0")[0].decode("utf-8", "replace")


def _luks1(head: bytes, slots: bytes) -> LuksHeader:
    _, _, cipher, mode, digest_hash, payload, key_bytes, digest, salt, iterations, uuid = _LUKS1.unpack_from(head)
    if not payload:
        return _unusable(1, _text(uuid), "", _DETACHED)
    name = f"{_text(cipher)}-{_text(mode)}"
    hash_name = _text(digest_hash)
    found = []
    for index in range(_SLOTS1):
        active, slot_iterations, slot_salt, start, stripes = _SLOT1.unpack_from(slots, _LUKS1.size + 48 * index)
        if active == _SLOT1_ACTIVE:
            kdf = Kdf("pbkdf2", slot_salt, hash_name, slot_iterations)
            found.append(Keyslot(kdf, start * SECTOR, name, key_bytes, key_bytes, stripes, hash_name))
    check = Digest(Kdf("pbkdf2", salt, hash_name, iterations), digest)
    return LuksHeader(1, _text(uuid), "", name, SECTOR, payload * SECTOR, None, 0, tuple(found), check)


def _luks2(source: BlockSource, head: bytes, version: int) -> LuksHeader | None:
    """The newer of primary and backup whose checksum is right."""
    copies = []
    for start in (0, *_BACKUPS_AT):
        if start + _LUKS2_BYTES > source.size_bytes:
            break
        block = head if not start else _backup(source, start)
        if block[:6] == (_BACKUP_MAGIC if start else _MAGIC) and block[6:8] == b"\0\2":
            area = _checked_area(source, start, block)
            if area is not None:
                copies.append((int.from_bytes(block[16:24], "big"), -start, block, area))
    if not copies:
        if head[:6] != _MAGIC:
            return None
        problem = "its header and the backup of it are damaged" if version == 2 else f"LUKS version {version}"
        return _unusable(version, _text(head[168:208]), _text(head[24:72]), problem)
    _, minus_start, block, area = max(copies)
    uuid, label = _text(block[168:208]), _text(block[24:72])
    try:
        header = _parse_json(area)._replace(uuid=uuid, label=label)
    except (GuestDamaged, GuestUnsupported) as error:
        return _unusable(2, uuid, label, error.message)
    return header._replace(notes=("its first header is damaged, the backup was used",)) if minus_start else header


def _backup(source: BlockSource, start: int) -> bytes:
    """What lies where a backup may lie; one that can not be read must not hide whatever else the device is."""
    try:
        return source.read_at(start, _LUKS2_BYTES)
    except XbfsError as error:
        if error.retryable:
            raise
        return b""


def _checked_area(source: BlockSource, start: int, block: bytes) -> bytes | None:
    """The JSON text that belongs to a header, if the checksum over both is right."""
    fields = _LUKS2.unpack_from(block)
    size, algorithm, own_start = fields[2], _text(fields[5]), fields[9]
    if not _LUKS2_BYTES < size <= _HEADER_BYTES_MAX or start + size > source.size_bytes or own_start != start:
        return None
    if algorithm not in ("sha256", "sha512", "sha1"):
        return None
    area = source.read_at(start + _LUKS2_BYTES, size - _LUKS2_BYTES)
    covered = block[:_CHECKSUM_AT] + bytes(64) + block[512:] + area
    digest = hashlib.new(algorithm, covered, usedforsecurity=False).digest()
    return area if digest == fields[11][: len(digest)] else None


class _Node:
    """A JSON object; every question that has no proper answer raises GuestDamaged."""

    def __init__(self, value: Json, path: str) -> None:
        if not isinstance(value, dict):
            raise GuestDamaged(f"LUKS2 header: {path} is no object")
        self._value = value
        self._path = path

    def node(self, key: str) -> _Node:
        return _Node(self._value.get(key), f"{self._path}.{key}")

    def nodes(self) -> list[tuple[str, _Node]]:
        return [(key, _Node(value, f"{self._path}.{key}")) for key, value in self._value.items()]

    def has(self, key: str) -> bool:
        return key in self._value

    def text(self, key: str) -> str:
        value = self._value.get(key)
        if not isinstance(value, str):
            raise GuestDamaged(f"LUKS2 header: {self._path}.{key} is no string")
        return value

    def texts(self, key: str) -> list[str]:
        value = self._value.get(key, [])
        if not isinstance(value, list):
            raise GuestDamaged(f"LUKS2 header: {self._path}.{key} is no list")
        return [str(item) for item in value]

    def number(self, key: str) -> int:
        value = self._value.get(key)
        if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) <= 20:
            value = int(value)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 64:
            raise GuestDamaged(f"LUKS2 header: {self._path}.{key} is no number that it may be")
        return value

    def data(self, key: str) -> bytes:
        try:
            return base64.b64decode(self.text(key), validate=True)
        except (binascii.Error, ValueError) as error:
            raise GuestDamaged(f"LUKS2 header: {self._path}.{key} is no base64") from error


def _parse_json(area: bytes) -> LuksHeader:
    try:
        root = _Node(json.loads(area.partition(b"\0")[0]), "header")
    except (ValueError, RecursionError) as error:
        raise GuestDamaged("LUKS2 header: it is no JSON") from error
    config = root.node("config")
    if config.has("requirements"):
        needed = config.node("requirements").texts("mandatory")
        if needed:
            raise GuestUnsupported(f"the LUKS2 volume needs {', '.join(needed)[:100]}, which is not done here")
    segments = root.node("segments").nodes()
    if len(segments) != 1:
        raise GuestUnsupported(f"the LUKS2 volume has {len(segments)} segments")
    name, segment = segments[0]
    if segment.text("type") != "crypt" or segment.has("integrity"):
        raise GuestUnsupported("the LUKS2 volume's segment is not just encrypted")
    if not segment.number("offset"):
        raise GuestUnsupported(_DETACHED)
    sector_bytes = segment.number("sector_size")
    if sector_bytes not in _SECTOR_BYTES:
        raise GuestDamaged(f"LUKS2 header: sectors of {sector_bytes} bytes can not be")
    for _, digest in root.node("digests").nodes():
        if name in digest.texts("segments"):
            break
    else:
        raise GuestDamaged("LUKS2 header: no digest is for the segment")
    wanted = digest.texts("keyslots")
    slots = [slot for key, slot in root.node("keyslots").nodes() if key in wanted and slot.text("type") == "luks2"]
    return LuksHeader(
        2,
        "",
        "",
        segment.text("encryption"),
        sector_bytes,
        segment.number("offset"),
        None if segment.text("size") == "dynamic" else segment.number("size"),
        segment.number("iv_tweak"),
        tuple(_keyslot2(slot) for slot in slots),
        Digest(_kdf2(digest), digest.data("digest")),
        _keepers(root),
    )


def _keepers(root: _Node) -> tuple[str, ...]:
    tokens = root.node("tokens").nodes() if root.has("tokens") else []
    return tuple(sorted({token.text("type")[:_TOKEN_TYPE_MAX] for _, token in tokens}))[:_KEEPERS_MAX]


def _keyslot2(slot: _Node) -> Keyslot:
    area, split = slot.node("area"), slot.node("af")
    return Keyslot(
        _kdf2(slot.node("kdf")),
        area.number("offset"),
        area.text("encryption"),
        area.number("key_size"),
        slot.number("key_size"),
        split.number("stripes"),
        split.text("hash"),
    )


def _kdf2(kdf: _Node) -> Kdf:
    kind = kdf.text("type")
    if kind == "pbkdf2":
        return Kdf(kind, kdf.data("salt"), kdf.text("hash"), kdf.number("iterations"))
    return Kdf(kind, kdf.data("salt"), "", kdf.number("time"), kdf.number("memory"), kdf.number("cpus"))
