"""What a BitLocker volume says of itself: its boot sector, and the first valid one of three blocks of metadata.

Layouts: libyal, "BitLocker Drive Encryption (BDE) format" 0.0.16; states of conversion after dislocker's
``metadata.priv.h``. Pure; hostile volumes give a header with its ``problem``.
"""

from __future__ import annotations

import hashlib
import struct
import uuid
import zlib
from typing import TYPE_CHECKING, Final, NamedTuple

from xbfs_engine.core.errors import GuestDamaged, GuestUnsupported, XbfsError
from xbfs_engine.core.limits import KIB
from xbfs_engine.guestfs.volumes.bitlocker import datums
from xbfs_engine.guestfs.volumes.crypt import CipherSpec

if TYPE_CHECKING:
    from xbfs_engine.formats.source import BlockSource
    from xbfs_engine.guestfs.volumes.bitlocker.datums import Datum, Protector, Sealed

SIGNATURE: Final = b"-FVE-FS-"
_SIGNATURE_TO_GO: Final = b"MSWIN4.1"
_SIGNATURE_AT: Final = 3
_BOOT_VISTA: Final = b"\xeb\x52\x90"
_BOOT: Final = b"\xeb\x58\x90"
_GUID_AT: Final = 160
_GUID_TO_GO_AT: Final = 424
_GUID: Final = uuid.UUID("4967d63b-2e29-4ad8-8399-f6a339e3d001").bytes_le
_GUID_ON_WRITE: Final = uuid.UUID("92a84d3b-dd80-4d0e-9e4e-b1e3284eaed8").bytes_le

_BLOCK: Final = struct.Struct("<8sHHHHQII3QQ")
_METADATA: Final = struct.Struct("<IIII16sIHHQ")
_VALIDATION: Final = struct.Struct("<HHI")
_VALIDATION_SEALED: Final = 2
_VALIDATION_BYTES_MAX: Final = 512
_BLOCKS: Final = 3
_AREA_BYTES: Final = 64 * KIB
_AREA_BYTES_VISTA: Final = 16 * KIB
_SECTOR_BYTES: Final = (512, 4096)
_CLUSTER_BYTES_MAX: Final = 64 * KIB
_HEAD_SECTORS_VISTA: Final = 16

_STATE_ENCRYPTED: Final = 4
_STATE_PAUSED: Final = 5
_STATES: Final = {
    1: "it says that it is decrypted",
    2: "its encryption or decryption is under way",
    3: "it is encrypted as it is written to",
}

_PROTECTORS_MAX: Final = 64
_STRETCHED_MAX: Final = 16
"""Protectors that a password or a recovery password is tried on, each for about a second."""

assert _BLOCK.size == 64
assert _METADATA.size == 48


class Method(NamedTuple):
    """How sectors are encrypted."""

    cipher: CipherSpec
    key_bytes: int
    """Of the key that the volume stores."""
    parts: tuple[slice, ...]
    """What of it is used."""


class Area(NamedTuple):
    """A range of bytes of the volume."""

    start: int
    length: int

    @property
    def end(self) -> int:
        """Where what is behind begins."""
        return self.start + self.length


class BitLockerHeader(NamedTuple):
    """All that is needed to open a BitLocker volume."""

    version: int
    """1: Windows Vista; 2: later."""
    uuid: str
    label: str
    """Computer, drive and date, as Windows wrote them when it was encrypted."""
    sector_bytes: int
    method: Method
    size_bytes: int
    encrypted_bytes: int
    """What lies behind is not encrypted; ``size_bytes`` unless a conversion was paused."""
    hidden: tuple[Area, ...]
    """Where BitLocker's own data lie: files of the filesystem, shown as zeros."""
    head: Area
    """Where the beginning of the filesystem lies; for version 1 in its place, and not encrypted."""
    mirror_cluster: int
    """Of the MFT; of version 1, whose boot sector has something else in its place."""
    protectors: tuple[Protector, ...]
    key: Sealed | None
    """The key of the sectors, encrypted with the volume master key."""
    digest: bytes
    """SHA-256 of the metadata."""
    validation: Sealed | None
    """The same as Windows computed it, encrypted with the volume master key."""
    problem: str = ""
    """Why no secret would open it; then all but the names may mean nothing."""


def find_bitlocker(source: BlockSource) -> BitLockerHeader | None:
    """The header, or None if there is none. One that can not be used is returned with its ``problem``."""
    if source.size_bytes < _SECTOR_BYTES[0]:
        return None
    boot = source.read_at(0, _SECTOR_BYTES[0])
    mark = boot[_SIGNATURE_AT : _SIGNATURE_AT + len(SIGNATURE)]
    if mark == _SIGNATURE_TO_GO:
        if boot[_GUID_TO_GO_AT : _GUID_TO_GO_AT + 16] not in (_GUID, _GUID_ON_WRITE):
            return None
        at = _GUID_TO_GO_AT
    elif mark == SIGNATURE:
        at = _GUID_AT
    else:
        return None
    try:
        sector_bytes, version, starts = _starts(source, boot, at)
        block = _first_valid(source, version, starts)
    except (GuestDamaged, GuestUnsupported) as error:
        return _NONE._replace(problem=error.message)
    try:
        return _parse(source, block, boot, sector_bytes)
    except (GuestDamaged, GuestUnsupported) as error:
        return _names(block)._replace(problem=error.message)


class _Checked(NamedTuple):
    """A block of metadata whose checksum is right."""

    version: int
    data: bytes
    validation: Sealed | None
    datums: list[Datum]


_NONE: Final = BitLockerHeader(
    0, "", "", 512, Method(CipherSpec("", ""), 0, ()), 0, 0, (), Area(0, 0), 0, (), None, b"", None
)


def _starts(source: BlockSource, boot: bytes, at: int) -> tuple[int, int, tuple[int, ...]]:
    """Size of sectors, version of the format, and where the blocks of metadata should lie."""
    # Windows 10 leaves the size out before exFAT.
    sector_bytes = int.from_bytes(boot[11:13], "little") or _SECTOR_BYTES[0]
    if sector_bytes not in _SECTOR_BYTES:
        raise GuestDamaged(f"BitLocker with sectors of {sector_bytes} bytes can not be")
    if boot[:3] == _BOOT:
        return sector_bytes, 2, struct.unpack_from("<3Q", boot, at + 16)
    if boot[:3] != _BOOT_VISTA:
        raise GuestUnsupported(f"BitLocker with a boot sector that begins with {boot[:3].hex()} is not known here")
    if sector_bytes != _SECTOR_BYTES[0]:
        raise GuestUnsupported(f"BitLocker of Windows Vista with sectors of {sector_bytes} bytes is not known")
    first = struct.unpack_from("<Q", boot, 56)[0] * boot[13] * sector_bytes
    if first + _BLOCK.size > source.size_bytes:
        raise GuestDamaged(f"BitLocker's metadata should lie at {first}, behind the end of the volume")
    block = _BLOCK.unpack(source.read_at(first, _BLOCK.size))
    return sector_bytes, 1, (first, *(block[9:11] if block[0] == SIGNATURE else ()))


def _first_valid(source: BlockSource, version: int, starts: tuple[int, ...]) -> _Checked:
    for start in starts:
        try:
            found = _checked(source, version, start)
        except XbfsError as error:
            if error.retryable:
                raise
            continue
        if found is not None:
            return found
    raise GuestDamaged(f"none of the {len(starts)} copies of BitLocker's metadata is valid")


def _checked(source: BlockSource, version: int, start: int) -> _Checked | None:
    """The block of metadata at ``start``, if its checksum is right and it says that it lies there."""
    if start + _BLOCK.size > source.size_bytes:
        return None
    fields = _BLOCK.unpack(source.read_at(start, _BLOCK.size))
    if fields[0] != SIGNATURE or fields[2] != version or start not in fields[8:11]:
        return None
    size = fields[1] if version == 1 else fields[1] * 16
    if not _BLOCK.size + _METADATA.size <= size <= min(_AREA_BYTES, source.size_bytes - start):
        return None
    rest = min(_VALIDATION_BYTES_MAX, source.size_bytes - start - size)
    data = source.read_at(start, size + rest)
    data, tail = data[:size], data[size:]
    if len(tail) < _VALIDATION.size:
        return None
    tail_bytes, tail_version, checksum = _VALIDATION.unpack_from(tail)
    if zlib.crc32(data) != checksum or tail_bytes < _VALIDATION.size:
        return None
    validation = None
    if tail_version >= _VALIDATION_SEALED:
        found = datums.datums(tail[_VALIDATION.size : min(tail_bytes, len(tail))][:80])
        if not found or found[0].value != datums.SEALED:
            return None
        validation = datums.sealed(found[0])
    metadata_bytes, _, header_bytes, *_ = _METADATA.unpack_from(data, _BLOCK.size)
    if header_bytes != _METADATA.size or not header_bytes <= metadata_bytes <= size - _BLOCK.size:
        return None
    entries = datums.datums(data[_BLOCK.size + header_bytes : _BLOCK.size + metadata_bytes])
    return _Checked(version, data, validation, entries)


def _names(block: _Checked) -> BitLockerHeader:
    """A header of which only the names, the protectors and what is checked with them are true."""
    label = next((datums.text(d) for d in block.datums if d.type == datums.DESCRIPTION), "")
    identity = datums.guid(_METADATA.unpack_from(block.data, _BLOCK.size)[4])
    return _NONE._replace(version=block.version, uuid=identity, label=label)


def _parse(source: BlockSource, block: _Checked, boot: bytes, sector_bytes: int) -> BitLockerHeader:
    _, _, _, state, next_state, encrypted, converting, head_sectors, *starts, last = _BLOCK.unpack_from(block.data)
    version = block.version
    if version > 1 and _GUID_ON_WRITE in (boot[_GUID_AT : _GUID_AT + 16], boot[_GUID_TO_GO_AT : _GUID_TO_GO_AT + 16]):
        raise GuestUnsupported("BitLocker has not yet encrypted all of it, which is not read here")
    protectors = tuple(datums.protector(d) for d in block.datums if d.type == datums.VMK)
    stretched = sum(protector.salt is not None for protector in protectors)
    if len(protectors) > _PROTECTORS_MAX or stretched > _STRETCHED_MAX:
        raise GuestUnsupported(f"BitLocker with {len(protectors)} key protectors is not tried")
    sealed = next((datums.sealed(d) for d in block.datums if d.type == datums.FVEK and d.value == datums.SEALED), None)
    if sealed is None:
        raise GuestDamaged("BitLocker's metadata have no key of the volume")
    method = _method(_METADATA.unpack_from(block.data, _BLOCK.size)[6], sector_bytes)
    size = source.size_bytes // sector_bytes * sector_bytes
    if version == 1:
        head = Area(0, _HEAD_SECTORS_VISTA * sector_bytes)
        cluster = min(boot[13] * sector_bytes, _CLUSTER_BYTES_MAX)
        area_bytes = -(-_AREA_BYTES_VISTA // cluster) * cluster
        encrypted = size
    else:
        head = _head(block, last, head_sectors * sector_bytes)
        area_bytes = _AREA_BYTES
    if state == _STATE_ENCRYPTED == next_state:
        size = encrypted = min(size, encrypted)
    elif state != _STATE_PAUSED or version == 1 or converting:
        words = _STATES.get(state, "a conversion of it was left unfinished")
        raise GuestUnsupported(f"BitLocker: {words} (state {state}, to become {next_state}), which is not read here")
    hidden = tuple(Area(start, area_bytes) for start in starts)
    if version > 1:
        hidden += (head,)
    _check(hidden, head, min(encrypted, size), size, sector_bytes)
    return _names(block)._replace(
        sector_bytes=sector_bytes, method=method, size_bytes=size, encrypted_bytes=min(encrypted, size), hidden=hidden,
        head=head, mirror_cluster=last, protectors=protectors, key=sealed,
        digest=hashlib.sha256(block.data).digest(), validation=block.validation,
    )  # fmt: skip


def _head(block: _Checked, start: int, length: int) -> Area:
    """Where the beginning of the filesystem was moved to: two places say so, of which the second may be missing."""
    place = next((d for d in block.datums if d.type == datums.VOLUME_HEADER and d.value == datums.PLACE), None)
    if place is not None and len(place.data) >= 16:
        found = Area(*struct.unpack_from("<QQ", place.data))
        if found != Area(start, length):
            raise GuestDamaged(f"BitLocker moved the volume's beginning to {found.start} or to {start}: it says both")
    if not length:
        raise GuestDamaged("BitLocker does not say where it moved the volume's beginning to")
    return Area(start, length)


def _check(hidden: tuple[Area, ...], head: Area, encrypted: int, size: int, sector_bytes: int) -> None:
    """That all areas are whole sectors of the volume and apart from one another."""
    if encrypted % sector_bytes or not 0 < encrypted <= size:
        raise GuestDamaged(f"BitLocker says that {encrypted} of {size} bytes are encrypted")
    end = head.length
    for area in sorted(hidden):
        if area.start < end or area.end > size or area.start % sector_bytes or area.length % sector_bytes:
            raise GuestDamaged(f"BitLocker has data of its own at {area.start} to {area.end}, where they can not be")
        end = area.end


def _method(number: int, sector_bytes: int) -> Method:
    """The encryption methods of libyal's table."""
    block = CipherSpec("cbc", "eboiv", 1)
    diffused = CipherSpec("cbc", "elephant", 1)
    xts = CipherSpec("xts", "plain64", sector_bytes)
    methods = {
        0x8000: Method(diffused, 64, (slice(0, 16), slice(32, 48))),
        0x8001: Method(diffused, 64, (slice(0, 64),)),
        0x8002: Method(block, 16, (slice(0, 16),)),
        0x8003: Method(block, 32, (slice(0, 32),)),
        0x8004: Method(xts, 32, (slice(0, 32),)),
        0x8005: Method(xts, 64, (slice(0, 64),)),
    }
    if number not in methods:
        raise GuestUnsupported(f"BitLocker's encryption method {number:#x} is not known here")
    return methods[number]
