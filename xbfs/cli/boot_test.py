"""test: boot restore points, tell what became of it, and store it.

The session of a test is called ``test-PID-START-…`` after the process that made it: what a killed one left is shown by
`xbfs boot list` and thrown away by the next test. With --keep it is called ``tested-…`` and nobody throws it away.
"""

from __future__ import annotations

import os
import re
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final

import trio

import xbfs
from xbfs.cli import tasks, text
from xbfs.cli.context import catalog_of, index_of, point_of, repository_of
from xbfs.cli.points import ID_DIGITS, write_screenshot
from xbfs.fuse import mountpoint
from xbfs.instant import client
from xbfs.instant.boottest.choose import accelerator_that_works, firmware_of, runs_under
from xbfs.instant.boottest.run import MILLI, Examination, examine
from xbfs.instant.qemu import Machine, check_installed
from xbfs.instant.session import DiskFormat, Export, Session, SessionDisk
from xbfs.vfs.records import test_record
from xbfs_engine.catalog.boottests import Verdict, put_boot_test
from xbfs_engine.catalog.catalog import points_of
from xbfs_engine.codec.keys import Role
from xbfs_engine.core.errors import BootTestFailed, InstantError, KeyNotHeld, UsageError, XbfsError

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from xbfs.cli.output import Output
    from xbfs.instant.boottest.verdict import Observed
    from xbfs.instant.client import Running
    from xbfs_engine.catalog.boottests import BootTest
    from xbfs_engine.catalog.catalog import Catalog
    from xbfs_engine.catalog.restore_point import RestorePoint
    from xbfs_engine.core.ids import PointId
    from xbfs_engine.store.index import ChunkIndex
    from xbfs_engine.store.repository import Repository

_LEFT: Final = re.compile(r"test-(\d{1,10})-(\d{1,20})-[0-9a-f]{4}")
_KEPT_NAME: Final = "tested"


def test(arguments: argparse.Namespace, output: Output) -> None:
    """Test all points that are asked for, so many at once."""
    if arguments.policy is not None:
        raise UsageError("there are no policies in this release", hint="name VMs with --vm")
    if arguments.pool is not None:
        raise UsageError("tests on a pool are not built", hint="`xbfs boot POINT --pool P --isolated` boots it there")
    mountpoint.check_installed()  # said before anybody types a passphrase
    check_installed()
    accelerator = _accelerator(arguments.accel)
    repository = repository_of(arguments)
    if repository.keys.role is not Role.OWNER:
        raise KeyNotHeld("this role can not read disks, so it can not boot them", hint="use an owner's key slot")
    catalog, index = catalog_of(repository, output), index_of(repository)
    points = _points(arguments, catalog)
    if arguments.screenshot is not None and len(points) != 1:
        raise UsageError("--screenshot is for one point", hint="the repository keeps those of all of them")
    _throw_away_what_is_left(repository, output)
    tester = _Tester(arguments, output, repository, catalog, index, accelerator)
    results: list[BootTest] = []
    for start in range(0, len(points), arguments.parallel):
        results += tester.test(points[start : start + arguments.parallel])
    output.result({"tests": [test_record(result) for result in results]})
    _conclude(results, output)


class _Tester:
    """Tests some points at once."""

    def __init__(
        self,
        arguments: argparse.Namespace,
        output: Output,
        repository: Repository,
        catalog: Catalog,
        index: ChunkIndex,
        accelerator: str,
    ) -> None:
        self._arguments = arguments
        self._output = output
        self._repository = repository
        self._catalog = catalog
        self._index = index
        self._accelerator = accelerator

    def test(self, points: Sequence[RestorePoint]) -> list[BootTest]:
        """The results, stored."""
        clock = self._repository.runtime.clock
        with ExitStack() as sessions:
            examinations = []
            for point in points:
                running = self._begin(point)
                if not self._arguments.keep:
                    sessions.callback(client.discard, self._repository, running.name, force=True)
                examinations.append(self._examination(point, running))
            found: dict[PointId, BootTest] = {}

            async def one(what: Examination, name: str) -> None:
                found[what.point] = await examine(what, clock, partial(self._report, name))

            async def all_of_them() -> None:
                async with trio.open_nursery() as nursery:
                    for what, point in zip(examinations, points, strict=True):
                        nursery.start_soon(one, what, point.vm_name)

            tasks.run(all_of_them)
        self._output.clear_status()
        results = [found[point.id] for point in points]
        for result, point in zip(results, points, strict=True):
            self._tell(result, point)
            put_boot_test(self._repository, result)
        return results

    def _begin(self, point: RestorePoint) -> Running:
        runtime = self._repository.runtime
        unique = runtime.random.token(2).hex()
        own = f"test-{os.getpid()}-{_started(os.getpid())}-{unique}"
        name = f"{_KEPT_NAME}-{point.id[:ID_DIGITS]}-{unique}" if self._arguments.keep else own
        disks = tuple(SessionDisk(disk.number, DiskFormat.RAW, f"{disk.number}.raw") for disk in point.disks)
        plan = Session(name, point.id, point.vm_name, runtime.clock.now_ns(), Export.FILE, disks)
        if self._arguments.keep:
            self._output.say_now(f"session {name}: `xbfs boot discard {name}` ends it")
        return client.begin(self._repository, self._catalog, self._index, plan)

    def _examination(self, point: RestorePoint, running: Running) -> Examination:
        arguments = self._arguments
        files = []
        for disk in sorted(point.disks, key=lambda disk: disk.number):
            file = running.places[str(disk.number)].file
            if file is None:
                raise InstantError(f"disk {disk.number} of session {running.name} is not there")
            files.append(file)
        firmware = firmware_of(point, files[0]) if arguments.firmware == "auto" else arguments.firmware
        machine = Machine(tuple(files), firmware, self._accelerator, arguments.memory, arguments.bus)
        return Examination(point.id, machine, arguments.deadline, arguments.marker, f"xbfs {xbfs.__version__}")

    def _report(self, name: str, seen: Observed) -> None:
        if self._output.shows_progress and self._output.redraws:
            self._output.status(
                f"{name}: {seen.elapsed_s:.0f} s, read {text.size(seen.read_bytes)}, "
                f"written {text.size(seen.written_bytes)}, {100 * seen.cpu:.0f} % CPU"
            )

    def _tell(self, result: BootTest, point: RestorePoint) -> None:
        if self._arguments.screenshot is not None:
            write_screenshot(self._arguments.screenshot, result.screenshot)
        for line in boot_test_lines(result, f"{point.vm_name} as of {text.when(point.time_ns)}"):
            self._output.say(line)


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


def _accelerator(wanted: str) -> str:
    if wanted == "auto":
        return accelerator_that_works()
    if wanted == "kvm" and not runs_under(wanted):
        raise InstantError("a boot under KVM does not work on this machine", hint="use --accel tcg, which is slow")
    return wanted


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
                "look at its screenshot; give a --marker that the system writes, or a longer --deadline",
            )


def _throw_away_what_is_left(repository: Repository, output: Output) -> None:
    """Sessions of tests whose process has gone."""
    for running in client.running(repository):
        match = _LEFT.fullmatch(running.name)
        if match is not None and _started(int(match[1])) != int(match[2]):
            try:
                client.discard(repository, running.name, force=True)
            except XbfsError as exc:
                output.warn(f"session {running.name} of a test that was killed stays: {exc.message}")
            else:
                output.say(f"session {running.name} of a test that was killed is thrown away")


def _started(pid: int) -> int:
    """When a process started, in ticks since the machine did; 0 if there is none (proc(5), field 22 of stat)."""
    with suppress(OSError):
        return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[19])
    return 0
