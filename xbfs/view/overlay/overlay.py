"""Copy-on-write over an immutable disk: reads merge the base with what was written, writes go to local files.

Owns the order of what is done to the files, so that no crash shows a unit without its data: ADR 0007 argues it. Which
layer a unit is in is ``unitmap``'s, system calls are ``files``'. Any thread may call anything but ``close``, any time.
Reads take no lock but the map's; writers of the same 4 KiB take turns; flushes that come together share one.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Final, Self

from xbfs.view.base import Extent, joined
from xbfs.view.overlay.header import COPY_OFFSETS, Header, encode
from xbfs.view.overlay.ranges import RangeLock
from xbfs.view.overlay.regions import LAYERS, Layer, Region, byte_runs, merged, zeros
from xbfs.view.overlay.rounds import Rounds
from xbfs.view.overlay.unitmap import ABSENT, DATA, PAGE_UNITS, UNIT, ZERO, UnitMap
from xbfs_engine.core.errors import IntegrityError, StorageError, UsageError, XbfsError
from xbfs_engine.core.limits import DISK_SIZE_MAX

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from typing_extensions import Buffer

    from xbfs.view.base import Part, RandomAccess
    from xbfs.view.overlay.files import StateFile, StateFiles

_ALL_UNITS: Final = -(-DISK_SIZE_MAX // UNIT)
_DATA_STATE: Final = bytes([DATA])
_ZERO_PIECE_UNITS: Final = 64 * PAGE_UNITS
"""Zeroed at once, 4 GiB: bounds how far the pages that wait for a flush outgrow their limit."""


def store(file: StateFile, header: Header) -> None:
    """Have ``header`` in both copies, durably, one after the other: never touches both at once. Raises StorageError."""
    record = encode(header)
    # What a process that was killed had written may be in memory alone.
    file.sync()
    for offset in COPY_OFFSETS:
        if file.read_at(offset, len(record)) != record:
            file.write_at(offset, [record])
            file.sync()


class Overlay:
    """A writable disk; made by ``create_overlay`` and ``open_overlay``, which lock it until ``close``.

    Writes are seen by all reads that begin after them at once, and survive crashes once a ``flush`` that began after
    them has returned. Without it any of them may be lost, 512 bytes by 512 bytes, as on a disk with a write cache.
    Reading raises IntegrityError (never wrong bytes) or StorageError, of the base or of the overlay's files. A write
    that gives StorageFull, for want of room, can be repeated, and flushing goes on. After a sync that failed nothing
    can be written any more: what the disk has is not known until the overlay is opened anew.
    """

    def __init__(self, files: StateFiles, base: RandomAccess, header: Header) -> None:
        self._files = files
        self._data = files.data
        self._base = base
        self._header = header
        self._map = UnitMap(files.map)
        self._ranges = RangeLock()
        self._rounds = Rounds(self._sync)
        self._is_data_unsynced = False
        self._shrinks = 0
        self._failure: XbfsError | None = None
        self._is_closed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def size_bytes(self) -> int:
        """The present size."""
        return self._header.size

    @property
    def identity(self) -> bytes:
        """What the creator said the base is."""
        return self._header.identity

    @property
    def data_bytes(self) -> int:
        """How much lies in the data file, in whole units."""
        return self._map.count(DATA) * UNIT

    @property
    def dirty_bytes(self) -> int:
        """How much is written or zeroed, in whole units: what differs from the base, but for what was cut off."""
        return (self._map.count(DATA) + self._map.count(ZERO)) * UNIT

    def read_at(self, offset: int, length: int) -> bytes:
        """The bytes of [offset, offset+length), clipped at the end. May block."""
        return joined(self.parts_at(offset, length))

    def parts_at(self, offset: int, length: int) -> Sequence[Part]:
        """``read_at`` in pieces, not copied together."""
        # In this order: bytes that a shrink takes away meanwhile are then never taken for damage (``_stored``).
        shrinks = self._shrinks
        end = min(offset + length, self._header.size)
        if offset >= end:
            return ()
        first = offset // UNIT
        states = self._map.states(first, -(-end // UNIT))
        parts: list[Part] = []
        for start, stop, state in byte_runs(states, first, offset, end):
            if state == DATA:
                parts.append(self._stored(start, stop - start, shrinks))
            elif state == ZERO:
                parts += zeros(stop - start)
            else:
                parts += self._based(start, stop)
        return parts

    def read_cached(self, offset: int, length: int) -> bytes | memoryview | None:
        """The same bytes if all of them are in memory, else None. Never blocks, never raises."""
        parts = self.parts_cached(offset, length)
        if parts is None:
            return None
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def parts_cached(self, offset: int, length: int) -> Sequence[Part] | None:
        """``read_cached`` in pieces."""
        end = min(offset + length, self._header.size)
        if offset >= end:
            return ()
        first = offset // UNIT
        states = self._map.states_cached(first, -(-end // UNIT))
        if states is None:
            return None
        parts: list[Part] = []
        for start, stop, state in byte_runs(states, first, offset, end):
            found: Sequence[Part] | None = ()
            base_end = stop
            if state == DATA:
                stored = self._data.read_now(start, stop - start)
                found = None if stored is None else (stored,)
            else:
                base_end = self._base_end(start, stop) if state == ABSENT else start
                if base_end > start:
                    found = self._base.parts_cached(start, base_end - start)
            if found is None:
                return None
            parts += found
            parts += zeros(stop - base_end)
        return parts

    def write_at(self, offset: int, buffers: Sequence[Buffer]) -> None:
        """Write ``buffers`` one behind the other from ``offset``. They may not reach behind the end: ``resize`` first.

        Raises UsageError, StorageFull, StorageError; IntegrityError if the base can not be read around what is
        written. Then nothing was acknowledged: each byte is old or new.
        """
        length = sum([memoryview(part).nbytes for part in buffers])
        if length == 0:
            return
        self._admit()
        first, last = offset // UNIT, -(-(offset + length) // UNIT)
        self._ranges.acquire(first, last)
        try:
            self._write(offset, length, buffers)
        finally:
            self._ranges.release(first, last)

    def write_zeroes(self, offset: int, length: int) -> None:
        """Make a range zero, giving its room back where whole units lie in it. Raises as ``write_at``."""
        end = offset + length
        while offset < end:
            self._admit()
            first = offset // UNIT
            last = min(-(-end // UNIT), first + _ZERO_PIECE_UNITS)
            stop = min(end, last * UNIT)
            self._ranges.acquire(first, last)
            try:
                self._zero(offset, stop)
            finally:
                self._ranges.release(first, last)
            offset = stop

    def discard(self, offset: int, length: int) -> None:
        """The guest has no use for a range: it reads as zeros from now on, to the byte. Raises as ``write_at``."""
        self.write_zeroes(offset, length)

    def resize(self, size_bytes: int) -> None:
        """Cut off the end, or add zeros; durable when this returns. What was cut off never comes back.

        It is a flush too where it cuts. Waits for all writers. Raises UsageError, StorageFull (nothing has changed),
        StorageError.
        """
        if not 0 <= size_bytes <= DISK_SIZE_MAX:
            raise UsageError(f"a size of {size_bytes} bytes: at most {DISK_SIZE_MAX}")
        self._admit()
        self._ranges.acquire(0, _ALL_UNITS)
        try:
            with self._rounds.alone:
                if size_bytes > self._header.size:
                    self._grow(size_bytes)
                elif size_bytes < self._header.size:
                    self._shrink(size_bytes)
        finally:
            self._ranges.release(0, _ALL_UNITS)

    def flush(self) -> None:
        """What was acknowledged before this call survives any crash. Raises StorageFull (try again), StorageError."""
        self._rounds.run()

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        """Alternating data and hole extents that cover [offset, offset+length), clipped at the end. May block."""
        pieces = (piece for region in self.regions(offset, length) for piece in self._extents_of(region))
        return (Extent(*piece) for piece in merged(pieces))

    def regions(self, offset: int, length: int) -> Iterator[Region]:
        """Which layer each part of [offset, offset+length) is in, clipped at the end; neighbours differ. May block.

        What changes while it runs is told or not.
        """
        end = min(offset + length, self._header.size)
        layers = self._layers(offset, end) if offset < end else ()
        return (Region(*piece) for piece in merged(layers))

    def changed_extents(self) -> Iterator[Region]:
        """All regions that are not the base's, ascending: what a new restore point must read. May block."""
        return (region for region in self.regions(0, self._header.size) if region.layer is not Layer.BASE)

    def close(self) -> None:
        """Flush and let go of the files and the lock, once; nobody may be in a call. Raises as ``flush``."""
        if self._is_closed:
            return
        self._is_closed = True
        try:
            if self._failure is None:
                self.flush()
        finally:
            self._files.close()

    def settle(self) -> None:
        """Bring the files in line with the header's size, durably; nobody else writes. For opening and resizing."""
        size = self._header.size
        self._map.cut(-(-size // UNIT))
        if self._data.size() > size:
            self._data.truncate(size)
        self._sync(everything=True)
        self._map.recount()

    def _admit(self) -> None:
        """Refuse what would change anything after a failure; flush if the map can not take more."""
        self._check()
        if self._map.is_crowded:
            self.flush()

    def _check(self) -> None:
        if self._failure is not None:
            hint = "the disk may have lost what was written since the last good flush: close the overlay and open it"
            raise StorageError(f"the overlay stopped: {self._failure.message}", hint=hint) from self._failure

    def _write(self, offset: int, length: int, buffers: Sequence[Buffer]) -> None:
        """``write_at`` for who holds the range."""
        end = offset + length
        first, last = offset // UNIT, -(-end // UNIT)
        size = self._header.size
        if offset < 0 or end > size:
            raise UsageError(f"bytes [{offset}, {end}) do not lie in a disk of {size} bytes")
        states = self._map.states(first, last)
        is_new = states != _DATA_STATE * len(states)
        if is_new:
            # New units are written whole: the map will tell that all of their bytes are here.
            self._map.reserve(first, last)
            begin, stop = first * UNIT, min(last * UNIT, size)
            head = self._under(begin, offset, states[0])
            tail = self._under(end, stop, states[-1])
            buffers = [*head, *buffers, *tail]
            offset = begin if head else offset
        self._data.write_at(offset, buffers)
        # After the bytes and before the mark: a flush that takes the mark syncs the data, one that clears this has it.
        self._is_data_unsynced = True
        if is_new:
            self._map.mark(first, last, DATA)

    def _zero(self, offset: int, end: int) -> None:
        """``write_zeroes`` for who holds the range."""
        size = self._header.size
        if offset < 0 or end > size:
            raise UsageError(f"bytes [{offset}, {end}) do not lie in a disk of {size} bytes")
        first, last = -(-offset // UNIT), -(-end // UNIT) if end == size else end // UNIT
        start, stop = first * UNIT, min(last * UNIT, size)
        if start >= stop:
            self._write(offset, end - offset, zeros(end - offset))
            return
        if offset < start:
            self._write(offset, start - offset, zeros(start - offset))
        if stop < end:
            self._write(stop, end - stop, zeros(end - stop))
        self._map.reserve(first, last)
        self._map.mark(first, last, ZERO)
        # Needs no sync: whatever the data file holds below a unit that is zero is never read.
        self._data.punch(start, stop - start)

    def _under(self, start: int, stop: int, state: int) -> Sequence[Part]:
        """What a write of the rest of a unit must bring along: [start, stop), which is not in the data file yet."""
        if start >= stop or state == DATA:
            return ()
        return zeros(stop - start) if state == ZERO else self._based(start, stop)

    def _based(self, start: int, stop: int) -> Sequence[Part]:
        """[start, stop) of the base, and zeros where it ended."""
        end = self._base_end(start, stop)
        parts: list[Part] = []
        if end > start:
            parts += self._base.parts_at(start, end - start)
            assert sum(map(len, parts)) == end - start
        return parts + zeros(stop - end)

    def _base_end(self, start: int, stop: int) -> int:
        """How far the base reaches in [start, stop), at least ``start``.

        Asked for after the states: a unit that a shrink made absent is behind the limit that it had set before.
        """
        return max(start, min(stop, self._header.base_limit))

    def _stored(self, offset: int, length: int, shrinks: int) -> bytes:
        """Bytes of the data file. It is never shorter than the disk, unless it shrank since there were ``shrinks``."""
        data = self._data.read_at(offset, length)
        if len(data) < length:
            if shrinks == self._shrinks:
                hint = "the data file was cut: bring it back from a copy, or begin a new overlay"
                raise IntegrityError(f"the overlay's data ends at {offset + len(data)}", hint=hint)
            data = data.ljust(length, b"\0")
        return data

    def _grow(self, size_bytes: int) -> None:
        """The data file first: it is never shorter than the header says."""
        self._data.truncate(size_bytes)
        self._synced(self._data)
        header = self._header.resized(size_bytes)
        with self._no_return():
            store(self._files.header, header)
        self._header = header

    def _shrink(self, size_bytes: int) -> None:
        """The header first: what the map forgets must not show the base again."""
        header = self._header.resized(size_bytes)
        with self._no_return():
            store(self._files.header, header)
            self._header = header
            self._shrinks += 1
            self.settle()

    def _sync(self, *, everything: bool = False) -> None:
        """A round of flushing: the marks there are now, after their data. ``everything``: even what did not change."""
        self._check()
        pages = self._map.taken()
        try:
            if self._is_data_unsynced or everything:
                self._is_data_unsynced = False
                self._synced(self._data)
            self._map.write(pages)
            if pages or everything:
                self._synced(self._files.map)
        except BaseException:
            self._map.lost()
            raise
        self._map.kept()

    def _synced(self, file: StateFile) -> None:
        with self._no_return():
            file.sync()

    @contextmanager
    def _no_return(self) -> Iterator[None]:
        """After an error in here nobody knows what the disk has: nothing may be built on it."""
        try:
            yield
        except XbfsError as exc:
            self._failure = self._failure or exc
            raise

    def _layers(self, offset: int, end: int) -> Iterator[Region]:
        """The regions in [offset, end), not empty, not always as long as can be."""
        for first, last, state in self._map.runs(offset // UNIT, -(-end // UNIT)):
            start, stop = max(first * UNIT, offset), min(last * UNIT, end)
            base_end = self._base_end(start, stop) if state == ABSENT else stop
            if base_end > start:
                yield Region(start, base_end - start, LAYERS[state])
            if stop > base_end:
                yield Region(base_end, stop - base_end, Layer.ZERO)

    def _extents_of(self, region: Region) -> Iterable[Extent]:
        if region.layer is Layer.BASE:
            return self._base.extents(region.offset, region.length)
        return (Extent(region.offset, region.length, region.layer is Layer.DATA),)
