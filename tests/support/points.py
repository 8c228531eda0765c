"""Restore points made of nothing, for tests that only look at names and attributes."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from itertools import count
from typing import TYPE_CHECKING

from xbfs_engine.catalog.mibmap import MibMap
from xbfs_engine.catalog.restore_point import DiskRecord, ReadStatistics, RestorePoint, RunRecord, data_map_size
from xbfs_engine.core.ids import PointId
from xbfs_engine.core.limits import CHUNK_SIZE_DEFAULT, GIB

if TYPE_CHECKING:
    from collections.abc import Sequence

SECOND_NS = 1_000_000_000
_serial = count()


def disk(number: int = 0, size_bytes: int = 10 * GIB, data_map: bytes | None = None) -> DiskRecord:
    """A disk without a block map; by default all of it holds data as far as the manifest says."""
    whole = b"\xff" * data_map_size(size_bytes) if data_map is None else data_map
    statistics = ReadStatistics(0, 0, 0, 0, 0)
    return DiskRecord(
        number, "disk", "vdi", size_bytes, CHUNK_SIZE_DEFAULT, None, MibMap(whole), "full", "test", statistics
    )


def point(
    name: str = "vm",
    *,
    uuid: str = "11111111-2222",
    time_ns: int = 1000 * SECOND_NS,
    committed_ns: int | None = None,
    disks: Sequence[DiskRecord] = (),
    identity: str | None = None,
) -> RestorePoint:
    """A point with an id of its own. ``committed_ns``: when its run ended, by default when it began."""
    made = PointId(hashlib.sha256((identity or f"point {next(_serial)}").encode()).hexdigest())
    started_ns = time_ns if committed_ns is None else committed_ns
    run = RunRecord("test", "node", started_ns, 0, 0, 0, 0)
    return RestorePoint(made, uuid, name, time_ns, None, tuple(disks), run, {})


def with_id(original: RestorePoint, point_id: str) -> RestorePoint:
    return replace(original, id=PointId(point_id))
