"""check and verify."""

from __future__ import annotations

import os
import signal
import threading
from typing import TYPE_CHECKING, TypeVar

from xbfs.cli import text
from xbfs.cli.context import repository_of
from xbfs.cli.points import ID_DIGITS
from xbfs.cli.progress import ProgressLine
from xbfs_engine.core.errors import DamageFound
from xbfs_engine.maintain.check import check as check_repository
from xbfs_engine.maintain.verify import verify as verify_repository

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable
    from types import FrameType

    from xbfs.cli.output import Output
    from xbfs_engine.maintain.parallel import MaintenanceProgress
    from xbfs_engine.maintain.report import Finding, PointHit, Report

T = TypeVar("T")


def check(arguments: argparse.Namespace, output: Output) -> None:
    """Check the structure."""
    repository = repository_of(arguments)
    with ProgressLine(output, repository.runtime.clock) as line:

        def progress(now: MaintenanceProgress) -> None:
            line.update(now.stage, now.done, now.total, items=True, note=_damages(now))

        report = _until_signal(lambda stop: check_repository(repository, progress, stop))
    _tell(report, output)


def verify(arguments: argparse.Namespace, output: Output) -> None:
    """Read and authenticate everything."""
    repository = repository_of(arguments)
    with ProgressLine(output, repository.runtime.clock) as line:

        def progress(now: MaintenanceProgress) -> None:
            if now.total_bytes and now.read_bytes < now.total_bytes:
                line.update("read", now.read_bytes, now.total_bytes, note=_damages(now))
            else:
                line.update(now.stage, now.done, now.total, items=True, note=_damages(now))

        report = _until_signal(lambda stop: verify_repository(repository, progress, stop))
    _tell(report, output)


def _until_signal(work: Callable[[Callable[[], bool]], T]) -> T:
    """``work`` called with a function that says whether SIGINT or SIGTERM came; a second one ends the process."""
    stopped = threading.Event()

    def on_signal(number: int, _frame: FrameType | None) -> None:
        if stopped.is_set():
            os._exit(128 + number)
        stopped.set()

    before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        return work(stopped.is_set)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _damages(now: MaintenanceProgress) -> str:
    return text.count(now.damages, "damage") if now.damages else ""


def _tell(report: Report, output: Output) -> None:
    """Print the report. Raises DamageFound if there is damage."""
    output.result(report.to_record())
    for finding in report.findings:
        _tell_finding(finding, output)
    seen = report.examined
    read = f", {text.count(seen.chunks, 'chunk')} in {text.size(seen.read_bytes)} read" if report.deep else ""
    output.say(
        f"{text.count(seen.points, 'restore point')}, {text.count(seen.packs, 'pack')}, "
        f"{text.count(seen.references, 'chunk reference')} examined{read}"
    )
    if report.healthy:
        output.say("no damage" if not report.notes else f"no damage, {text.count(report.notes, 'note')}")
        return
    output.say("restore points that are hit:" if report.points_hit else "no restore point is hit")
    for hit in report.points_hit:
        output.say(f"  {_hit_text(hit)}")
    raise DamageFound(
        f"{text.count(report.damages, 'damage')} found; {text.count(len(report.points_hit), 'restore point')} hit",
        hint="bring the listed blobs back from a copy of the repository"
        + ("" if report.deep else "; run `xbfs verify` for the whole extent"),
    )


def _tell_finding(finding: Finding, output: Output) -> None:
    output.say(f"{finding.severity.value}: {finding.kind.value} {finding.blob}: {finding.message}")
    if finding.detail:
        output.say(f"  {finding.detail}")
    for hit in finding.points:
        output.say(f"  hits {_hit_text(hit)}")
        for disk in hit.disks:
            for offset, length in disk.ranges:
                output.say(f"    disk {disk.number}: {length} bytes from {offset}")
            if disk.lost_bytes > sum(length for _, length in disk.ranges):
                output.say(f"    disk {disk.number}: and more, {text.size(disk.lost_bytes)} in all")
    if finding.points_omitted:
        output.say(f"  and {finding.points_omitted} more")


def _hit_text(hit: PointHit) -> str:
    name = hit.vm_name if hit.vm_name is not None else "(unknown VM)"
    time = text.when(hit.time_ns) if hit.time_ns is not None else "unknown time"
    disks = ", ".join(f"disk {disk.number} ({text.size(disk.lost_bytes)})" for disk in hit.disks)
    return f"{hit.point[:ID_DIGITS]} of {name} at {time}" + (f": {disks}" if disks else "")
