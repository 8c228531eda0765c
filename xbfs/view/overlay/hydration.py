"""The base comes into the overlay's files: copied in the background, and made one file with what was written.

Keeps no state: how far it is the map tells. The base is read without any lock, for it never changes; what a guest has
written meanwhile is seen under the range lock and left alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

from xbfs.view.overlay.unitmap import ABSENT, COPIED, DATA, PAGE_UNITS, UNIT, ZERO, runs_of
from xbfs_engine.core.errors import StorageFull
from xbfs_engine.core.limits import GIB, MIB

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from threading import Event

    from xbfs.view.base import RandomAccess
    from xbfs.view.overlay.state import State
    from xbfs_engine.core.runtime import Clock

_BATCH_UNITS: Final = MIB // UNIT
"""Read at once, and written under one lock."""
_FLUSH_BYTES: Final = 16 * MIB
"""Copied between flushes: more would keep the guest's own flushes waiting."""
_ROOM_BYTES, _ROOM_SHARE = GIB, 10
"""Left for the guest: the lesser of so much and of that part of the file system."""
_MARK_UNITS: Final = 64 * PAGE_UNITS
"""Marked at once: 4 GiB, as zeroes are."""


def hydrate(
    state: State,
    base: RandomAccess,
    rate_bytes_s: int | None,
    clock: Clock,
    stop: Event,
    on_progress: Callable[[int, int], None],
) -> None:
    """What ``Overlay.hydrate`` tells."""
    if state.header.is_hydrated:
        return
    _check_room(state)
    limit = state.header.base_limit
    started_s = clock.monotonic_s()
    copied = unflushed = 0
    for first, last in _batches(base, limit):
        if stop.is_set():
            return
        state.admit()
        if ABSENT in state.map.states(first, last):
            size = _copy(state, base, first, last)
            copied, unflushed = copied + size, unflushed + size
        if unflushed >= _FLUSH_BYTES:
            state.flush()
            unflushed = 0
            _check_room(state)
        on_progress(min(last * UNIT, limit), limit)
        if rate_bytes_s:
            stop.wait(max(0.0, copied / rate_bytes_s - (clock.monotonic_s() - started_s)))
    state.hydrated()
    on_progress(limit, limit)


def materialise(state: State) -> None:
    """Every unit is in the data file and the map says so, durably; for who is alone with a hydrated overlay.

    Raises StorageFull, StorageError; then some units are and others are not, and all read as before.
    """
    size = state.header.size
    units = -(-size // UNIT)
    if state.map.count(DATA) == units:
        return
    for first in range(0, units, _MARK_UNITS):
        last = min(units, first + _MARK_UNITS)
        state.admit()
        state.map.reserve(first, last)
        for low, high, kind in runs_of(state.map.states(first, last), first):
            if kind in (ABSENT, ZERO):
                # Below them may be left-overs of writes that a crash has lost.
                state.clear(low * UNIT, min(high * UNIT, size))
                state.map.mark(low, high, DATA)
        state.own(first, last)
    state.flush()


def _check_room(state: State) -> None:
    """Raises StorageFull where copying would take the last room, StorageError."""
    free, whole = state.data.room()
    if free < min(_ROOM_BYTES, whole // _ROOM_SHARE):
        hint = "free space where the session lies; the VM runs on, from the restore point"
        raise StorageFull(f"{free} bytes are left for what the guest writes: nothing more is copied", hint=hint)


def _batches(base: RandomAccess, limit: int) -> Iterator[tuple[int, int]]:
    """Ranges of units, ascending, in which the base holds data below ``limit``."""
    at = 0
    for extent in base.extents(0, limit):
        end = -(-(extent.offset + extent.length) // UNIT)
        at = max(at, extent.offset // UNIT)
        while extent.is_data and at < end:
            last = min(end, (at // _BATCH_UNITS + 1) * _BATCH_UNITS)
            yield at, last
            at = last


def _copy(state: State, base: RandomAccess, first: int, last: int) -> int:
    """Copy the units of [first, last) that are absent. Returns how many bytes of the base were read."""
    start = first * UNIT
    content = base.read_at(start, (last - first) * UNIT)
    state.ranges.acquire(first, last)
    try:
        # Nobody changes the size while a range is held. Of the base's last unit the rest is zeros.
        size, limit = state.header.size, state.header.base_limit
        end = min(last, -(-limit // UNIT))
        whole = content[: max(0, limit - start)].ljust((last - first) * UNIT, b"\0")
        filled = np.frombuffer(whole, np.uint64).reshape(-1, UNIT // 8).any(axis=1).view(np.uint8).tobytes()
        for low, high, kind in runs_of(state.map.states(first, end), first) if first < end else ():
            if kind != ABSENT:
                continue
            state.map.reserve(low, high)
            for here, there, is_filled in runs_of(filled[low - first : high - first], low):
                stop = min(there * UNIT, size)
                if is_filled:
                    state.data.write_at(here * UNIT, [memoryview(whole)[here * UNIT - start : stop - start]])
                    state.wrote()
                else:
                    # A hole already, but for left-overs of writes that a crash has lost.
                    state.clear(here * UNIT, stop)
            state.map.mark(low, high, COPIED)
    finally:
        state.ranges.release(first, last)
    return len(content)
