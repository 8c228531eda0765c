"""Names in the tree: VM names and times as path components. Pure."""

from __future__ import annotations

import datetime
import unicodedata
from typing import TYPE_CHECKING, Final

from blake3 import blake3

from xbfs_engine.core.limits import NAME_BYTES_MAX

if TYPE_CHECKING:
    from collections.abc import Container

SECOND_NS: Final = 1_000_000_000
TAG_DIGITS: Final = 8
TIME_FORMAT: Final = "%Y-%m-%dT%H%M%SZ"
SECONDS_MAX: Final = 253_402_300_799
"""9999-12-31T23:59:59Z, the last second datetime knows."""
_TIME_TEXT_MAX: Final = 64

_UNSAFE: Final = frozenset("/\u2028\u2029\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
"""The separator; line separators; marks that turn the writing direction and so fake other names."""
_CUT_DIGITS: Final = 10


def safe_component(name: str) -> str:
    """``name`` as one path component of 1 to 200 bytes: the same for the same name, but not different for different.

    Control characters, surrogates and "/" become "_"; a name too long is cut and gets a hash of all of it.
    """
    safe = "".join("_" if c in _UNSAFE or unicodedata.category(c) in {"Cc", "Cs"} else c for c in name)
    if safe in {"", ".", ".."}:
        safe = "_" + safe
    encoded = safe.encode()
    if len(encoded) <= NAME_BYTES_MAX:
        return safe
    kept = encoded[: NAME_BYTES_MAX - 1 - _CUT_DIGITS].decode(errors="ignore")
    return f"{kept}~{_digest(name, _CUT_DIGITS)}"


def free_name(wanted: str, identity: str, taken: Container[str]) -> str:
    """``wanted``, or where that is taken ``wanted~<first 8 of identity>``, or a name with a hash that is free."""
    if wanted not in taken:
        return wanted
    tagged = f"{wanted}~{safe_component(identity)[:TAG_DIGITS]}"
    number = 0
    while tagged in taken:
        tagged = f"{wanted}~{_digest(f'{number}/{identity}', 2 * TAG_DIGITS)}"
        number += 1
    return tagged


def time_name(seconds: int) -> str:
    """Seconds since 1970 as the name of a restore point: 2026-09-20T210003Z."""
    return datetime.datetime.fromtimestamp(min(seconds, SECONDS_MAX), datetime.UTC).strftime(TIME_FORMAT)


def iso_time(seconds: int) -> str:
    """Seconds since 1970 in ISO 8601, UTC: 2026-09-20T21:00:03Z."""
    return datetime.datetime.fromtimestamp(min(seconds, SECONDS_MAX), datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def parse_time(text: str) -> int | None:
    """Seconds since 1970 of a time in our own form or in ISO 8601 (UTC unless it says otherwise), else None."""
    if len(text) > _TIME_TEXT_MAX:
        return None
    try:
        time = datetime.datetime.fromisoformat(text)
    except ValueError:
        return None
    if time.tzinfo is None:
        time = time.replace(tzinfo=datetime.UTC)
    try:
        seconds = int(time.timestamp())
    except (OverflowError, ValueError):
        return None
    return seconds if 0 <= seconds <= SECONDS_MAX else None


def _digest(text: str, digits: int) -> str:
    return blake3(text.encode(errors="surrogatepass")).hexdigest()[:digits]
