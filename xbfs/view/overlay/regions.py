"""Ranges of an overlay by the layer they come from, and what is made of runs of units. Pure."""

from __future__ import annotations

from enum import Enum
from itertools import groupby
from operator import itemgetter
from typing import TYPE_CHECKING, Final, NamedTuple, TypeVar

from xbfs.view.overlay.unitmap import ABSENT, DATA, UNIT, ZERO, runs_of
from xbfs_engine.core.limits import MIB

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

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


LAYERS: Final = {ABSENT: Layer.BASE, DATA: Layer.DATA, ZERO: Layer.ZERO}


def merged(pieces: Iterable[tuple[int, int, _Kind]]) -> Iterator[tuple[int, int, _Kind]]:
    """Adjoining pieces (offset, length, kind), with neighbours of one kind put together."""
    for kind, group in groupby(pieces, key=itemgetter(2)):
        run = list(group)
        yield run[0][0], sum([length for _, length, _ in run]), kind


def byte_runs(states: bytes, first: int, offset: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Runs (start, stop, state) in bytes that cover [offset, end), for ``states`` of units from ``first`` on."""
    for low, high, state in runs_of(states, first):
        yield max(low * UNIT, offset), min(high * UNIT, end), state


def zeros(length: int) -> list[Part]:
    """``length`` zero bytes."""
    whole, rest = divmod(length, len(_ZEROS))
    parts: list[Part] = [_ZEROS] * whole
    if rest:
        parts.append(_ZEROS[:rest])
    return parts
