"""Faults that a test or the demo asked for, by the name of a call ("VDI.snapshot") or route ("GET /export_raw_vdi").

Effects that calls and routes know: ``fail`` (before anything is done), ``fail_after`` (done, but reported as failed),
``delay``, ``hold`` and ``hold_after`` (wait until the fault is cleared), ``drop`` and ``drop_after`` (connection ends),
``kill_session``. Anything that asks ``take`` may know effects of its own. Any thread may call it.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from .failures import DropConnection, Failure

if TYPE_CHECKING:
    from .clock import SimClock


@dataclass(eq=False, slots=True)
class Fault:
    """One fault: strikes at the ``nth`` pass (from 1) by a point that matches the glob, and ``times`` in a row.

    ``argument``: strikes only passes whose first argument is this reference.
    """

    point: str
    effect: str
    nth: int = 1
    times: int = 1
    code: str = "INTERNAL_ERROR"
    params: tuple[str, ...] = ()
    seconds: float = 0.0
    argument: str = ""
    number: int = 0
    passes: int = 0
    hits: int = 0
    cleared: threading.Event = field(default_factory=threading.Event)

    def before(self, clock: SimClock) -> None:
        """Act ahead of the call. Raises Failure or DropConnection."""
        if self.effect == "fail":
            raise Failure(self.code, *self.params)
        if self.effect == "drop":
            raise DropConnection
        if self.effect == "delay":
            clock.sleep(self.seconds)
        elif self.effect == "hold":
            self.cleared.wait()

    def after(self) -> None:
        """Act when the call has had its effect. Raises Failure or DropConnection."""
        if self.effect == "hold_after":
            self.cleared.wait()
        elif self.effect == "fail_after":
            raise Failure(self.code, *self.params)
        elif self.effect == "drop_after":
            raise DropConnection


class Faults:
    """All faults that are set."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._faults: list[Fault] = []
        self._known: dict[int, Fault] = {}

    def add(self, fault: Fault) -> int:
        """Set a fault; returns its number."""
        with self._changed:
            fault.number = len(self._known) + 1
            self._known[fault.number] = fault
            self._faults.append(fault)
            return fault.number

    def clear(self, number: int | None = None) -> None:
        """Take back one fault or all; who is held by it goes on."""
        with self._changed:
            gone = [fault for fault in self._faults if number in (None, fault.number)]
            self._faults = [fault for fault in self._faults if fault not in gone]
        for fault in gone:
            fault.cleared.set()

    def take(self, point: str, argument: str = "") -> Fault | None:
        """Count a pass by ``point``; the fault to act on, if one strikes now."""
        with self._changed:
            struck = None
            for fault in self._faults:
                if not fnmatchcase(point, fault.point) or fault.argument not in ("", argument):
                    continue
                fault.passes += 1
                if struck is None and fault.nth <= fault.passes < fault.nth + fault.times:
                    fault.hits += 1
                    struck = fault
                    self._changed.notify_all()
            return struck

    def wait_hit(self, number: int, hits: int, timeout_s: float) -> bool:
        """Wait (real seconds) until a fault has struck ``hits`` times; whether it has."""
        fault = self._known[number]
        with self._changed:
            return self._changed.wait_for(lambda: fault.hits >= hits, timeout_s)
