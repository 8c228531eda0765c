"""Values on the command line: what a word must be, for ``type`` of an option. Pure; they raise ArgumentTypeError."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Final

from xbfs_engine.core.limits import DISKS_PER_POINT_MAX, GIB, KIB, MIB

if TYPE_CHECKING:
    from collections.abc import Callable

DAY_S: Final = 86400
_UNITS: Final = {"K": KIB, "M": MIB, "G": GIB}


def number(low: int, high: int, what: str = "number") -> Callable[[str], int]:
    """Decimal digits, within bounds."""

    def parse(text: str) -> int:
        if not text.isascii() or not text.isdigit() or not low <= int(text) <= high:
            raise argparse.ArgumentTypeError(f"{text!r} is not a {what} from {low} to {high}")
        return int(text)

    return parse


def seconds(low: int) -> Callable[[str], float]:
    """Whole seconds, at most a day."""
    parse = number(low, DAY_S, "number of seconds")
    return lambda text: float(parse(text))


disk_number: Final = number(0, DISKS_PER_POINT_MAX - 1, "disk number")


def bytes_from(low: str, example: str, what: str) -> Callable[[str], int]:
    """Bytes, with K, M or G behind the number for others; from ``low`` to 1 TiB."""

    def parse(text: str) -> int:
        size = _bytes(text)
        if size is None or not (_bytes(low) or 0) <= size <= 1024 * GIB:
            raise argparse.ArgumentTypeError(f"{text!r} is not a {what} from {low} to 1024G, such as {example}")
        return size

    return parse


def network_pair(text: str) -> tuple[str, str]:
    """A=B: a network of the VM, and the pool's that takes its place."""
    source, equals, target = text.partition("=")
    if not (source and equals and target):
        raise argparse.ArgumentTypeError(f"{text!r} is not A=B, the VM's network and the pool's")
    return source, target


def _bytes(text: str) -> int | None:
    digits, unit = (text[:-1], _UNITS[text[-1]]) if text[-1:] in _UNITS else (text, 1)
    return int(digits) * unit if digits.isascii() and digits.isdigit() else None
