"""Ranges of an overlay by the layer they come from, and what is made of runs of units. Pure."""

from __future__ import annotations

from enum import Enum
from itertools import groupby
from operator import itemgetter
from typing import TYPE_CHECKING, Final, NamedTuple, TypeVar

from xbfs.view.overlay.unitmap import ABSENT, COPIED, DATA, UNIT, ZERO, runs_of
from xbfs_engine.core.limits import MIB

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from xbfs.view.base import Part

_ZEROS: Final = memoryview(bytes(MIB))
_Kind = TypeVar("_Kind")


class Layer(Enum):
    """Where bytes of an overlay come from."""

    BASE = "base"
    DATA = "data"
    ZERO = "zero"


class Region(NamedTuple):
    """A range in bytes that is all in one layer."""

    offset: int
    length: int
    layer: Layer


LAYERS: Final = {ABSENT: Layer.BASE, DATA: Layer.DATA, ZERO: Layer.ZERO, COPIED: Layer.BASE}

Run = tuple[int, int, int]
"""(start, stop, state): units in the map's runs, bytes in all others."""


def merged(pieces: Iterable[tuple[int, int, _Kind]]) -> Iterator[tuple[int, int, _Kind]]:
    """Adjoining pieces (offset, length, kind), with neighbours of one kind put together."""
    for kind, group in groupby(pieces, key=itemgetter(2)):
        run = list(group)
        yield run[0][0], sum([length for _, length, _ in run]), kind


def byte_runs(states: bytes, first: int, offset: int, end: int) -> Iterator[Run]:
    """Runs in bytes that cover [offset, end), for ``states`` of units from ``first`` on."""
    for low, high, state in runs_of(states, first):
        yield max(low * UNIT, offset), min(high * UNIT, end), state


def layered(runs: Iterable[Run], limit: int, offset: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Pieces (offset, length, state) in bytes that cover [offset, end), for ``runs`` of units; not always as long as
    can be. What would be the base's behind ``limit``, where it ended, is ZERO."""
    for first, last, state in runs:
        start, stop = max(first * UNIT, offset), min(last * UNIT, end)
        base_end = base_end_in(start, stop, limit) if LAYERS[state] is Layer.BASE else stop
        if base_end > start:
            yield start, base_end - start, state
        if stop > base_end:
            yield base_end, stop - base_end, ZERO


def base_end_in(start: int, stop: int, limit: int) -> int:
    """How far the base reaches in [start, stop) if it ends at ``limit``; at least ``start``."""
    return max(start, min(stop, limit))


def gathered(runs: Iterable[Run], fetch: Callable[[int, int, int], Sequence[Part] | None]) -> list[Part] | None:
    """What ``fetch`` gives for each run; None as soon as it gives that."""
    parts: list[Part] = []
    for run in runs:
        found = fetch(*run)
        if found is None:
            return None
        parts += found
    return parts


def zeros(length: int) -> list[Part]:
    """``length`` zero bytes."""
    whole, rest = divmod(length, len(_ZEROS))
    parts: list[Part] = [_ZEROS] * whole
    if rest:
        parts.append(_ZEROS[:rest])
    return parts
