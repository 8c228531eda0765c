"""VHD files on a share as blktap has them: read as strictly as ``vhd-util scan`` and tapdisk, written as by tapdisk.

Owns the bytes of one file; where it lies is the share's affair. One writer at a time, as for every layer.
"""

from __future__ import annotations

import struct
import time
import uuid as uuids
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np

from . import vhd
from .layers import BLOCK, UNIT, Layer

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .share import Share

SECTOR: Final = 512
BLOCK_SECTORS: Final = BLOCK // SECTOR
_FOOTER: Final = struct.Struct(">8sIIQI4sIIQQIII16sBB426s")
_HEADER: Final = struct.Struct(">8sQQIIII16sII512s192s256s")
_BATMAP: Final = struct.Struct(">8sQIII484x")
_LOCATOR: Final = struct.Struct(">4sIIIQ")
_FOOTER_SUM, _HEADER_SUM, _HIDDEN_AT = 64, 36, 85
_ONES: Final = (1 << 64) - 1
_TAP_VERSION: Final = 0x00010003
_WITH_BATMAP: Final = 0x00010002
"""Creator "tap" of this version and later has a batmap (blktap, vhd_has_batmap)."""
_EPOCH_2000: Final = 946684800
_LEEWAY_S: Final = 60
_SPACE: Final = SECTOR
_FULL: Final = b"\xff" * SECTOR


class BadVhd(Exception):
    """A rule of the format is broken: no host would take the file."""


class Footer(NamedTuple):
    """What counts of a footer."""

    data_offset: int
    size_bytes: int
    kind: int
    id: bytes
    hidden: bool
    has_batmap: bool


class VhdLayer(Layer):
    """One file. ``parent`` is the uuid (file name) of the file below a differencing disk, else None."""

    def __init__(self, share: Share, uuid: str) -> None:
        """Read and check the file. Raises BadVhd, IoFailure."""
        self._share, self.uuid = share, uuid
        size = share.size(self.name)
        _rule(size >= 2 * SECTOR, "too short")
        self._footer_at = size - SECTOR
        self._footer = share.read(self.name, self._footer_at, SECTOR)
        fields = _footer(self._footer)
        self.id, self._kind, self.hidden, self.virtual_size = fields.id, fields.kind, fields.hidden, fields.size_bytes
        # vhd-util query prints whole MiB, and SM believes it.
        super().__init__(share.place, self.virtual_size >> 20 << 20)
        self.parent: str | None = None
        self.parent_id = bytes(16)
        self._bat: dict[int, int] = {}
        self._bitmaps: dict[int, bytes] = {}
        if self._kind == vhd.FIXED:
            _rule(fields.data_offset == _ONES, "a fixed disk has no header")
            _rule(self._footer_at == self.virtual_size, "a fixed file is the disk and its footer")
            self.add(0, self.size_bytes)
        else:
            _rule(share.read(self.name, 0, SECTOR) == self._footer, "the footers at 0 and at the end differ")
            self._read_header(fields.data_offset, has_batmap=fields.has_batmap)

    @property
    def name(self) -> str:
        """Of the file."""
        return f"{self.uuid}.vhd"

    @property
    def empty(self) -> bool:
        """Whether no block is allocated."""
        return self._kind != vhd.FIXED and not self._bat

    def open(self) -> int:
        """There is no descriptor to give away."""
        raise AssertionError("a layer on a share is written by write() only")

    def stored_bytes(self) -> int:
        """The length of the file, in bytes."""
        return self._footer_at + SECTOR

    def read_into(self, offset_bytes: int, view: memoryview) -> None:
        """Bytes of the file's own; zeros where it has no block. Raises IoFailure."""
        for block, skip, start, count in _pieces(offset_bytes, len(view)):
            place = self._data_at(block)
            data = bytes(count) if place is None else self._share.read(self.name, place + skip, count)
            view[start : start + count] = data.ljust(count, b"\0")

    def write(self, offset_bytes: int, data: bytes | bytearray | memoryview) -> None:
        """Whole sectors: in place if the block is allocated, else in a block behind the others. Raises IoFailure."""
        assert offset_bytes % SECTOR == len(data) % SECTOR == 0
        for block, skip, start, count in _pieces(offset_bytes, len(data)):
            place = self._data_at(block)
            fresh = place is None
            if place is None:
                place = self._append_block()
            self._share.write(self.name, place + skip, bytes(data[start : start + count]))
            if self._kind != vhd.FIXED:
                self._mark(block, place - SECTOR, skip // SECTOR, count // SECTOR, fresh=fresh)
        self.add(offset_bytes, len(data))

    def link(self, uuid: str) -> None:
        """A second name, that of the base it becomes; a new child will take the first one (SM, FileSR.py)."""
        self._share.link(self.name, f"{uuid}.vhd")
        self.uuid = uuid

    def hide(self) -> None:
        """Set the hidden byte in both footers."""
        foot = bytearray(self._footer)
        foot[_HIDDEN_AT] = 1
        self._footer, self.hidden = vhd.summed(bytes(foot[:_FOOTER_SUM] + bytes(4) + foot[68:]), _FOOTER_SUM), True
        for at in (0, self._footer_at):
            self._share.write(self.name, at, self._footer)

    def remove(self) -> None:
        """Unlink the file."""
        self._share.unlink(self.name)

    def _read_header(self, at: int, *, has_batmap: bool) -> None:
        raw = self._share.read(self.name, at, _HEADER.size)
        _rule(len(raw) == _HEADER.size and _summed_right(raw, _HEADER_SUM), "checksum of the header")
        fields = _HEADER.unpack(raw)
        cookie, table_at, version, entries, block = fields[0], fields[2], fields[3], fields[4], fields[5]
        _rule(cookie == b"cxsparse" and version == 0x00010000, "no header")
        _rule(block == BLOCK, "blocks are not of 2 MiB")
        _rule(entries >= -(-self.virtual_size // BLOCK), "the BAT is too short for the disk")
        _rule(table_at >= at + _HEADER.size and table_at + entries * 4 <= self._footer_at, "the BAT is not in the file")
        self._table_at, self._entries = int(table_at), int(entries)
        table = np.frombuffer(self._share.read(self.name, self._table_at, self._entries * 4), dtype=">u4")
        self._bat = {n: int(table[n]) * SECTOR for n in np.flatnonzero(table != vhd.UNUSED).tolist()}
        self._batmap_at, self._batmap = 0, bytearray()
        end = self._table_at + -(-self._entries * 4 // SECTOR) * SECTOR
        if has_batmap:
            self._read_batmap(end)
            end = self._batmap_at + len(self._batmap)
        for place in sorted(self._bat.values()):
            _rule(end <= place and place + SECTOR + BLOCK <= self._footer_at, "a block lies over others, or outside")
            end = place + SECTOR + BLOCK
        if self._kind == vhd.DIFFERENCING:
            self.parent_id, self.parent = bytes(fields[7]), self._parent_name(fields[11])
        for number, place in self._bat.items():
            self._note_block(number, place)

    def _read_batmap(self, at: int) -> None:
        cookie, where, sectors, version, stored = _BATMAP.unpack(self._share.read(self.name, at, SECTOR))
        _rule(cookie == b"tdbatmap" and version == _WITH_BATMAP, "no batmap behind the BAT")
        _rule(where >= at + SECTOR and sectors * SECTOR * 8 >= self._entries, "the batmap is too short")
        self._batmap_head_at, self._batmap_at = at, int(where)
        self._batmap = bytearray(self._share.read(self.name, self._batmap_at, int(sectors) * SECTOR))
        _rule(stored == ~sum(self._batmap) & 0xFFFFFFFF, "checksum of the batmap")
        full = np.unpackbits(np.frombuffer(bytes(self._batmap), dtype=np.uint8))
        _rule(all(n in self._bat for n in np.flatnonzero(full).tolist()), "the batmap has blocks that the BAT has not")

    def _parent_name(self, locators: bytes) -> str:
        for number in range(8):
            code, space, length, _, at = _LOCATOR.unpack_from(locators, number * _LOCATOR.size)
            if code == b"MACX" and 0 < length <= space:
                name = self._share.read(self.name, at, length).decode()
                return name.removeprefix("file://./").removesuffix(".vhd")
        raise BadVhd("no parent locator")

    def _note_block(self, number: int, place: int) -> None:
        bitmap = _FULL if self._is_full(number) else self._share.read(self.name, place, SECTOR)
        self._bitmaps[number] = bitmap
        sectors = np.unpackbits(np.frombuffer(bitmap, dtype=np.uint8)).reshape(-1, UNIT // SECTOR)
        # Over a parent a unit counts when it is whole: children are written in whole units only (DiskStore.write).
        whole = UNIT // SECTOR if self.parent else 1
        first = number * BLOCK // UNIT
        count = len(self.units[first : first + BLOCK // UNIT])
        self.units[first : first + count] = sectors.sum(axis=1)[:count] >= whole
        if number < len(self.blocks):
            self.blocks[number] = True

    def _is_full(self, number: int) -> bool:
        return bool(self._batmap) and bool(self._batmap[number // 8] & 0x80 >> number % 8)

    def _data_at(self, block: int) -> int | None:
        if self._kind == vhd.FIXED:
            return block * BLOCK
        place = self._bat.get(block)
        return None if place is None else place + SECTOR

    def _append_block(self) -> int:
        """Room for a block at the end, the footer behind it; returns where its data go, a multiple of 4 KiB."""
        data_at = -(-(self._footer_at + SECTOR) // 4096) * 4096
        self._footer_at = data_at + BLOCK
        self._share.write(self.name, self._footer_at, self._footer)
        return data_at

    def _mark(self, block: int, place: int, first: int, count: int, *, fresh: bool) -> None:
        """The sectors are present from now on: bitmap, then BAT, then batmap."""
        bits = np.unpackbits(np.frombuffer(self._bitmaps.get(block, bytes(SECTOR)), dtype=np.uint8))
        if not fresh and bits[first : first + count].all():
            return
        bits[first : first + count] = 1
        self._bitmaps[block] = np.packbits(bits).tobytes()
        self._share.write(self.name, place, self._bitmaps[block])
        if fresh:
            self._bat[block] = place
            begin = block // 128 * 128
            row = [
                self._bat.get(n, vhd.UNUSED * SECTOR) // SECTOR for n in range(begin, min(begin + 128, self._entries))
            ]
            # Behind the last entry are zeros in files that libvhd made; what pads the sector stays as it is.
            self._share.write(self.name, self._table_at + begin * 4, struct.pack(f">{len(row)}I", *row))
        if self._batmap and self._bitmaps[block] == _FULL:
            self._batmap[block // 8] |= 0x80 >> block % 8
            self._share.write(self.name, self._batmap_at, bytes(self._batmap))
            self._share.write(self.name, self._batmap_head_at, batmap_header(self._batmap_at, bytes(self._batmap)))


class RawLayer(Layer):
    """``<uuid>.raw``: the bytes of the disk and nothing else."""

    hidden = False
    parent: str | None = None

    def __init__(self, share: Share, uuid: str) -> None:
        self._share, self.name = share, f"{uuid}.raw"
        super().__init__(share.place, share.size(self.name) // UNIT * UNIT)
        self.add(0, self.size_bytes)

    @property
    def empty(self) -> bool:
        """Never."""
        return False

    def read_into(self, offset_bytes: int, view: memoryview) -> None:
        """Bytes of the file. Raises IoFailure."""
        for _, _, start, count in _pieces(offset_bytes, len(view)):
            view[start : start + count] = self._share.read(self.name, offset_bytes + start, count).ljust(count, b"\0")

    def write(self, offset_bytes: int, data: bytes | bytearray | memoryview) -> None:
        """In place. Raises IoFailure."""
        self._share.write(self.name, offset_bytes, bytes(data))

    def stored_bytes(self) -> int:
        """The length of the file."""
        return self.size_bytes

    def remove(self) -> None:
        """Unlink the file."""
        self._share.unlink(self.name)


def new_vhd(size_bytes: int, parent: VhdLayer | None) -> bytes:
    """The whole file of an empty disk, or of a child of ``parent``, as ``vhd-util create`` and ``snapshot`` make it."""
    entries = -(-size_bytes // BLOCK)
    batmap_at = 1536 + -(-entries * 4 // SECTOR) * SECTOR
    batmap = bytes(max(1, -(-entries // 4096)) * SECTOR)
    now = int(time.time()) - _EPOCH_2000
    kind = vhd.DYNAMIC if parent is None else vhd.DIFFERENCING
    locators, texts, name = b"", b"", ""
    if parent is not None:
        name = parent.name
        at = batmap_at + SECTOR + len(batmap)
        windows = f".\\{name}".encode("utf-16-le")
        for code, text in ((b"MACX", f"file://./{name}".encode()), (b"W2KU", windows), (b"W2RU", windows)):
            locators += _LOCATOR.pack(code, _SPACE, len(text), 0, at + len(texts))
            texts += text.ljust(_SPACE, b"\0")
    geometry = vhd.geometry(size_bytes // SECTOR)
    made = (b"tap\0", _TAP_VERSION, 0, size_bytes, size_bytes, geometry, kind, 0, uuids.uuid4().bytes, 0, 0, bytes(426))
    foot = vhd.summed(_FOOTER.pack(b"conectix", 2, 0x00010000, 512, now, *made), _FOOTER_SUM)
    below = (bytes(16), 0) if parent is None else (parent.id, now)
    header = _HEADER.pack(
        *(b"cxsparse", _ONES, 1536, 0x00010000, entries, BLOCK, 0),
        *(*below, 0, name.encode("utf-16-be"), locators, bytes(256)),
    )
    table = (b"\xff" * 4 * entries).ljust(batmap_at - 1536, b"\0")
    maps = batmap_header(batmap_at + SECTOR, batmap) + batmap
    return foot + vhd.summed(header, _HEADER_SUM) + table + maps + texts + foot


def batmap_header(at: int, batmap: bytes) -> bytes:
    """The sector in front of a batmap."""
    return _BATMAP.pack(b"tdbatmap", at, len(batmap) // SECTOR, _WITH_BATMAP, ~sum(batmap) & 0xFFFFFFFF)


def _footer(raw: bytes) -> Footer:
    _rule(len(raw) == SECTOR and raw[:8] == b"conectix", "no footer at the end")
    _rule(_summed_right(raw, _FOOTER_SUM), "checksum of the footer")
    _, _, version, data_offset, made, creator, by, _, _, size, _, kind, _, uuid, _, hidden, rest = _FOOTER.unpack(raw)
    _rule(version == 0x00010000, "version of the footer")
    _rule(made <= time.time() - _EPOCH_2000 + _LEEWAY_S, "made in the future")
    _rule(kind in (vhd.FIXED, vhd.DYNAMIC, vhd.DIFFERENCING), "type of the disk")
    _rule(any(uuid), "the uuid is null")
    _rule(hidden in (0, 1) and not any(rest), "reserved bytes are not zero")
    return Footer(data_offset, size, kind, uuid, bool(hidden), creator == b"tap\0" and by >= _WITH_BATMAP)


def _summed_right(raw: bytes, at: int) -> bool:
    return vhd.summed(raw[:at] + bytes(4) + raw[at + 4 :], at) == raw


def _pieces(offset: int, length: int) -> Iterator[tuple[int, int, int, int]]:
    """Cut a range at the edges of blocks: block, place in the block, place in the range, bytes."""
    done = 0
    while done < length:
        block, skip = divmod(offset + done, BLOCK)
        count = min(BLOCK - skip, length - done)
        yield block, skip, done, count
        done += count


def _rule(holds: bool, name: str) -> None:
    if not holds:
        raise BadVhd(name)
