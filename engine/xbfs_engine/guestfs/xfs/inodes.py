"""Inodes: found by number, checked, and taken apart into metadata and the two forks.

Layout: "XFS Algorithms & Data Structures", chapter On-disk Inode; bigtime and nrext64 as in the kernel's xfs_format.h.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np

from xbfs_engine.core.errors import GuestDamaged
from xbfs_engine.guestfs.base import Kind
from xbfs_engine.guestfs.crc32c import crc32c_rows
from xbfs_engine.guestfs.xfs.volume import Lru

if TYPE_CHECKING:
    from xbfs_engine.guestfs.xfs.volume import Volume

FORMAT_DEVICE: Final = 0
FORMAT_LOCAL: Final = 1
FORMAT_EXTENTS: Final = 2
FORMAT_BTREE: Final = 3

_CORE: Final = struct.Struct(">2sHBbHIIIHHQ8s8s8sQQIIHBbIHHI")
_CORE_V2_BYTES: Final = 100
"""With di_next_unlinked, the end of versions 1 and 2."""
_CORE_V3_BYTES: Final = 176
assert _CORE.size == _CORE_V2_BYTES - 4
_CRC_AT: Final = 100
_FLAGS2_AT: Final = 120
_CREATED_AT: Final = 144
_NUMBER_AT: Final = 152
_UUID_AT: Final = 160

_FLAG_REALTIME: Final = 1 << 0
_FLAG2_BIGTIME: Final = 1 << 3
_FLAG2_NREXT64: Final = 1 << 4

_NS: Final = 10**9
_BIGTIME_EPOCH_NS: Final = -(1 << 31) * _NS
_LEGACY_TIME: Final = struct.Struct(">ii")

_KINDS: Final = {
    0o01: Kind.FIFO,
    0o02: Kind.CHARACTER_DEVICE,
    0o04: Kind.DIRECTORY,
    0o06: Kind.BLOCK_DEVICE,
    0o10: Kind.FILE,
    0o12: Kind.SYMLINK,
    0o14: Kind.SOCKET,
}
"""By the type bits of the mode, shifted by twelve."""

_FORMATS: Final = {
    Kind.FILE: (FORMAT_EXTENTS, FORMAT_BTREE),
    Kind.DIRECTORY: (FORMAT_LOCAL, FORMAT_EXTENTS, FORMAT_BTREE),
    Kind.SYMLINK: (FORMAT_LOCAL, FORMAT_EXTENTS),
}
"""What the data fork of a kind may be; the others hold a device number or nothing."""

_WINDOW_SLOTS: Final = 64
"""Inodes read at once: they are allocated in chunks of this many."""
_WINDOWS_BYTES: Final = 2 << 20
_PARSED_MAX: Final = 512


class Fork(NamedTuple):
    """What an inode points to, as it lies in the inode: ``data`` is the literal area of the fork."""

    name: str
    format: int
    data: bytes
    extents: int


class Inode(NamedTuple):
    """A checked inode. ``attributes`` is None if it has no attribute fork."""

    number: int
    kind: Kind
    mode: int
    uid: int
    gid: int
    nlink: int
    size_bytes: int
    blocks: int
    atime_ns: int
    mtime_ns: int
    ctime_ns: int
    btime_ns: int | None
    is_realtime: bool
    content: Fork
    attributes: Fork | None

    @property
    def device(self) -> tuple[int, int]:
        """Major and minor of a device node: 14 and 18 bits."""
        number = int.from_bytes(self.content.data[:4], "big")
        return number >> 18, number & 0x3_FFFF


class Inodes:
    """The inodes of a volume. One thread at a time."""

    def __init__(self, volume: Volume) -> None:
        self._volume = volume
        self._windows: Lru[tuple[bytes, list[bool]]] = Lru(_WINDOWS_BYTES)
        self._parsed: Lru[Inode] = Lru(_PARSED_MAX)

    def get(self, number: int) -> Inode:
        """The inode, or GuestDamaged with its number."""
        inode = self._parsed.get(number)
        if inode is None:
            inode = self._parse(number, self._raw(number))
            self._parsed.put(number, inode, 1)
        return inode

    def _raw(self, number: int) -> bytes:
        geometry = self._volume.geometry
        block, slot = geometry.inode_place(number)
        blocks_at_once = max(1, _WINDOW_SLOTS >> geometry.inodes_per_block_log)
        first = block & -blocks_at_once
        try:
            geometry.offset_of(first, blocks_at_once)
        except GuestDamaged:  # it would leave the group
            first, blocks_at_once = block, 1
        window = self._windows.get(first if blocks_at_once > 1 else ~block)
        if window is None:
            data = self._volume.read_blocks(first, blocks_at_once)
            window = data, self._sound(data, geometry.offset_of(first, blocks_at_once))
            self._windows.put(first if blocks_at_once > 1 else ~block, window, len(data))
        slot += (block - first) << geometry.inodes_per_block_log
        data, sound = window
        if not sound[slot]:
            raise GuestDamaged(f"inode {number}: the checksum is wrong")
        return data[slot * geometry.inode_bytes : (slot + 1) * geometry.inode_bytes]

    def _sound(self, data: bytes, offset: int) -> list[bool]:
        """Which slots have the checksum they say, or come from the log."""
        rows = np.frombuffer(data, np.uint8).reshape(-1, self._volume.geometry.inode_bytes).copy()
        if not self._volume.geometry.has_checksums:
            return [True] * len(rows)
        stored = rows[:, _CRC_AT : _CRC_AT + 4].copy().view("<u4")[:, 0]
        rows[:, _CRC_AT : _CRC_AT + 4] = 0
        sound: list[bool] = (crc32c_rows(rows) == stored).tolist()
        if self._volume.is_replayed(offset, len(data)):
            size = self._volume.geometry.inode_bytes
            sound = [ok or self._volume.is_replayed(offset + slot * size, size) for slot, ok in enumerate(sound)]
        return sound

    def _parse(self, number: int, raw: bytes) -> Inode:
        core = _CORE.unpack_from(raw)
        magic, mode, version, content_format, old_nlink, uid, gid, nlink, _, _, big_extents = core[:11]
        accessed, modified, changed, size, blocks, _, extents, attribute_extents, fork_at, attribute_format = core[
            11:21
        ]
        is_v5 = self._volume.geometry.has_checksums
        if magic != b"IN" or version not in ((3,) if is_v5 else (1, 2)):
            raise GuestDamaged(f"inode {number}: there is no inode (version {version})")
        flags2 = self._check_identity(number, raw) if is_v5 else 0
        kind = _KINDS.get(mode >> 12)
        if kind is None:
            raise GuestDamaged(f"inode {number}: " + (f"mode {mode:#o} is none" if mode else "it is not in use"))
        if size >> 63 or (size == 0 and kind in (Kind.DIRECTORY, Kind.SYMLINK)):
            raise GuestDamaged(f"inode {number}: size {size} is not possible")
        if (blocks << self._volume.geometry.block_log) >> 63:
            raise GuestDamaged(f"inode {number}: {blocks} blocks are not possible")
        if content_format not in _FORMATS.get(kind, (FORMAT_DEVICE,)):
            raise GuestDamaged(f"inode {number}: fork format {content_format} is not possible for its kind")
        if flags2 & _FLAG2_NREXT64:
            extents, attribute_extents = big_extents, extents
        literal = raw[_CORE_V3_BYTES if is_v5 else _CORE_V2_BYTES :]
        split = fork_at << 3
        if split >= len(literal):
            raise GuestDamaged(f"inode {number}: the attribute fork is outside of the inode")
        time = _bigtime if flags2 & _FLAG2_BIGTIME else _legacy_time
        return Inode(
            number=number,
            kind=kind,
            mode=mode & 0o7777,
            uid=uid,
            gid=gid,
            nlink=old_nlink if version == 1 else nlink,
            size_bytes=size,
            blocks=blocks,
            atime_ns=time(accessed),
            mtime_ns=time(modified),
            ctime_ns=time(changed),
            btime_ns=time(raw[_CREATED_AT : _CREATED_AT + 8]) if is_v5 else None,
            is_realtime=kind is Kind.FILE and bool(core[23] & _FLAG_REALTIME),
            content=Fork("content", content_format, literal[: split or len(literal)], extents),
            attributes=Fork("attributes", attribute_format, literal[split:], attribute_extents) if split else None,
        )

    def _check_identity(self, number: int, raw: bytes) -> int:
        """Checks who a version 3 inode says it is; returns its second flags."""
        recorded = int.from_bytes(raw[_NUMBER_AT : _NUMBER_AT + 8], "big")
        if recorded != number:
            raise GuestDamaged(f"inode {number}: it says it is inode {recorded}")
        if raw[_UUID_AT : _UUID_AT + 16] != self._volume.geometry.meta_uuid:
            raise GuestDamaged(f"inode {number}: it belongs to another filesystem")
        return int.from_bytes(raw[_FLAGS2_AT : _FLAGS2_AT + 8], "big")


def _legacy_time(raw: bytes) -> int:
    seconds, nanoseconds = _LEGACY_TIME.unpack(raw)
    return int(seconds * _NS + nanoseconds)


def _bigtime(raw: bytes) -> int:
    return int.from_bytes(raw, "big") + _BIGTIME_EPOCH_NS
