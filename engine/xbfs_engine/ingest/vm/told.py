"""What a pool told its administrators of a disk's changed-block log: why the next read is full. Keeps no state."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final

from xbfs_engine.core.errors import PoolError

if TYPE_CHECKING:
    from xbfs_engine.source.xapi.session import Xapi

_MEANT: Final = ("VDI_CBT_METADATA_INCONSISTENT", "VDI_CBT_RESIZE_FAILED", "VDI_CBT_SNAPSHOT_FAILED")
"""The messages with which SM switches tracking off by itself: a log that a crash left open, a growth or a snapshot
whose log could not be written (SM, blktap2.py and VDI.py)."""


async def told_of(xapi: Xapi, vdi_uuid: str, since_ns: int) -> str:
    """The names of such messages since a time, for a reason; empty if there are none, or they can not be had."""
    since = datetime.fromtimestamp(since_ns // 1_000_000_000, UTC)
    try:
        found = await xapi.call("message.get", "VDI", vdi_uuid, since)
    except PoolError:
        return ""
    records = found.values() if isinstance(found, dict) else []
    names = {record.get("name") for record in records if isinstance(record, dict)}
    return ", ".join(name for name in _MEANT if name in names)
