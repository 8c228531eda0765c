"""Files of guests as people and JSON read them: names that are any bytes, times that are any time. Pure."""

from __future__ import annotations

import base64
from typing import TYPE_CHECKING

from xbfs.cli import text
from xbfs.vfs.times import SECOND_NS, iso_time

if TYPE_CHECKING:
    from xbfs_engine.catalog.fileindex.places import Shown
    from xbfs_engine.catalog.fileindex.segment import Entry
    from xbfs_engine.catalog.restore_point import RestorePoint

SIZE_WIDTH = 10
TIME_WIDTH = 20


def path_text(path: bytes) -> str:
    """A path on one line: what can not be printed is escaped, and so is the backslash, as by ``ls -b``."""
    shown = []
    for char in path.decode(errors="surrogateescape"):
        if char == "\\":
            shown.append("\\\\")
        elif "\udc80" <= char <= "\udcff":
            shown.append(f"\\x{ord(char) - 0xDC00:02x}")
        elif char.isprintable():
            shown.append(char)
        else:
            shown.append(char.encode("unicode_escape").decode())
    return "".join(shown)


def shown_text(shown: Shown) -> str:
    """Where a file is: its path in the guest's own tree, else its volume and the path there."""
    return path_text(shown.path) if shown.in_tree else f"{shown.volume}:{path_text(shown.path)}"


def shown_record(shown: Shown) -> dict[str, object]:
    """``shown_text`` for --json; ``path_b64`` has the bytes of a path that is no UTF-8."""
    record: dict[str, object] = {
        "path": shown.path.decode(errors="replace"),
        "volume": shown.volume,
        "in_tree": shown.in_tree,
    }
    try:
        shown.path.decode()
    except UnicodeDecodeError:
        record["path_b64"] = base64.b64encode(shown.path).decode()
    return record


def file_time(time_ns: int) -> str:
    """A time to the second; of years that have no four digits, seconds since 1970."""
    try:
        return iso_time(time_ns // SECOND_NS)
    except (ValueError, OverflowError, OSError):
        return f"{time_ns // SECOND_NS} s"


def entry_text(entry: Entry | None) -> str:
    """Kind, size and time of modification in columns."""
    if entry is None:
        return " " * (2 + SIZE_WIDTH + 2 + TIME_WIDTH)
    size, time = text.size(entry.size_bytes), file_time(entry.mtime_ns)
    return f"{entry.kind.value} {size:>{SIZE_WIDTH}}  {time:<{TIME_WIDTH}}"


def entry_record(entry: Entry) -> dict[str, object]:
    """The same for --json."""
    return {
        "type": entry.kind.value,
        "size_bytes": entry.size_bytes,
        "mtime": file_time(entry.mtime_ns),
        "mtime_ns": entry.mtime_ns,
        "ctime_ns": entry.ctime_ns,
        "inode": entry.inode,
    }


def point_mark(point: RestorePoint) -> dict[str, object]:
    """A restore point, for --json."""
    return {"id": point.id, "time": text.when(point.time_ns)}


def span_text(points: list[RestorePoint]) -> str:
    """How many points, and from when to when."""
    first, last = text.when(points[0].time_ns), text.when(points[-1].time_ns)
    return f"{text.count(len(points), 'point')} {first}" + (f" to {last}" if len(points) > 1 else "")
