"""The files of an open overlay, what is known of them in memory, and the order in which they become durable.

Owns flushing, changes of the size and what a failed sync does to all that follows: ADR 0007 argues the orders. What
the bytes of a unit are is ``overlay``'s. Any thread may call anything; where the ranges must be held it is told.
"""

from __future__ import annotations

from contextlib import contextmanager, suppress
from threading import Lock
from typing import TYPE_CHECKING, Final

from xbfs.view.overlay.header import CLAIMS_OFFSET, COPY_OFFSETS, FILE_BYTES, Header, encode
from xbfs.view.overlay.ranges import RangeLock
from xbfs.view.overlay.reading import Stamp
from xbfs.view.overlay.regions import zeros
from xbfs.view.overlay.rounds import Rounds
from xbfs.view.overlay.unitmap import COPIED, DATA, PAGE_UNITS, UNIT, UnitMap, runs_of
from xbfs_engine.core.errors import StorageError, XbfsError
from xbfs_engine.core.limits import DISK_SIZE_MAX, MIB

if TYPE_CHECKING:
    from collections.abc import Iterator

    from xbfs.view.overlay.files import StateFile, StateFiles
    from xbfs.view.overlay.freeze import Saved
    from xbfs.view.overlay.recent import RecentMarks

_ZERO_BYTES: Final = 64 * MIB
"""Written at once where no hole can be made: the same buffer over and over."""
_ALL_UNITS: Final = -(-DISK_SIZE_MAX // UNIT)


def store(file: StateFile, header: Header) -> None:
    """Have ``header`` in both copies, durably, one after the other: never touches both at once. Raises StorageError."""
    record = encode(header)
    # What a process that was killed had written may be in memory alone.
    file.sync()
    for offset in COPY_OFFSETS:
        if file.read_at(offset, len(record)) != record:
            file.write_at(offset, [record])
            file.sync()


class State:
    """What is open of an overlay. Writers hold ``ranges`` for the units they change; readers hold nothing."""

    def __init__(self, files: StateFiles, header: Header, recent: RecentMarks) -> None:
        self._files = files
        self._recent = recent
        self._rounds = Rounds(self._sync)
        self._is_data_unsynced = False
        self._failure: XbfsError | None = None
        self.data = files.data
        self.map = UnitMap(files.map)
        self.ranges = RangeLock()
        self.header = header
        self.shrinks = 0
        self._claiming = Lock()
        self._claimed: set[int] = set()
        self.saved: Saved | None = None
        self.is_passed = False

    @property
    def stamp(self) -> Stamp:
        """Now."""
        return Stamp(self.shrinks, self.header.is_hydrated)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Between all writes: waits for those that run, and keeps new ones waiting."""
        self.ranges.acquire(0, _ALL_UNITS)
        try:
            yield
        finally:
            self.ranges.release(0, _ALL_UNITS)

    def admit(self) -> None:
        """Refuse what would change anything after a failure; flush if the map can not take more."""
        self._check()
        if self.map.is_crowded:
            self.flush()

    def wrote(self) -> None:
        """Bytes of the data file have changed. Called after the bytes and before the mark: a flush that takes the mark
        syncs the data, one that clears this has it."""
        self._is_data_unsynced = True

    def flush(self) -> None:
        """What was acknowledged before this call survives any crash. Raises StorageFull (try again), StorageError."""
        self._rounds.run()

    def own(self, first: int, last: int) -> None:
        """Before bytes of copied units change: they are DATA, and their pages of the map are claimed, durably: what
        the map on disk takes for a copy there may be the guest's. For who holds the range. Raises StorageFull (no
        change), StorageError."""
        copies = [run for run in runs_of(self.map.states(first, last), first) if run[2] == COPIED]
        if not copies:
            return
        self.map.reserve(first, last)
        self._claim(first // PAGE_UNITS, (last - 1) // PAGE_UNITS + 1)
        for low, high, _ in copies:
            self.map.mark(low, high, DATA)

    def clear(self, start: int, stop: int) -> None:
        """Have zeros in a range of the data file, in a hole if that can be."""
        if not self.data.punch(start, stop - start):
            for at in range(start, stop, _ZERO_BYTES):
                self.data.write_at(at, zeros(min(_ZERO_BYTES, stop - at)))
        self.wrote()

    def hydrated(self) -> None:
        """All that the base holds was copied: tell so, durably, after it. Raises StorageFull, StorageError."""
        self.flush()
        with self.alone(), self._rounds.alone:
            self._store(self.header.hydrated())

    def resize(self, size_bytes: int) -> None:
        """Cut off the end, or add zeros, durably, for who is alone. Raises StorageFull (no change), StorageError."""
        with self._rounds.alone:
            header = self.header.resized(size_bytes)
            if size_bytes > self.header.size:
                # The data file first: it is never shorter than the header says.
                self.data.truncate(size_bytes)
                self._synced(self.data)
                self._store(header)
            elif size_bytes < self.header.size:
                # The header first: what the map forgets must not show the base again.
                with self._no_return():
                    self._store(header)
                    self.shrinks += 1
                    self.settle()

    def settle(self) -> None:
        """Bring the files in line with the header's size, durably; nobody else writes. For opening and resizing."""
        size = self.header.size
        self.map.cut(-(-size // UNIT))
        if self.data.size() > size:
            self.data.truncate(size)
        self._sync(everything=True)
        self.map.recount()

    def recover(self) -> None:
        """End what a crash cut short, durably; nobody else is there."""
        is_known = self._recent.tells_all
        self.settle()
        self._remember()
        pages = -(-self.header.size // (UNIT * PAGE_UNITS))
        claims = self._files.header.read_at(CLAIMS_OFFSET, pages)
        # If nothing was lost the map tells which copies were written.
        for number in [number for number, claim in enumerate(claims) if claim and not is_known]:
            self.admit()
            low = number * PAGE_UNITS
            for first, last, state in runs_of(self.map.states(low, low + PAGE_UNITS), low):
                if state == COPIED:
                    self.map.mark(first, last, DATA)
        if claims:
            self._unclaim()
        self.flush()
        self._recent.begin()
        self.map.recent = self._recent

    def close(self) -> None:
        """Flush, unless something failed, and let go of the files and the lock. Raises as ``flush``."""
        try:
            if self._failure is None:
                self.flush()
                if self._claimed:
                    self._unclaim()
        finally:
            if self.saved is not None:
                self.saved.broken_by(StorageError("the overlay was closed"))
                self.saved.close()
                self.saved = None
            self._files.close()

    def _remember(self) -> None:
        """Have the marks that a killed process had made; the bytes they tell of were written before."""
        units = -(-self.header.size // UNIT)
        for first, last, state in self._recent.left():
            end = min(last, units)
            if first < end:
                self.admit()
                self.map.reserve(first, end)
                self.wrote()
                self.map.mark(first, end, state)

    def _claim(self, low: int, high: int) -> None:
        """Have pages [low, high) of the map claimed. Once for each, until the overlay is closed."""
        with self._claiming:
            if not self._claimed.issuperset(range(low, high)):
                self._files.header.write_at(CLAIMS_OFFSET + low, [b"\1" * (high - low)])
                self._synced(self._files.header)
                self._claimed.update(range(low, high))

    def _unclaim(self) -> None:
        """The map on disk is to tell all: nobody writes any more, or yet."""
        self.flush()
        self._files.header.truncate(FILE_BYTES)
        self._synced(self._files.header)
        self._claimed.clear()

    def _check(self) -> None:
        if self._failure is not None:
            hint = "the disk may have lost what was written since the last good flush: close the overlay and open it"
            raise StorageError(f"the overlay stopped: {self._failure.message}", hint=hint) from self._failure

    def _store(self, header: Header) -> None:
        with self._no_return():
            store(self._files.header, header)
        self.header = header

    def _sync(self, *, everything: bool = False) -> None:
        """A round of flushing: the marks there are now, after their data. ``everything``: even what did not change."""
        self._check()
        pages = self.map.taken()
        try:
            if self._is_data_unsynced or everything or self.is_passed:
                self._is_data_unsynced = False
                self._synced(self.data)
            self.map.write(pages)
            if pages or everything:
                self._synced(self._files.map)
        except BaseException:
            self.map.lost()
            raise
        self.map.kept()

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
            # Bytes that a sync could not write may be gone although they were marked.
            with suppress(XbfsError):
                self._recent.void()
            raise
