"""Which layer each unit of 4 KiB is read from: two bits a unit in a file, a byte a unit in memory, page by page.

Owns the pages in memory (bounded, least recently used go), which of them the file does not have yet, and how many
units are changed. Knows nothing of the units' bytes: that a page is written only after the data it tells of is durable
is the caller's duty (``taken``, ``write``, ``kept`` or ``lost``). Any thread may call it; the lock is held for work in
memory only, but while a page's dirty state changes. Marks of the same units must not race with each other.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from threading import Lock
from typing import TYPE_CHECKING, Final

import numpy as np

from xbfs_engine.core.limits import KIB, MIB

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from xbfs.view.overlay.files import StateFile
    from xbfs.view.overlay.recent import RecentMarks

UNIT: Final = 4 * KIB
"""Bytes of a unit: what file systems of guests and the page cache write; bigger ones are filled from the base more."""
ABSENT, DATA, ZERO, COPIED = range(4)
"""States: the unit is the base's | in the data file | zeros | in the data file, as the base has it."""
PAGE_BYTES: Final = 4 * KIB
"""Of the map file, for 64 MiB of disk."""
PAGE_UNITS: Final = PAGE_BYTES * 4
PAGES_MAX: Final = 2048
"""Pages in memory: 32 MiB, which tell of 128 GiB of disk. Half as many may wait for a flush."""

_RUNS: Final = re.compile(rb"\x00+|\x01+|\x02+|\x03+")
_SHIFTS: Final = np.array([0, 2, 4, 6], np.uint8)
_STATES: Final = np.arange(256, dtype=np.uint8)[:, None] >> _SHIFTS & 3
"""The four states in a byte of the file: the first is in the lowest bits."""
_IN_BYTE: Final = (_STATES[:, :, None] == np.arange(4)).sum(axis=1)
"""How many units of each state a byte of the file tells of."""


def runs_of(states: bytes | bytearray, first: int) -> Iterator[tuple[int, int, int]]:
    """Runs (first, last, state) of equal units in ``states``, which begin at unit ``first``."""
    for match in _RUNS.finditer(states):
        yield first + match.start(), first + match.end(), states[match.start()]


class UnitMap:
    """The states of all units: ABSENT where nothing was ever marked. Methods raise StorageError."""

    def __init__(self, file: StateFile, *, pages_max: int = PAGES_MAX) -> None:
        self._file = file
        self._pages_max = pages_max
        self._lock = Lock()
        self._pages: OrderedDict[int, bytearray] = OrderedDict()
        self._departures = 0
        # Pages the file does not have, and those that are on their way to it: neither may leave the memory.
        self._dirty: set[int] = set()
        self._underway: set[int] = set()
        self._reserved: set[int] = set()
        # Units by state; of ABSENT it is a difference that nobody asks for.
        self._counts = [0, 0, 0, 0]
        # Where marks go beside, for the case that this process is killed; and up to where they were taken.
        self.recent: RecentMarks | None = None
        self._recent_taken = 0

    @property
    def is_crowded(self) -> bool:
        """Whether so many pages wait for a flush that there should be one before more are marked.

        They can not leave the memory: half of it is for others.
        """
        is_full = self.recent is not None and self.recent.is_crowded
        return is_full or len(self._dirty) >= self._pages_max // 2

    def count(self, state: int) -> int:
        """How many units are in ``state``; not ABSENT."""
        return self._counts[state]

    def states(self, first: int, last: int) -> bytes:
        """The states of units [first, last), a byte each."""
        number = first // PAGE_UNITS
        base = number * PAGE_UNITS
        if last <= base + PAGE_UNITS:
            with self._lock:
                return bytes(self._page(number)[first - base : last - base])
        pieces = []
        for low, high in _by_page(first, last):
            pieces.append(self.states(low, high))
        return b"".join(pieces)

    def states_cached(self, first: int, last: int) -> bytes | None:
        """The same if all pages are in memory, else None. Never waits for the file."""
        pieces = []
        with self._lock:
            for low, high in _by_page(first, last):
                page = self._pages.get(low // PAGE_UNITS)
                if page is None:
                    return None
                pieces.append(page[low % PAGE_UNITS :][: high - low])
        return b"".join(pieces)

    def runs(self, first: int, last: int) -> Iterator[tuple[int, int, int]]:
        """Runs (first, last, state) that cover [first, last), not always as long as can be; what was never marked
        costs nothing. What changes meanwhile is told or not."""
        at = first
        for number in self.told(first, last):
            low, high = max(first, number * PAGE_UNITS), min(last, (number + 1) * PAGE_UNITS)
            if at < low:
                yield at, low, ABSENT
            yield from runs_of(self.states(low, high), low)
            at = high
        if at < last:
            yield at, last, ABSENT

    def told(self, first: int, last: int) -> list[int]:
        """Numbers of the pages of units [first, last) that may tell of changes, ascending; all others are ABSENT."""
        low, high = first // PAGE_UNITS, -(-last // PAGE_UNITS)
        with self._lock:
            found = {number for number in self._dirty | self._underway if low <= number < high}
        at = low
        while at < high:
            place = self._file.next_data(at * PAGE_BYTES)
            if place is None or place >= high * PAGE_BYTES:
                break
            at = place // PAGE_BYTES + 1
            found.add(at - 1)
        return sorted(found)

    def reserve(self, first: int, last: int) -> None:
        """Have room in the file for marks of [first, last), so that a flush does not meet a full disk."""
        for number in range(first // PAGE_UNITS, (last - 1) // PAGE_UNITS + 1):
            if number not in self._reserved:
                self._file.reserve(number * PAGE_BYTES, PAGE_BYTES)
                if len(self._reserved) >= self._pages_max:
                    self._reserved.clear()
                self._reserved.add(number)

    def mark(self, first: int, last: int, state: int) -> None:
        """Set the state of units [first, last): in memory, then among the recent marks."""
        for low, high in _by_page(first, last):
            number = low // PAGE_UNITS
            start, length = low % PAGE_UNITS, high - low
            with self._lock:
                page = self._page(number)
                for begin, end, old in runs_of(page[start : start + length], 0):
                    self._counts[old] -= end - begin
                self._counts[state] += length
                page[start : start + length] = bytes([state]) * length
                self._dirty.add(number)
            if self.recent is not None:
                self.recent.add(low, high, state)

    def taken(self) -> dict[int, bytes]:
        """The pages the file does not have, as they are now, for ``write``; followed by ``kept`` or ``lost``."""
        with self._lock:
            assert not self._underway
            # Before the pages: a mark that was added by now is in them.
            self._recent_taken = self.recent.position if self.recent is not None else 0
            self._dirty, self._underway = set(), self._dirty
            return {number: bytes(self._pages[number]) for number in sorted(self._underway)}

    def write(self, pages: dict[int, bytes]) -> None:
        """Write ``pages`` to the file, not yet durably."""
        for number, page in pages.items():
            self._file.write_at(number * PAGE_BYTES, [_packed(page)])

    def kept(self) -> None:
        """The pages that were taken are in the file, durably."""
        with self._lock:
            self._underway = set()
        if self.recent is not None:
            self.recent.forget(self._recent_taken)

    def lost(self) -> None:
        """The pages that were taken may not be in the file: they still wait."""
        with self._lock:
            self._dirty |= self._underway
            self._underway = set()

    def cut(self, units: int) -> None:
        """Units from ``units`` on are ABSENT, in the file too once it is flushed. Nobody marks meanwhile."""
        pages = -(-units // PAGE_UNITS)
        if self._file.size() > pages * PAGE_BYTES:
            self._file.truncate(pages * PAGE_BYTES)
        with self._lock:
            for number in [number for number in self._pages if number >= pages]:
                del self._pages[number]
            self._departures += 1
            self._dirty = {number for number in self._dirty if number < pages}
            self._reserved.clear()
        end = pages * PAGE_UNITS
        if units < end and self.states(units, end).strip(b"\0"):
            self.mark(units, end, ABSENT)

    def recount(self) -> None:
        """Count the units in the file, which has all pages."""
        counts = np.zeros(4, np.int64)
        at = self._file.next_data(0)
        while at is not None:
            content = self._file.read_at(at, MIB)
            counts += np.bincount(np.frombuffer(content, np.uint8), minlength=256) @ _IN_BYTE
            at = self._file.next_data(at + len(content)) if content else None
        with self._lock:
            self._counts = [0, *map(int, counts[1:])]

    def _page(self, number: int) -> bytearray:
        """A page; the lock is held, but let go of while the file is read."""
        page = self._pages.get(number)
        if page is not None:
            self._pages.move_to_end(number)
            return page
        while True:
            departures = self._departures
            self._lock.release()
            try:
                page = self._loaded(number)
            finally:
                self._lock.acquire()
            if number in self._pages:
                return self._pages[number]
            # A page that came, changed and left meanwhile is younger than what was read.
            if departures == self._departures:
                break
        self._pages[number] = page
        while len(self._pages) > max(self._pages_max, len(self._dirty) + len(self._underway) + 1):
            oldest, content = self._pages.popitem(last=False)
            if oldest in self._dirty or oldest in self._underway:
                self._pages[oldest] = content
            else:
                self._departures += 1
        return page

    def _loaded(self, number: int) -> bytearray:
        content = self._file.read_at(number * PAGE_BYTES, PAGE_BYTES).ljust(PAGE_BYTES, b"\0")
        if not content.strip(b"\0"):
            return bytearray(PAGE_UNITS)
        return bytearray(_STATES[np.frombuffer(content, np.uint8)].tobytes())


def _by_page(first: int, last: int) -> Iterator[tuple[int, int]]:
    """[first, last) in pieces that each lie in one page."""
    while first < last:
        end = min(last, (first // PAGE_UNITS + 1) * PAGE_UNITS)
        yield first, end
        first = end


def _packed(page: bytes) -> bytes:
    """A page as it lies in the file: four bytes of two bits each become one."""
    fours = np.frombuffer(page, np.dtype("<u4"))
    packed: NDArray[np.uint8] = (fours | fours >> 6 | fours >> 12 | fours >> 18).astype(np.uint8)
    return packed.tobytes()
