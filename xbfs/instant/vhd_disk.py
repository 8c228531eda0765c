"""The guest's disk in a VHD file that a host has written into, and where it is not the disk the session began with.

The file began as our synthetic dynamic VHD. A host writes allocated blocks in place; a new block it puts behind the
others, with a bitmap of the sectors written; the footer moves, and tapdisk puts it back only when it closes the file.
Owns nothing but two BATs (8 MiB for 2040 GiB); bitmaps are read whenever they are asked, so any thread may call.
"""

from __future__ import annotations

import heapq
from operator import itemgetter
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np

from xbfs.view.base import Extent, joined, joined_cached
from xbfs.view.overlay.regions import Layer, Region, merged, zeros
from xbfs_engine.core.errors import CommitRefused, IntegrityError, SourceUnreadable
from xbfs_engine.formats.vhd_records import (
    BLOCK_SIZE,
    FOOTER_SIZE,
    HEADER_SIZE,
    SECTOR_SIZE,
    VhdFooter,
    VhdType,
    parse_vhd_footer,
    parse_vhd_header,
)
from xbfs_engine.formats.vhd_table import ENTRY_SIZE, UNUSED, parse_vhd_table, present_runs, present_units

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from numpy.typing import NDArray

    from xbfs.view.base import Part, RandomAccess

_ROOM: Final = SECTOR_SIZE + BLOCK_SIZE
_HINT: Final = "shut the VM down and look at the file with `vhd-util check` on the host"
_COALESCE: Final = "delete the VM's snapshots in XenServer, wait until they have coalesced, then run again"


class _Vhd(NamedTuple):
    size_bytes: int
    table: NDArray[np.uint32]


class VhdDisk:
    """The disk in ``image``, a RandomAccess itself.

    ``changed()`` gives where ``image`` differs from ``base``, ascending and disjoint, in bytes of the file; what is
    not in there is equal. It is asked anew for every ``changed_extents``. ``base`` is the synthetic VHD, made of a
    disk of ``disk_size_bytes``. Raises IntegrityError if the file is no sound VHD, CommitRefused if it is not the
    whole disk; afterwards its methods raise IntegrityError, and what reading ``image`` and ``base`` raises.
    Construction blocks.
    """

    def __init__(
        self, image: RandomAccess, changed: Callable[[], Iterable[Region]], base: RandomAccess, disk_size_bytes: int
    ) -> None:
        self._image, self._changed, self._base = image, changed, base
        vhd, old = _opened(image), _opened(base)
        self._table = vhd.table
        self._old = np.full(len(vhd.table), UNUSED, np.uint32)
        known = min(len(vhd.table), len(old.table))
        self._old[:known] = old.table[:known]
        self._size = vhd.size_bytes
        # The zeros that round our VHD's size up are no part of the disk, unless the guest has put something there.
        if vhd.size_bytes == old.size_bytes and disk_size_bytes < vhd.size_bytes:
            tail = self.parts_at(disk_size_bytes, vhd.size_bytes - disk_size_bytes)
            if not any(bytes(part).strip(b"\0") for part in tail):
                self._size = disk_size_bytes

    @property
    def size_bytes(self) -> int:
        """Of the guest's disk: as the session began, or as it was resized, or with what was written behind its end."""
        return self._size

    def read_at(self, offset: int, length: int) -> bytes:
        """The bytes of [offset, offset+length), clipped at the end. May block."""
        return joined(self.parts_at(offset, length))

    def parts_at(self, offset: int, length: int) -> list[Part]:
        """``read_at`` in pieces, not copied together."""
        parts = self._parts(offset, length, self._image.parts_at)
        if parts is None:
            raise IntegrityError("the VHD ends within a block", hint=_HINT)
        return parts

    def read_cached(self, offset: int, length: int) -> bytes | memoryview | None:
        """The same bytes if all of them are in memory, else None. Never blocks, never raises."""
        return joined_cached(self.parts_cached(offset, length))

    def parts_cached(self, offset: int, length: int) -> list[Part] | None:
        """``read_cached`` in pieces."""
        return self._parts(offset, length, self._image.parts_cached)

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        """Alternating data and hole extents that cover [offset, offset+length), clipped at the end. May block."""
        return (Extent(*piece) for piece in merged(self._pieces(offset, length)))

    def changed_extents(self) -> Iterator[Region]:
        """Where the disk may differ from the one the session began with, ascending and disjoint. May block."""
        moved = heapq.merge(self._written(), self._moved(), key=itemgetter(0))
        clipped = ((start, min(stop, self._size) - start, Layer.DATA) for start, stop in moved if start < self._size)
        at = None
        pending: Region | None = None
        for start, length, layer in clipped:
            if pending is not None and at == start:
                pending = Region(pending.offset, pending.length + length, layer)
            else:
                if pending is not None:
                    yield pending
                pending = Region(start, length, layer)
            at = start + length
        if pending is not None:
            yield pending

    def _parts(self, offset: int, length: int, fetch: Callable[[int, int], Sequence[Part] | None]) -> list[Part] | None:
        """None if ``fetch`` has not got all of a piece."""
        parts: list[Part] = []
        for block, start, stop in _blocks(offset, min(offset + length, self._size)):
            place = self._place(block)
            if place is None:
                parts += zeros(stop - start)
                continue
            bitmap = _exactly(fetch, place, SECTOR_SIZE)
            if bitmap is None:
                return None
            for low, high, is_present in present_runs(joined(bitmap), start, stop):
                found = _exactly(fetch, place + SECTOR_SIZE + low, high - low) if is_present else zeros(high - low)
                if found is None:
                    return None
                parts += found
        return parts

    def _pieces(self, offset: int, length: int) -> Iterator[tuple[int, int, bool]]:
        for block, start, stop in _blocks(offset, min(offset + length, self._size)):
            place, at = self._place(block), block * BLOCK_SIZE
            if place is None:
                yield at + start, stop - start, False
                continue
            for low, high, is_present in present_runs(self._bitmap(place), start, stop):
                if not is_present:
                    yield at + low, high - low, False
                    continue
                covered = low
                for extent in self._image.extents(place + SECTOR_SIZE + low, high - low):
                    yield at + covered, extent.length, extent.is_data
                    covered += extent.length
                if covered != high:
                    raise IntegrityError("the VHD ends within a block", hint=_HINT)

    def _written(self) -> Iterator[tuple[int, int]]:
        """Of blocks that lie where they lay: what was written, or all of the block if its bitmap is another now."""
        blocks = np.flatnonzero((self._table == self._old) & (self._table != UNUSED))
        places = self._table[blocks].astype(np.int64) * SECTOR_SIZE
        assert bool((np.diff(places) > 0).all())  # the base is ours, and rising
        done = 0
        for region in self._changed():
            stop = region.offset + region.length
            low, high = np.searchsorted(places, (region.offset - _ROOM + 1, stop))
            for block, place in zip(blocks[low:high].tolist(), places[low:high].tolist(), strict=True):
                at, data = block * BLOCK_SIZE, place + SECTOR_SIZE
                start = max(region.offset, done)
                if start < data and start < stop and self._bitmap(place) != self._base.read_at(place, SECTOR_SIZE):
                    yield at, at + BLOCK_SIZE
                    done = place + _ROOM
                    continue
                first, last = max(start, data) - data, min(stop - data, BLOCK_SIZE)
                if first < last:
                    yield at + first, at + last

    def _moved(self) -> Iterator[tuple[int, int]]:
        """Of blocks that are elsewhere now: all, but of new ones only what is present."""
        for block in np.flatnonzero(self._table != self._old):
            at, place = int(block) * BLOCK_SIZE, self._place(int(block))
            if place is None or self._old[block] != UNUSED:
                yield at, at + BLOCK_SIZE
            else:
                for start, stop in present_units(self._bitmap(place)):
                    yield at + start, at + stop

    def _place(self, block: int) -> int | None:
        """Where in the file the block's bitmap lies."""
        entry = int(self._table[block])
        return None if entry == UNUSED else entry * SECTOR_SIZE

    def _bitmap(self, place: int) -> bytes:
        return _read(self._image, place, SECTOR_SIZE)


def _opened(image: RandomAccess) -> _Vhd:
    """Raises IntegrityError, CommitRefused."""
    try:
        footer, end = _footer(image)
        _demand_whole(footer)
        header = parse_vhd_header(_read(image, footer.data_offset, HEADER_SIZE), footer)
        if header.block_size != BLOCK_SIZE:
            raise IntegrityError(f"the VHD has blocks of {header.block_size} bytes, ours had 2 MiB", hint=_HINT)
        blocks = -(-footer.size_bytes // BLOCK_SIZE)
        first = header.table_offset + header.entries * ENTRY_SIZE
        table = parse_vhd_table(_read(image, header.table_offset, blocks * ENTRY_SIZE), first_byte=first, end_byte=end)
    except SourceUnreadable as exc:
        raise IntegrityError(exc.message, hint=_HINT) from exc
    return _Vhd(footer.size_bytes, table)


def _footer(image: RandomAccess) -> tuple[VhdFooter, int]:
    """The footer, and where blocks must end. While tapdisk has the file open there is only the copy at its beginning,
    and the last block may be cut where it was written last: guests' bytes, which may look like a footer of their own.
    """
    at = image.size_bytes - FOOTER_SIZE
    if at < FOOTER_SIZE:
        raise IntegrityError(f"a VHD of {image.size_bytes} bytes is none", hint=_HINT)
    open_end = image.size_bytes + BLOCK_SIZE
    last, first = _parsed(_read(image, at, FOOTER_SIZE)), _read(image, 0, FOOTER_SIZE)
    copy = _parsed(first)
    if last is not None and (copy is None or copy.uuid16 == last.uuid16):
        return last, at
    return parse_vhd_footer(first), open_end


def _parsed(data: bytes) -> VhdFooter | None:
    try:
        return parse_vhd_footer(data)
    except SourceUnreadable:
        return None


def _demand_whole(footer: VhdFooter) -> None:
    if footer.hidden or footer.disk_type == VhdType.DIFFERENCING:
        raise CommitRefused("the disk has snapshots in XenServer: this VHD is only a part of it", hint=_COALESCE)
    if footer.disk_type != VhdType.DYNAMIC:
        raise CommitRefused("the VHD is a fixed one, the session's was dynamic", hint="copy the disk with XenServer")


def _blocks(offset: int, end: int) -> Iterator[tuple[int, int, int]]:
    """(block, start, stop): the range in pieces, in bytes of their blocks."""
    while offset < end:
        block, start = divmod(offset, BLOCK_SIZE)
        stop = min(BLOCK_SIZE, start + end - offset)
        yield block, start, stop
        offset += stop - start


def _read(image: RandomAccess, offset: int, length: int) -> bytes:
    data = image.read_at(offset, length)
    if len(data) != length:
        raise IntegrityError(f"the VHD ends at {offset + len(data)}, within its tables", hint=_HINT)
    return data


def _exactly(fetch: Callable[[int, int], Sequence[Part] | None], offset: int, length: int) -> Sequence[Part] | None:
    parts = fetch(offset, length)
    return parts if parts is not None and sum(map(len, parts)) == length else None
