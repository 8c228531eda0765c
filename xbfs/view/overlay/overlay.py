"""Copy-on-write over an immutable disk: reads merge the base with what was written, writes go to local files.

Owns what is done to units, so that no crash shows one without its data: ADR 0007 argues it. What becomes durable when
is ``state``'s, which layer a unit is in ``unitmap``'s, system calls are ``files``'. Any thread may call anything but
``close``, any time. Reads take no lock but the map's; writers of the same 4 KiB take turns; flushes that come together
share one.
"""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Final, Self

from xbfs.view.base import Extent, joined, joined_cached
from xbfs.view.overlay.freeze import FrozenOverlay, Saved
from xbfs.view.overlay.hydration import hydrate, materialise
from xbfs.view.overlay.reading import Reader
from xbfs.view.overlay.regions import LAYERS, Layer, Region, byte_runs, gathered, layered, merged, zeros
from xbfs.view.overlay.state import State
from xbfs.view.overlay.unitmap import COPIED, DATA, PAGE_UNITS, UNIT, ZERO
from xbfs_engine.core.errors import SessionBusy, StorageFull, UsageError
from xbfs_engine.core.limits import DISK_SIZE_MAX

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from threading import Event

    from typing_extensions import Buffer

    from xbfs.view.base import Part, RandomAccess
    from xbfs.view.overlay.files import StateFile, StateFiles
    from xbfs.view.overlay.header import Header
    from xbfs.view.overlay.recent import RecentMarks
    from xbfs_engine.core.runtime import Clock

_DATA_STATE: Final = bytes([DATA])
_ZERO_PIECE_UNITS: Final = 64 * PAGE_UNITS
"""Zeroed at once, 4 GiB: bounds how far the pages that wait for a flush outgrow their limit."""


class Overlay:
    """A writable disk; made by ``create_overlay`` and ``open_overlay``, which lock it until ``close``.

    Writes are seen by all reads that begin after them at once, and survive the end of the process. They survive that
    of the machine once a ``flush`` that began after them has returned; without it any of them may be lost then, 512
    bytes by 512 bytes, as on a disk with a write cache.
    Reading raises IntegrityError (never wrong bytes) or StorageError, of the base or of the overlay's files. A write
    that gives StorageFull, for want of room, can be repeated, and flushing goes on. After a sync that failed nothing
    can be written any more: what the disk has is not known until the overlay is opened anew.
    """

    def __init__(self, files: StateFiles, base: RandomAccess, header: Header, recent: RecentMarks) -> None:
        self._state = State(files, header, recent)
        self._base = base
        self._reader = Reader(self._state, base)
        self._is_closed = False
        self.read_bytes = 0
        """What was read since it was opened. About: threads that read at once may miss each other's."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def size_bytes(self) -> int:
        """The present size."""
        return self._state.header.size

    @property
    def identity(self) -> bytes:
        """What the creator said the base is."""
        return self._state.header.identity

    @property
    def is_hydrated(self) -> bool:
        """Whether all that the base holds was copied: it is not read any more, but where it says so."""
        return self._state.header.is_hydrated

    @property
    def hydrated_bytes(self) -> int:
        """How much of the data file is a copy of the base that nobody has written to, in whole units."""
        return self._state.map.count(COPIED) * UNIT

    @property
    def data_bytes(self) -> int:
        """How much of the disk was written and not discarded since, in whole units."""
        return self._state.map.count(DATA) * UNIT

    @property
    def dirty_bytes(self) -> int:
        """How much is written or zeroed, in whole units: what differs from the base, but for what was cut off."""
        return (self._state.map.count(DATA) + self._state.map.count(ZERO)) * UNIT

    def read_at(self, offset: int, length: int) -> bytes:
        """The bytes of [offset, offset+length), clipped at the end. May block."""
        return joined(self.parts_at(offset, length))

    def parts_at(self, offset: int, length: int) -> Sequence[Part]:
        """``read_at`` in pieces, not copied together."""
        # In this order: bytes that a shrink takes away meanwhile are then never taken for damage (``Reader.stored``).
        before = self._state.stamp
        end = min(offset + length, self._state.header.size)
        if offset >= end:
            return ()
        first = offset // UNIT
        states = self._state.map.states(first, -(-end // UNIT))
        parts: list[Part] = []
        for start, stop, state in byte_runs(states, first, offset, end):
            parts += self._reader.fetch(start, stop, state, limit=self._state.header.base_limit, before=before)
        self.read_bytes += end - offset
        return parts

    def read_cached(self, offset: int, length: int) -> bytes | memoryview | None:
        """The same bytes if all of them are in memory, else None. Never blocks, never raises."""
        return joined_cached(self.parts_cached(offset, length))

    def parts_cached(self, offset: int, length: int) -> Sequence[Part] | None:
        """``read_cached`` in pieces."""
        before = self._state.stamp
        end = min(offset + length, self._state.header.size)
        if offset >= end:
            return ()
        first = offset // UNIT
        states = self._state.map.states_cached(first, -(-end // UNIT))
        if states is None:
            return None
        limit = self._state.header.base_limit
        parts = gathered(
            byte_runs(states, first, offset, end),
            lambda *run: self._reader.fetch_cached(*run, limit=limit, before=before),
        )
        if parts is not None:
            self.read_bytes += end - offset
        return parts

    def write_at(self, offset: int, buffers: Sequence[Buffer]) -> None:
        """Write ``buffers`` one behind the other from ``offset``. They may not reach behind the end: ``resize`` first.

        Raises UsageError, StorageFull, StorageError; IntegrityError if the base can not be read around what is
        written. Then nothing was acknowledged: each byte is old or new.
        """
        length = sum([memoryview(part).nbytes for part in buffers])
        if length == 0:
            return
        self._state.admit()
        first, last = offset // UNIT, -(-(offset + length) // UNIT)
        self._change(first, last, partial(self._write, offset, length, buffers))

    def write_zeroes(self, offset: int, length: int) -> None:
        """Make a range zero, giving its room back where whole units lie in it. Raises as ``write_at``."""
        end = offset + length
        while offset < end:
            self._state.admit()
            first = offset // UNIT
            last = min(-(-end // UNIT), first + _ZERO_PIECE_UNITS)
            stop = min(end, last * UNIT)
            self._change(first, last, partial(self._zero, offset, stop))
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
        self._state.admit()
        with self._state.alone():
            if self._state.is_passed:
                raise SessionBusy("the kernel has the disk's file: its size stays")
            if self._state.saved is not None and size_bytes < self.size_bytes:
                self._state.saved.save_cut(size_bytes // UNIT)
            self._state.resize(size_bytes)

    def flush(self) -> None:
        """What was acknowledged before this call survives any crash. Raises StorageFull (try again), StorageError."""
        self._state.flush()

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        """Alternating data and hole extents that cover [offset, offset+length), clipped at the end. May block."""
        return self._reader.extents(self._pieces(offset, length), self._state.stamp)

    def regions(self, offset: int, length: int) -> Iterator[Region]:
        """Which layer each part of [offset, offset+length) is in, clipped at the end; neighbours differ. May block.

        What changes while it runs is told or not.
        """
        pieces = ((start, size, LAYERS[state]) for start, size, state in self._pieces(offset, length))
        return (Region(*piece) for piece in merged(pieces))

    def changed_extents(self) -> Iterator[Region]:
        """All regions that are not the base's, ascending: what a new restore point must read. May block."""
        return (region for region in self.regions(0, self._state.header.size) if region.layer is not Layer.BASE)

    def close(self) -> None:
        """Flush and let go of the files and the lock, once; nobody may be in a call. Raises as ``flush``."""
        if self._is_closed:
            return
        self._is_closed = True
        self._state.close()

    def hydrate(
        self,
        *,
        rate_bytes_s: int | None,
        clock: Clock,
        stop: Event,
        on_progress: Callable[[int, int], None] = lambda _done, _total: None,
    ) -> None:
        """Copy what the base holds into the overlay's files, beside all that the guest does, until it is done or
        ``stop`` is set; can be repeated, and goes on where it ended, after a crash too. One call at a time. Leaves room
        for the guest's writes: StorageFull comes when the file system has less than 1 GiB or a tenth of it left.

        ``rate_bytes_s``: how fast the base is read at most. ``on_progress`` gets how far it is in the base and where
        that ends, in bytes. Raises as ``write_at``, and what reading the base raises.
        """
        hydrate(self._state, self._base, rate_bytes_s, clock, stop, on_progress)

    def passthrough_fd(self) -> int | None:
        """The data file's descriptor, for the kernel to read and write the disk without us; None before the overlay
        is hydrated. The file is the disk then, and ``changed_extents`` tells all of it, for ever.

        Until ``end_passthrough`` the disk can not be frozen or resized, nobody may write behind its end, and ``flush``
        is due as ever. Waits for writers. Raises SessionBusy while the disk is frozen, StorageFull, StorageError.
        """
        self._state.admit()
        with self._state.alone():
            if self._state.saved is not None:
                raise SessionBusy("the disk is frozen", hint="wait until the commit of the session has ended")
            if not self.is_hydrated:
                return None
            materialise(self._state)
            self._state.is_passed = True
            return self._state.data.fileno()

    def end_passthrough(self) -> None:
        """Nobody uses the descriptor any more; what was written behind the end is cut off. Raises StorageError."""
        with self._state.alone():
            if self._state.is_passed:
                self._state.wrote()
                self._state.is_passed = False
                if self._state.data.size() > self.size_bytes:
                    self._state.data.truncate(self.size_bytes)

    @property
    def is_passed_through(self) -> bool:
        """Whether the kernel reads and writes the disk without us."""
        return self._state.is_passed

    def settle(self) -> None:
        """End what a crash cut short; for who makes or opens it, before anything else."""
        self._state.recover()

    def _change(self, first: int, last: int, change: Callable[[], None]) -> None:
        """Do ``change`` to units [first, last), alone in them."""
        self._state.ranges.acquire(first, last)
        try:
            try:
                change()
            except StorageFull as exc:
                # A commit takes no room from the guest: what it saved goes first.
                if self._state.saved is None or not self._state.saved.gives_way(exc):
                    raise
                change()
        finally:
            self._state.ranges.release(first, last)

    def _write(self, offset: int, length: int, buffers: Sequence[Buffer]) -> None:
        """``write_at`` for who holds the range."""
        end = offset + length
        first, last = offset // UNIT, -(-end // UNIT)
        size = self._state.header.size
        if offset < 0 or end > size:
            raise UsageError(f"bytes [{offset}, {end}) do not lie in a disk of {size} bytes")
        self._save(first, last)
        states = self._state.map.states(first, last)
        if COPIED in states:
            self._state.own(first, last)
            states = self._state.map.states(first, last)
        is_new = states != _DATA_STATE * len(states)
        if is_new:
            # New units are written whole: the map will tell that all of their bytes are here.
            self._state.map.reserve(first, last)
            begin, stop = first * UNIT, min(last * UNIT, size)
            head = self._under(begin, offset, states[0])
            tail = self._under(end, stop, states[-1])
            buffers = [*head, *buffers, *tail]
            offset = begin if head else offset
        self._state.data.write_at(offset, buffers)
        self._state.wrote()
        if is_new:
            self._state.map.mark(first, last, DATA)

    def _zero(self, offset: int, end: int) -> None:
        """``write_zeroes`` for who holds the range."""
        size = self._state.header.size
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
        if self._state.is_passed:
            self._state.clear(start, stop)
            return
        self._state.map.reserve(first, last)
        self._save(first, last)
        if self.hydrated_bytes:
            self._state.own(first, last)
        self._state.map.mark(first, last, ZERO)
        # Needs no sync: whatever the data file holds below a unit that is zero is never read.
        self._state.data.punch(start, stop - start)

    def _under(self, start: int, stop: int, state: int) -> Sequence[Part]:
        """What a write of the rest of a unit must bring along: [start, stop), which is not in the data file yet."""
        if start >= stop or state == DATA:
            return ()
        header = self._state.header
        is_zero = state == ZERO or header.is_hydrated
        return zeros(stop - start) if is_zero else self._reader.based(start, stop, header.base_limit)

    def _save(self, first: int, last: int) -> None:
        """Before units change: a freeze keeps what they were."""
        if self._state.saved is not None:
            self._state.saved.save(first, last)

    def _frozen(self, data: StateFile, states: StateFile) -> FrozenOverlay:
        """The disk as it is now, for who is alone."""
        self._state.saved = Saved(self._state, data, states)
        return FrozenOverlay(self._state, self._reader, self._state.saved)

    def _pieces(self, offset: int, length: int) -> Iterator[tuple[int, int, int]]:
        """Pieces (offset, length, state) that cover [offset, offset+length), clipped; not always as long as can be."""
        end = min(offset + length, self._state.header.size)
        if offset >= end:
            return
        for run in self._state.map.runs(offset // UNIT, -(-end // UNIT)):
            # Asked for after the states: a unit that a shrink made absent is behind the limit that it had set before.
            yield from layered([run], self._state.header.base_limit, offset, end)


def freeze_all(overlays: Sequence[Overlay]) -> list[FrozenOverlay]:
    """All disks as they are at one moment between writes: every write that was acknowledged before is in them, none
    that begins later (a longer write of zeroes than 4 GiB may be there in part). Guests go on writing, at the cost of
    saving what they overwrite, into files without a name beside the overlay's, until the frozen disks are closed.

    Waits for writes that run. ``overlays`` are in the order of the result, each once. Raises SessionBusy if one is
    frozen already or passed through, StorageError; then none is frozen.
    """
    with ExitStack() as undo:
        files = [[overlay._state.data.unnamed() for _ in range(2)] for overlay in overlays]
        for file in chain.from_iterable(files):
            undo.callback(file.close)
        with ExitStack() as held:
            # In one order: two that freeze the same disks do not wait for each other in a circle.
            for overlay in sorted(overlays, key=id):
                held.enter_context(overlay._state.alone())
            if any(overlay._state.saved is not None for overlay in overlays):
                raise SessionBusy("a disk is frozen already", hint="wait until the other commit has ended")
            if any(overlay._state.is_passed for overlay in overlays):
                raise SessionBusy("the kernel writes a disk without us", hint="shut the VM down first, then run again")
            frozen = [overlay._frozen(*pair) for overlay, pair in zip(overlays, files, strict=True)]
        undo.pop_all()
        return frozen
