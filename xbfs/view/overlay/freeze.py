"""The content of overlays at one moment, while guests go on writing: what a new restore point is made of.

Before a writer changes a unit for the first time since the freeze, it saves what the unit was: its state in a map of
its own, its bytes, if they were in the data file, in a side file. Both files have no name and are never synced: when
the process ends, so does the freeze, and nothing is to be repaired. Who reads the frozen disk takes what is saved,
else what the overlay has, and then looks whether that was saved meanwhile. A freeze that can not save is broken: its
reads raise, the guest's write goes on.

Any thread may read a frozen disk; ``save`` is called by writers, who hold the range.
"""

from __future__ import annotations

from contextlib import contextmanager, suppress
from threading import Condition, Lock
from typing import TYPE_CHECKING, Final, Self

from xbfs.view.base import Extent, joined, joined_cached
from xbfs.view.overlay.reading import Stamp
from xbfs.view.overlay.regions import LAYERS, Layer, Region, byte_runs, gathered, layered, merged, zeros
from xbfs.view.overlay.unitmap import ABSENT, COPIED, DATA, PAGE_UNITS, UNIT, ZERO, UnitMap, runs_of
from xbfs_engine.core.errors import IntegrityError, StorageError, XbfsError
from xbfs_engine.core.limits import MIB

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from xbfs.view.base import Part
    from xbfs.view.overlay.files import StateFile
    from xbfs.view.overlay.reading import Reader
    from xbfs.view.overlay.state import State
    from xbfs_engine.core.errors import StorageFull

UNSAVED: Final = ABSENT
"""In the map of what was saved: the unit is as it was at the freeze. The others mean what they mean in the overlay's
map, but for COPIED, which is: as the base has it."""
_SAVED_AS: Final = {ABSENT: COPIED, DATA: DATA, ZERO: ZERO, COPIED: COPIED}
_PAGES_MAX: Final = 512
"""Pages of the map of what was saved in memory: 8 MiB, for 32 GiB of disk."""
_COPY_BYTES: Final = MIB
"""Saved at once: bounds the memory of a discard."""


class Saved:
    """What units were at the freeze, of those that changed since."""

    def __init__(self, state: State, data: StateFile, states: StateFile) -> None:
        self._state = state
        self._data = data
        self._file = states
        self._spilling = Lock()
        self.map = UnitMap(states, pages_max=_PAGES_MAX)
        self.header = state.header
        self.failure: XbfsError | None = None

    @property
    def units(self) -> int:
        """How many units the frozen disk has."""
        return -(-self.header.size // UNIT)

    def save(self, first: int, last: int) -> None:
        """Units [first, last) are about to change; the caller holds their range. Never raises XbfsError: what can not
        be saved breaks the freeze."""
        last = min(last, self.units)
        if first >= last or self.failure is not None:
            return
        try:
            for low, high, kind in runs_of(self.map.states(first, last), first):
                if kind == UNSAVED:
                    self._save(runs_of(self._state.map.states(low, high), low))
        except XbfsError as exc:
            self.broken_by(exc)

    def save_cut(self, first: int) -> None:
        """Units from ``first`` on are about to be cut off, or cut. Those that are the base's stay so when they are
        gone; but the first one, if some of it stays, may be copied later, as far as the base goes then."""
        if self.failure is not None:
            return
        self.save(first, first + 1)
        try:
            for low, high, state in self._state.map.runs(first, max(first, self.units)):
                if state == ABSENT:
                    continue
                self.save(low, high)
        except XbfsError as exc:
            self.broken_by(exc)

    def read(self, start: int, stop: int) -> bytes:
        """Bytes that were saved. Raises StorageError, IntegrityError."""
        found = self._data.read_at(start, stop - start)
        if len(found) != stop - start:
            raise IntegrityError(f"what was saved for the frozen disk ends at {start + len(found)}")
        return found

    def read_now(self, start: int, stop: int) -> bytes | None:
        """The same if it is in memory, else None."""
        return self._data.read_now(start, stop - start)

    def check(self) -> None:
        """Raises what broke the freeze, if anything did."""
        if self.failure is not None:
            hint = "the VM has lost nothing: make room where its session lies and begin again"
            message = f"the frozen disk is lost, for what the guest overwrote could not be kept: {self.failure.message}"
            raise type(self.failure)(message, hint=hint) from self.failure

    def gives_way(self, failure: StorageFull) -> bool:
        """Whether giving up the freeze makes room; it is broken then."""
        if self.failure is not None:
            return False
        self.broken_by(failure)
        return True

    def broken_by(self, failure: XbfsError) -> None:
        """Nobody can read the frozen disk any more; its room is given back."""
        self.failure = self.failure or failure
        with suppress(StorageError):
            self._data.truncate(0)

    def close(self) -> None:
        """Let go of the files; nobody may be in a call."""
        self._data.close()
        self._file.close()

    def _save(self, runs: Iterator[tuple[int, int, int]]) -> None:
        for first, last, state in runs:
            self._spill()
            if state == DATA:
                stop = min(last * UNIT, self.header.size)
                for start in range(first * UNIT, stop, _COPY_BYTES):
                    self._copy(start, min(start + _COPY_BYTES, stop))
            self.map.mark(first, last, _SAVED_AS[state])

    def _copy(self, start: int, stop: int) -> None:
        found = self._state.data.read_at(start, stop - start)
        if len(found) != stop - start:
            raise IntegrityError(f"the overlay's data ends at {start + len(found)}")
        self._data.write_at(start, [found])

    def _spill(self) -> None:
        """Have room for marks in memory."""
        if not self.map.is_crowded:
            return
        with self._spilling:
            pages = self.map.taken()
            try:
                self.map.write(pages)
            except BaseException:
                self.map.lost()
                raise
            self.map.kept()


class FrozenOverlay:
    """A disk as it was when ``freeze_all`` returned it: a RandomAccess that holds whatever the guest does meanwhile.

    Reading raises as the overlay's does, and StorageError (StorageFull for want of room) once the freeze is broken.
    To be closed before the overlay is.
    """

    def __init__(self, state: State, reader: Reader, saved: Saved) -> None:
        self._state = state
        self._reader = reader
        self._saved = saved
        self._limit = saved.header.base_limit
        self._changed = Condition(Lock())
        self._readers = 0
        self._is_closed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def size_bytes(self) -> int:
        """The size at the freeze."""
        return self._saved.header.size

    def read_at(self, offset: int, length: int) -> bytes:
        """The bytes of [offset, offset+length), clipped at the end. May block."""
        return joined(self.parts_at(offset, length))

    def parts_at(self, offset: int, length: int) -> Sequence[Part]:
        """``read_at`` in pieces, not copied together."""
        with self._reading():
            before = self._stamp
            end = min(offset + length, self.size_bytes)
            if offset >= end:
                return ()
            first = offset // UNIT
            parts: list[Part] = []
            for start, stop, kind in byte_runs(self._saved.map.states(first, -(-end // UNIT)), first, offset, end):
                parts += self._live(start, stop, before) if kind == UNSAVED else self._kept(start, stop, kind)
            return parts

    def read_cached(self, offset: int, length: int) -> bytes | memoryview | None:
        """The same bytes if all of them are in memory, else None. Never blocks, never raises."""
        return joined_cached(self.parts_cached(offset, length))

    def parts_cached(self, offset: int, length: int) -> Sequence[Part] | None:
        """``read_cached`` in pieces."""
        try:
            with self._reading():
                end = min(offset + length, self.size_bytes)
                return self._parts_cached(offset, end) if offset < end else ()
        except XbfsError:
            return None

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        """Alternating data and hole extents that cover [offset, offset+length), clipped at the end. May block."""
        end = min(offset + length, self.size_bytes)
        return self._reader.extents(self._pieces(offset, end), self._stamp)

    def changed_extents(self) -> Iterator[Region]:
        """All regions that are not the base's, ascending: what a new restore point must read. May block."""
        pieces = ((offset, length, LAYERS[state]) for offset, length, state in self._pieces(0, self.size_bytes))
        return (Region(*piece) for piece in merged(pieces) if piece[2] is not Layer.BASE)

    def close(self) -> None:
        """Thaw, once: waits for who reads and for writers. Later reads raise StorageError."""
        with self._changed:
            if self._is_closed:
                return
            self._is_closed = True
            while self._readers:
                self._changed.wait()
        with self._state.alone():
            # An overlay that is closed already has let go of it.
            if self._state.saved is not self._saved:
                return
            self._state.saved = None
        self._saved.close()

    @property
    def _stamp(self) -> Stamp:
        """Of now; what is absent is the base's, but for a disk that was hydrated at the freeze: an end of hydration
        says nothing of units that a shrink has made absent."""
        return Stamp(self._state.shrinks, self._saved.header.is_hydrated)

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """The files stay open in here; what was read in a freeze that broke meanwhile raises."""
        with self._changed:
            if self._is_closed:
                raise StorageError("the frozen disk was closed")
            self._readers += 1
        try:
            self._saved.check()
            yield
            self._saved.check()
        finally:
            with self._changed:
                self._readers -= 1
                if not self._readers:
                    self._changed.notify_all()

    def _live(self, start: int, stop: int, before: Stamp) -> Sequence[Part]:
        """[start, stop) as the overlay has it, but for units that were saved while that was read."""
        first, last = start // UNIT, -(-stop // UNIT)
        fetched = gathered(
            byte_runs(self._state.map.states(first, last), first, start, stop),
            lambda low, high, state: self._reader.fetch(low, high, state, limit=self._limit, before=before),
        )
        assert fetched is not None
        again = self._saved.map.states(first, last)
        if not again.strip(b"\0"):
            return fetched
        whole = memoryview(joined(fetched))
        parts: list[Part] = []
        for low, high, kind in byte_runs(again, first, start, stop):
            parts += [whole[low - start : high - start]] if kind == UNSAVED else self._kept(low, high, kind)
        return parts

    def _kept(self, start: int, stop: int, kind: int) -> list[Part]:
        """[start, stop), which was saved as ``kind``."""
        if kind == DATA:
            return [self._saved.read(start, stop)]
        return self._reader.based(start, stop, self._limit) if kind == COPIED else zeros(stop - start)

    def _kept_cached(self, start: int, stop: int, kind: int) -> list[Part] | None:
        if kind == DATA:
            kept = self._saved.read_now(start, stop)
            return None if kept is None else [kept]
        return self._reader.based_cached(start, stop, self._limit) if kind == COPIED else zeros(stop - start)

    def _parts_cached(self, offset: int, end: int) -> Sequence[Part] | None:
        first, last = offset // UNIT, -(-end // UNIT)
        before = self._stamp
        saved, live = self._saved.map.states_cached(first, last), self._state.map.states_cached(first, last)
        if saved is None or live is None:
            return None
        parts: list[Part] = []
        for start, stop, kind in byte_runs(saved, first, offset, end):
            if kind == UNSAVED:
                at = start // UNIT
                found = gathered(
                    byte_runs(live[at - first : -(-stop // UNIT) - first], at, start, stop),
                    lambda *run: self._reader.fetch_cached(*run, limit=self._limit, before=before),
                )
            else:
                found = self._kept_cached(start, stop, kind)
            if found is None:
                return None
            parts += found
        # Who saved a unit meanwhile may have changed its bytes before they were read.
        return parts if saved == self._saved.map.states_cached(first, last) else None

    def _pieces(self, offset: int, end: int) -> Iterator[tuple[int, int, int]]:
        """Pieces (offset, length, state) that cover [offset, end); COPIED where the base's bytes are meant."""
        if offset >= end:
            return iter(())
        return layered(self._runs(offset // UNIT, -(-end // UNIT)), self._limit, offset, end)

    def _runs(self, first: int, last: int) -> Iterator[tuple[int, int, int]]:
        """Runs of units as the frozen disk has them, by pages."""
        # In this order, here and below: what a writer changed before the first was asked it had saved before that.
        with self._reading():
            pages = {*self._state.map.told(first, last), *self._saved.map.told(first, last)}
        at = first
        for number in sorted(pages):
            low, high = max(first, number * PAGE_UNITS), min(last, (number + 1) * PAGE_UNITS)
            if at < low:
                yield at, low, ABSENT
            with self._reading():
                states = bytearray(self._state.map.states(low, high))
                for start, stop, kind in runs_of(self._saved.map.states(low, high), 0):
                    if kind != UNSAVED:
                        states[start:stop] = bytes([kind]) * (stop - start)
            yield from runs_of(states, low)
            at = high
        if at < last:
            yield at, last, ABSENT
