"""The filesystem in a BitLocker volume: decrypted, its beginning put back, BitLocker's own data as zeros.

After libyal, "Virtual sector(s)". For one thread at a time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from xbfs_engine.core.limits import KIB
from xbfs_engine.guestfs.volumes.bitlocker.header import SIGNATURE, Area
from xbfs_engine.guestfs.volumes.crypt import SECTOR, CryptSource, SectorCipher
from xbfs_engine.guestfs.volumes.sources import Chain, Derived, Kept, Slice, Zeros

if TYPE_CHECKING:
    from xbfs_engine.formats.source import BlockSource
    from xbfs_engine.guestfs.volumes.bitlocker.header import BitLockerHeader

_NTFS: Final = b"NTFS    "
_MIRROR_AT: Final = 56

_PIECE_BYTES: Final = 64 * KIB
_PIECES_MAX: Final = 64
"""Kept of a volume with the diffuser: undoing it takes 2 ms for a sector and 4 for all of a piece."""


def plaintext(source: BlockSource, header: BitLockerHeader, key: bytes) -> BlockSource:
    """All of the volume, as Windows shows it."""
    cipher = SectorCipher(header.method.cipher, key)
    parts: list[BlockSource] = []

    def add(start: int, end: int) -> None:
        """What lies at ``start`` to ``end``: it is encrypted up to a certain place."""
        border = min(max(header.encrypted_bytes, start), end)
        if start < border:
            crypt = Slice(source, start, border - start)
            parts.append(CryptSource(crypt, cipher, header.sector_bytes, start // SECTOR))
        if border < end:
            parts.append(Slice(source, border, end - border))

    last = Area(header.size_bytes, 0)
    if header.version == 1:
        parts.append(_vista_boot(source, header, 0))
        parts.append(Slice(source, header.sector_bytes, header.head.length - header.sector_bytes))
        backup = Area(header.size_bytes - header.sector_bytes, header.sector_bytes)
        is_free = backup.start >= max(area.end for area in header.hidden)
        if is_free and source.read_at(backup.start, 11)[3:] == SIGNATURE:
            last = backup
    else:
        add(header.head.start, header.head.end)
    at = header.head.length
    for area in sorted(header.hidden):
        add(at, area.start)
        parts.append(Zeros(area.length))
        at = area.end
    add(at, last.start)
    if last.length:
        parts.append(_vista_boot(source, header, last.start))
    whole = Chain(parts)
    return Kept(whole, _PIECE_BYTES, _PIECES_MAX) if header.method.cipher.vector == "elephant" else whole


class _Bytes(Derived):
    """A few bytes that are made up."""

    def __init__(self, data: bytes) -> None:
        super().__init__(len(data))
        self._data = data

    def _read(self, offset: int, length: int) -> bytes:
        return self._data[offset : offset + length]


def _vista_boot(source: BlockSource, header: BitLockerHeader, start: int) -> BlockSource:
    """Windows Vista leaves NTFS' boot sector, and its copy, but for two fields."""
    sector = bytearray(source.read_at(start, header.sector_bytes))
    sector[3:11] = _NTFS
    sector[_MIRROR_AT : _MIRROR_AT + 8] = header.mirror_cluster.to_bytes(8, "little")
    return _Bytes(bytes(sector))
