"""Counters of a run: bytes by fate, seconds by stage, and which stage is the bottleneck.

Each worker owns its counters; a reporter sums them at any time without a lock, so sums may be off by one segment.
"""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, NamedTuple

from xbfs_engine.catalog.restore_point import ReadStatistics

if TYPE_CHECKING:
    from collections.abc import Sequence


class Stage(StrEnum):
    """Where a worker's time goes."""

    READ = "read"
    HASH = "hash"
    LOOKUP = "look-up"
    COMPRESS = "compress"
    SEAL = "seal"
    STORE = "store"
    MAP = "map"
    WAIT = "wait"


class WorkerCounters:
    """What one worker did so far."""

    __slots__ = ("duplicate", "new", "seconds", "source", "unchanged", "zero")

    def __init__(self) -> None:
        self.source = self.zero = self.unchanged = self.duplicate = self.new = 0
        self.seconds = dict.fromkeys(Stage, 0.0)


class Progress(NamedTuple):
    """A run at one moment. ``planned_bytes`` is what will be read from the source in all."""

    disk: int
    planned_bytes: int
    read: ReadStatistics
    stored_bytes: int
    seconds: dict[Stage, float]

    @property
    def bottleneck(self) -> Stage | None:
        """The stage that took most of the workers' time."""
        busy = {stage: spent for stage, spent in self.seconds.items() if stage is not Stage.WAIT}
        stage = max(busy, key=lambda stage: busy[stage])
        return stage if busy[stage] > 0 else None


def total(workers: Sequence[WorkerCounters]) -> ReadStatistics:
    """Bytes by fate over all workers."""
    return ReadStatistics(
        source_bytes=sum(worker.source for worker in workers),
        zero_bytes=sum(worker.zero for worker in workers),
        unchanged_bytes=sum(worker.unchanged for worker in workers),
        duplicate_bytes=sum(worker.duplicate for worker in workers),
        new_bytes=sum(worker.new for worker in workers),
    )


def stage_seconds(workers: Sequence[WorkerCounters]) -> dict[Stage, float]:
    """Seconds by stage over all workers."""
    return {stage: sum(worker.seconds[stage] for worker in workers) for stage in Stage}
