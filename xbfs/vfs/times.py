"""Times as names in the tree and as text, and back. Pure; imports nothing heavy: every command needs it at once."""

from __future__ import annotations

import datetime
from typing import Final

SECOND_NS: Final = 1_000_000_000
TIME_FORMAT: Final = "%Y-%m-%dT%H%M%SZ"
SECONDS_MAX: Final = 253_402_300_799
"""9999-12-31T23:59:59Z, the last second datetime knows."""
_TIME_TEXT_MAX: Final = 64


def time_name(seconds: int) -> str:
    """Seconds since 1970 as the name of a restore point: 2026-09-20T210003Z."""
    return datetime.datetime.fromtimestamp(min(seconds, SECONDS_MAX), datetime.UTC).strftime(TIME_FORMAT)


def iso_time(seconds: int) -> str:
    """Seconds since 1970 in ISO 8601, UTC: 2026-09-20T21:00:03Z."""
    return datetime.datetime.fromtimestamp(min(seconds, SECONDS_MAX), datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def iso_time_ns(time_ns: int) -> str:
    """Nanoseconds since 1970 in ISO 8601 with all digits, UTC; of years that has no room for: ``@`` and the seconds."""
    seconds, rest_ns = divmod(time_ns, SECOND_NS)
    try:
        time = datetime.datetime.fromtimestamp(0, datetime.UTC) + datetime.timedelta(seconds=seconds)
    except OverflowError:
        return f"@{seconds}.{rest_ns:09d}"
    return f"{time.isoformat()[:19]}.{rest_ns:09d}Z"


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
