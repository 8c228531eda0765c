"""One boot test: a machine over the disks of a session, watched until its verdict. Event-loop thread only."""

from __future__ import annotations

import os
import re
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NamedTuple

import trio

from xbfs.instant.boottest.observe import QemuObserver
from xbfs.instant.boottest.screen import png
from xbfs.instant.boottest.verdict import Judgement, at_deadline, judge, signals
from xbfs.instant.qemu import Machine, Qemu
from xbfs_engine.catalog.boottests import CONSOLE_MAX, BootTest, Signal, Verdict
from xbfs_engine.core.errors import InstantError, PoolError

if TYPE_CHECKING:
    from collections.abc import Callable

    from xbfs.instant.boottest.observe import Observer
    from xbfs.instant.boottest.verdict import Observed
    from xbfs_engine.core.ids import PointId
    from xbfs_engine.core.runtime import Clock

DEADLINE_S: Final = 300.0
"""A micro guest took 119 s under emulation on a machine with a load of 50."""
MILLI: Final = 1000
_REFERENCE: Final = re.compile(r" ?OpaqueRef:[0-9A-Za-z-]+")
"""Of XAPI's objects: they mean nothing after the test."""


@dataclass(frozen=True, slots=True)
class Examination:
    """What is tested, and how. ``marker``: a text that the console has to show; None decides by what systems show.
    ``accelerator``: "kvm", "tcg" or "xen"."""

    point: PointId
    deadline_s: float
    marker: str | None
    program: str
    accelerator: str
    firmware: str


class Outcome(NamedTuple):
    """How it ended, and when."""

    judgement: Judgement
    elapsed_s: float


async def examine(what: Examination, machine: Machine, clock: Clock, report: Callable[[Observed], None]) -> BootTest:
    """The result; the machine is gone when it returns. Raises InstantError if it can not be started at all."""
    began_s = clock.monotonic_s()
    with Qemu(machine) as qemu:
        observer = QemuObserver(qemu)
        await qemu.connect()
        await qemu.ask("cont")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(qemu.serve)
            outcome = await watch(what, clock, observer, began_s, report)
            nursery.cancel_scope.cancel()
        events = Signal("events", "", ", ".join(dict.fromkeys(qemu.events)))
        return await result_of(what, observer, outcome, clock, events)


async def watch(
    what: Examination, clock: Clock, observer: Observer, began_s: float, report: Callable[[Observed], None]
) -> Outcome:
    """Look until there is a verdict, and once more at the screen."""
    outcome = await _watch(what, clock, observer, began_s, report)
    with suppress(InstantError, PoolError):
        await observer.look_at_screen(outcome.elapsed_s)
    return outcome


async def result_of(what: Examination, observer: Observer, outcome: Outcome, clock: Clock, *more: Signal) -> BootTest:
    """What is stored."""
    seen, judgement, screen = observer.seen, outcome.judgement, observer.screen
    picture = b"" if screen is None else await trio.to_thread.run_sync(png, screen)
    return BootTest(
        point=what.point,
        made_ns=clock.now_ns(),
        verdict=judgement.verdict,
        reason=_REFERENCE.sub("", judgement.reason),
        signals=(*signals(seen, what.marker), *more),
        elapsed_ms=int(outcome.elapsed_s * MILLI),
        output_ms=None if observer.output_s is None else int(observer.output_s * MILLI),
        marker_ms=int(outcome.elapsed_s * MILLI) if judgement.on_console else None,
        accelerator=what.accelerator,
        firmware=what.firmware,
        program=what.program,
        node=os.uname().nodename,
        console=seen.console[-CONSOLE_MAX:],
        screenshot=picture,
    )


async def _watch(
    what: Examination, clock: Clock, observer: Observer, began_s: float, report: Callable[[Observed], None]
) -> Outcome:
    while True:
        elapsed_s = clock.monotonic_s() - began_s
        try:
            seen = await observer.look(elapsed_s)
        except (InstantError, PoolError) as exc:
            return Outcome(Judgement(Verdict.UNCLEAR, f"the machine was lost: {exc.message}"), elapsed_s)
        report(seen)
        found = judge(seen, what.marker)
        if found is None and elapsed_s >= what.deadline_s:
            found = at_deadline(seen, what.marker)
        if found is not None:
            return Outcome(found, elapsed_s)
        await trio.sleep(observer.poll_s)
