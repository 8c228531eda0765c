"""Numbers, times and tables as people read them. Pure; records for ``--json`` keep bytes and ISO times."""

from __future__ import annotations

from typing import TYPE_CHECKING

from xbfs.vfs.times import iso_time

if TYPE_CHECKING:
    from collections.abc import Sequence

_UNITS = ("KiB", "MiB", "GiB", "TiB", "PiB")


def size(size_bytes: int) -> str:
    """Bytes with a binary unit and one decimal: "300.0 MiB"; below 1 KiB exactly: "777 B"."""
    if size_bytes < 1024:
        return f"{size_bytes} B"
    value = float(size_bytes)
    units = iter(_UNITS)
    unit = ""
    # 1023.95 would be shown as 1024.0: it belongs to the next unit.
    while value >= 1023.95 and unit != _UNITS[-1]:
        value /= 1024
        unit = next(units)
    return f"{value:.1f} {unit}"


def rate(size_bytes: int, seconds: float) -> str:
    """Megabytes (10^6 bytes) a second, as disks and networks are labelled."""
    return f"{size_bytes / seconds / 1e6:.1f} MB/s" if seconds > 0 else "- MB/s"


def duration(seconds: float) -> str:
    """ "0.42 s" below a minute, then "3:07" or "2:03:07"."""
    if seconds < 59.995:
        return f"{seconds:.2f} s"
    return clock(seconds)


def clock(seconds: float) -> str:
    """Whole seconds as "0:07", "3:07" or "2:03:07"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def when(time_ns: int) -> str:
    """ISO 8601 in UTC to the second, as ``VM@TIME`` takes it: "2026-09-20T21:00:03Z"."""
    return iso_time(time_ns // 1_000_000_000)


def count(number: int, what: str) -> str:
    """ "1 disk", "2 disks"."""
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def table(rows: Sequence[Sequence[str]], right: frozenset[int] = frozenset()) -> list[str]:
    """Lines with aligned columns; those whose number is in ``right`` are right-aligned."""
    if not rows:
        return []
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def printable(text: str) -> str:
    """``text`` without what could steer a terminal: names of VMs and files come from elsewhere."""
    if text.replace("\n", "").isprintable():
        return text
    return "".join(
        char if char.isprintable() or char == "\n" else char.encode("unicode_escape", "surrogatepass").decode()
        for char in text
    )
