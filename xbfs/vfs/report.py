"""What the mount says about itself: `.xbfs/status.json` and `.xbfs/metrics`.

Owns counters and the list of recent problems. For the event loop's thread.
"""

from __future__ import annotations

import os
from collections import deque
from typing import TYPE_CHECKING, Final

import xbfs
from xbfs.vfs.texts import to_json
from xbfs.vfs.times import SECOND_NS, time_name

if TYPE_CHECKING:
    from xbfs.vfs.gate import Gate
    from xbfs.vfs.guests.source import Guests
    from xbfs.vfs.points import Points
    from xbfs.vfs.pool import ReadPool
    from xbfs_engine.guestfs.worker.confine import Confinement
    from xbfs_engine.store.cache import ChunkCache
    from xbfs_engine.store.repository import Repository

PROBLEMS_MAX: Final = 64


class MountReport:
    """Health of one mount. Others add to ``failed_reads`` and the problems and set the remaining fields.

    What is wrong with a guest's own files says nothing about the health of the mount.
    """

    def __init__(self, repository: Repository, cache: ChunkCache, gate: Gate, pool: ReadPool, guests: Guests) -> None:
        self._repository = repository
        self._cache = cache
        self._gate = gate
        self._pool = pool
        self._guests = guests
        self._mounted_s = repository.runtime.clock.now_ns() // SECOND_NS
        self.failed_reads = 0
        self.problems: deque[dict[str, object]] = deque(maxlen=PROBLEMS_MAX)
        self.guest_problems: deque[dict[str, object]] = deque(maxlen=PROBLEMS_MAX)
        self.refresh_problem: str | None = None
        self.control: str | None = None
        self.read_ahead_kib: int | None = None

    def status_json(self, points: Points, confinement: Confinement | None) -> bytes:
        """Health as JSON, with everything that can not be shown and why."""
        stalled = self._gate.stalled()
        return to_json(
            {
                "program": f"xbfs {xbfs.__version__}",
                "pid": os.getpid(),
                "repository": self._repository.id,
                "storage": self._repository.storage.location(),
                "role": self._repository.keys.role.value,
                "mounted": time_name(self._mounted_s),
                "healthy": not (stalled or points.damaged or self.problems or self.refresh_problem),
                "vms": len({vm.key[0] for vm in points.vms.values()}),
                "points": len(points.by_id),
                "damaged_points": [{"id": d.id, "problem": d.text.rstrip()} for d in points.damaged.values()],
                "refresh_problem": self.refresh_problem,
                "recent_problems": list(self.problems),
                "stalled_blobs": {name: round(age, 1) for name, age in stalled.items()},
                "cache": {
                    "used_bytes": self._cache.used_bytes,
                    "hits": self._cache.hits,
                    "misses": self._cache.misses,
                    "hit_ratio": self._hit_ratio(),
                },
                "guests": {
                    "readers": self._guests.live,
                    "confined_by": None if confinement is None else list(confinement.in_force),
                    "not_confined_by": None if confinement is None else list(confinement.missing),
                    "recent_problems": list(self.guest_problems),
                },
                "control": self.control,
                "threads": self._pool.size,
                "kernel_read_ahead_kib": self.read_ahead_kib,
            }
        )

    def metrics(self, points: Points) -> bytes:
        """The same in numbers, in Prometheus' text format 0.0.4."""
        values = {
            "xbfs_points": ("gauge", len(points.by_id)),
            "xbfs_points_damaged": ("gauge", len(points.damaged)),
            "xbfs_cache_used_bytes": ("gauge", self._cache.used_bytes),
            "xbfs_cache_hits_total": ("counter", self._cache.hits),
            "xbfs_cache_misses_total": ("counter", self._cache.misses),
            "xbfs_reads_failed_total": ("counter", self.failed_reads),
            "xbfs_blobs_stalled": ("gauge", len(self._gate.stalled())),
            "xbfs_threads": ("gauge", self._pool.size),
        }
        lines = (f"# TYPE {name} {kind}\n{name} {value}\n" for name, (kind, value) in values.items())
        return "".join(lines).encode()

    def _hit_ratio(self) -> float | None:
        asked = self._cache.hits + self._cache.misses
        return round(self._cache.hits / asked, 4) if asked else None
