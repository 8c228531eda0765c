"""The bytes behind the states of units: of the data file, of the base, or zeros.

Shared by the overlay and its frozen image, which differ in the states they read by and in where the base ends. Keeps
no state of its own; any thread may call it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

from xbfs.view.base import Extent
from xbfs.view.overlay.regions import base_end_in, merged, zeros
from xbfs.view.overlay.unitmap import ABSENT, COPIED, DATA, ZERO
from xbfs_engine.core.errors import IntegrityError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from xbfs.view.base import Part, RandomAccess
    from xbfs.view.overlay.state import State

_STORED: Final = frozenset({DATA, COPIED})


class Stamp(NamedTuple):
    """What a reader must know of the time before it asked for the states of units."""

    shrinks: int
    """How many shrinks there were: bytes that are missing now may have been cut off since."""
    is_hydrated: bool
    """Whether what is absent was a zero of the base already; else it may have been copied since."""


class Reader:
    """Reads ranges that are all in one state. Raises IntegrityError (never wrong bytes) or StorageError."""

    __slots__ = ("_base", "_state")

    def __init__(self, state: State, base: RandomAccess) -> None:
        self._state = state
        self._base = base

    def fetch(self, start: int, stop: int, state: int, *, limit: int, before: Stamp) -> list[Part]:
        """The bytes of [start, stop). ``limit``: where the base ends, asked for after the state: a unit that a shrink
        made absent is behind the limit that it had set before. ``before``: of the time before the state."""
        if state in _STORED:
            return [self.stored(start, stop - start, shrinks=before.shrinks)]
        if state == ZERO or before.is_hydrated:
            return zeros(stop - start)
        return self.based(start, stop, limit)

    def fetch_cached(self, start: int, stop: int, state: int, *, limit: int, before: Stamp) -> list[Part] | None:
        """The same if all of it is in memory, else None. Never blocks, never raises."""
        if state in _STORED:
            stored = self._state.data.read_now(start, stop - start)
            return None if stored is None else [stored]
        if state == ZERO or before.is_hydrated:
            return zeros(stop - start)
        return self.based_cached(start, stop, limit)

    def based(self, start: int, stop: int, limit: int) -> list[Part]:
        """[start, stop) of the base, and zeros where it ended."""
        base_end = base_end_in(start, stop, limit)
        parts: list[Part] = []
        if base_end > start:
            parts += self._base.parts_at(start, base_end - start)
            assert sum(map(len, parts)) == base_end - start
        return parts + zeros(stop - base_end)

    def based_cached(self, start: int, stop: int, limit: int) -> list[Part] | None:
        """The same if the base has it at hand, else None."""
        base_end = base_end_in(start, stop, limit)
        found = self._base.parts_cached(start, base_end - start) if base_end > start else ()
        return None if found is None else [*found, *zeros(stop - base_end)]

    def stored(self, offset: int, length: int, *, shrinks: int) -> bytes:
        """Bytes of the data file. It is never shorter than the disk, unless it shrank since there were ``shrinks``."""
        data = self._state.data.read_at(offset, length)
        if len(data) < length:
            if shrinks == self._state.shrinks:
                hint = "the data file was cut: bring it back from a copy, or begin a new overlay"
                raise IntegrityError(f"the overlay's data ends at {offset + len(data)}", hint=hint)
            data = data.ljust(length, b"\0")
        return data

    def extents(self, pieces: Iterable[tuple[int, int, int]], before: Stamp) -> Iterator[Extent]:
        """Extents of adjoining pieces (offset, length, state): alternating data and holes."""
        found = (extent for piece in pieces for extent in self._extents_of(*piece, before))
        return (Extent(*extent) for extent in merged(found))

    def _extents_of(self, offset: int, length: int, state: int, before: Stamp) -> Iterable[Extent]:
        if state == ABSENT and not before.is_hydrated:
            return self._base.extents(offset, length)
        return (Extent(offset, length, state in _STORED),)
