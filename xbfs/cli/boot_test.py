"""test: boot restore points, tell what became of it, and store it."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING

import trio

from xbfs.cli import boot_test_pool, tasks, text
from xbfs.cli.boot_test_ground import throw_away_what_is_left
from xbfs.cli.boot_test_here import Here, accelerator_of
from xbfs.cli.boot_test_pool import There
from xbfs.cli.context import catalog_of, index_of, point_of, repository_of
from xbfs.cli.points import ID_DIGITS, write_screenshot
from xbfs.cli.pool_session import PoolSessions
from xbfs.fuse import mountpoint
from xbfs.instant.boottest.on_pool import ACCELERATOR
from xbfs.instant.boottest.run import MILLI
from xbfs.vfs.records import test_record
from xbfs_engine.catalog.boottests import Verdict, put_boot_test
from xbfs_engine.catalog.catalog import points_of
from xbfs_engine.codec.keys import Role
from xbfs_engine.core.errors import BootTestFailed, Cancelled, KeyNotHeld, UsageError, XbfsError

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from xbfs.cli.boot_test_ground import Ground, Trial
    from xbfs.cli.output import Output
    from xbfs.instant.boottest.verdict import Observed
    from xbfs_engine.catalog.boottests import BootTest
    from xbfs_engine.catalog.catalog import Catalog
    from xbfs_engine.catalog.restore_point import RestorePoint
    from xbfs_engine.core.ids import PointId


def test(arguments: argparse.Namespace, output: Output) -> None:
    """Test all points that are asked for, so many at once."""
    if arguments.policy is not None:
        raise UsageError("there are no policies in this release", hint="name VMs with --vm")
    mountpoint.check_installed()  # said before anybody types a passphrase
    login = boot_test_pool.login(arguments) if arguments.pool is not None else None
    accelerator = accelerator_of(arguments) if login is None else ACCELERATOR
    repository = repository_of(arguments)
    if repository.keys.role is not Role.OWNER:
        raise KeyNotHeld("this role can not read disks, so it can not boot them", hint="use an owner's key slot")
    catalog, index = catalog_of(repository, output), index_of(repository)
    common = arguments, output, repository, catalog, index
    ground: Ground = Here(*common, accelerator)
    if login is not None:
        ground = There(*common, PoolSessions(repository, catalog, index, *login, output))
    points = _points(arguments, catalog)
    if arguments.screenshot is not None and len(points) != 1:
        raise UsageError("--screenshot is for one point", hint="the repository keeps those of all of them")
    throw_away_what_is_left(repository, output)
    results: list[BootTest] = []
    failures: list[XbfsError] = []
    for start in range(0, len(points), arguments.parallel):
        wave = points[start : start + arguments.parallel]
        found = _test(ground, wave, failures)
        for point in wave:
            if point.id in found:
                _tell(found[point.id], point, arguments, output)
                results.append(found[point.id])
    output.result({"tests": [test_record(result) for result in results]})
    if failures:
        raise failures[0]
    _conclude(results, output)


def _test(ground: Ground, points: Sequence[RestorePoint], failures: list[XbfsError]) -> dict[PointId, BootTest]:
    """Some at once; the results, stored. ``failures`` gets why others could not be tested at all."""
    found: dict[PointId, BootTest] = {}
    trials: list[tuple[Trial, RestorePoint]] = []

    async def one(trial: Trial, point: RestorePoint) -> None:
        try:
            found[point.id] = await trial(partial(_report, ground.output, point.vm_name))
        except XbfsError as exc:
            failures.append(exc)

    async def all_of_them() -> None:
        async with trio.open_nursery() as nursery:
            for trial, point in trials:
                nursery.start_soon(one, trial, point)

    with ExitStack() as sessions:
        for point in points:
            try:
                trials.append((ground.prepare(point, sessions), point))
            except Cancelled:
                raise
            except XbfsError as exc:
                failures.append(exc)
        tasks.run(all_of_them)
        ground.output.clear_status()
        for result in found.values():
            put_boot_test(ground.repository, result)
    return found


def _tell(result: BootTest, point: RestorePoint, arguments: argparse.Namespace, output: Output) -> None:
    if arguments.screenshot is not None:
        write_screenshot(arguments.screenshot, result.screenshot)
    for line in boot_test_lines(result, f"{point.vm_name} as of {text.when(point.time_ns)}"):
        output.say(line)


def _report(output: Output, name: str, seen: Observed) -> None:
    if output.shows_progress and output.redraws:
        cpu = "" if seen.cpu is None else f", {100 * seen.cpu:.0f} % CPU"
        output.status(
            f"{name}: {seen.elapsed_s:.0f} s, read {text.size(seen.read_bytes)}, "
            f"written {text.size(seen.written_bytes)}{cpu}"
        )


def boot_test_lines(result: BootTest, title: str) -> list[str]:
    """A result for people."""
    lines = [
        f"{title}: {result.verdict} after {text.duration(result.elapsed_ms / MILLI)}: {result.reason}",
        f"  {result.firmware}, {result.accelerator}, by {result.program} on {result.node}",
    ]
    marks = {"for": "+", "against": "-"}
    return lines + [f"  {marks.get(signal.speaks, ' ')} {signal.name}: {signal.reading}" for signal in result.signals]


def _points(arguments: argparse.Namespace, catalog: Catalog) -> list[RestorePoint]:
    if (arguments.point is None) == (not arguments.vm):
        raise UsageError("what is to be tested?", hint="give a POINT, or one or several --vm NAME")
    if arguments.point is not None:
        found = [point_of(catalog, arguments.point)]
    else:
        found = [points_of(catalog.points(), vm)[-1] for vm in arguments.vm]
    for point in found:
        if not point.disks:
            raise UsageError(f"restore point {point.id[:ID_DIGITS]} has no disk to boot from")
    return list({point.id: point for point in found}.values())


def _conclude(results: Sequence[BootTest], output: Output) -> None:
    failed = [result for result in results if result.verdict is Verdict.FAILED]
    if failed:
        reasons = "; ".join(f"{result.point[:ID_DIGITS]}: {result.reason}" for result in failed)
        hint = f"look at its screen: `xbfs show {failed[0].point[:ID_DIGITS]} --screenshot FILE`"
        raise BootTestFailed(f"{len(failed)} of {len(results)} did not boot: {reasons}", hint=hint)
    for result in results:
        if result.verdict is Verdict.UNCLEAR:
            output.warn(
                f"{result.point[:ID_DIGITS]}: {result.reason}",
                "look at its screenshot; give a longer --deadline, or where there is a serial console a --marker",
            )
