"""Watches a machine that boots, and takes down what ``verdict`` judges. Event-loop thread only."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Final, cast

import trio

from xbfs.instant.boottest.screen import colours, is_same, pixels_of
from xbfs.instant.boottest.verdict import Observed, fatal_text

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from xbfs.instant.boottest.screen import Pixels
    from xbfs.instant.qemu import Qemu

_SCREEN_S: Final = 3.0
"""Between screenshots: each costs an emulated machine some milliseconds."""
_WINDOW_S: Final = 10.0
"""Over which the use of the processor is averaged."""
_QUIET_BYTES_S: Final = 64 << 10
"""Read and written by a system that is calm: logs, and little else."""


class Observer(ABC):
    """Of one machine. ``look`` again and again, ``poll_s`` apart; ``seen`` is what is known."""

    poll_s: float

    def __init__(self) -> None:
        self.seen = Observed()
        self.output_s: float | None = None
        self.screen: Pixels | None = None
        self._reference: Pixels | None = None
        self._still_from_s = 0.0
        self._samples: list[tuple[float, float | None, int]] = []
        self._quiet_from_s = 0.0

    @abstractmethod
    async def look(self, elapsed_s: float) -> Observed:
        """What is to be seen now. Raises InstantError or PoolError if the machine is not there any more."""

    @abstractmethod
    async def look_at_screen(self, elapsed_s: float) -> None:
        """Take a screenshot. Raises InstantError, PoolError."""

    async def _saw_screen(self, elapsed_s: float, screen: Pixels) -> None:
        # In a thread: a guest may have a screen that takes long.
        self.seen.screen_colours = await trio.to_thread.run_sync(colours, screen)
        # Compared with the first of a row of same ones, so that what moves slowly is seen to move.
        if not await trio.to_thread.run_sync(is_same, self._reference, screen):
            self._reference, self._still_from_s = screen, elapsed_s
        self.screen = screen
        self.seen.still_s = elapsed_s - self._still_from_s

    def _saw_use(self, elapsed_s: float, cpu_s: float | None) -> None:
        """``cpu_s``: of the processor since the start, None if nobody knows."""
        moved = self.seen.read_bytes + self.seen.written_bytes
        self._samples.append((elapsed_s, cpu_s, moved))
        while elapsed_s - self._samples[0][0] > _WINDOW_S:
            self._samples.pop(0)
        began_s, before_s, before = self._samples[0]
        span_s = elapsed_s - began_s
        if span_s > 0:
            self.seen.cpu = None if cpu_s is None or before_s is None else (cpu_s - before_s) / span_s
            if (moved - before) / max(span_s, 1.0) > _QUIET_BYTES_S:
                self._quiet_from_s = elapsed_s
        self.seen.quiet_s = elapsed_s - self._quiet_from_s


class QemuObserver(Observer):
    """Of a machine of ours."""

    poll_s = 0.5

    def __init__(self, qemu: Qemu) -> None:
        super().__init__()
        self._qemu = qemu
        self._screen_s = -_SCREEN_S
        self._fatal: tuple[int, float] | None = None

    async def look(self, elapsed_s: float) -> Observed:
        """What is to be seen now. Raises InstantError if the machine is not there any more."""
        seen, qemu = self.seen, self._qemu
        seen.elapsed_s = elapsed_s
        seen.console = qemu.console.text
        if self.output_s is None and seen.console.strip():
            self.output_s = elapsed_s
        self._look_for_fatal(elapsed_s)
        seen.agent_answered = qemu.agent_answered
        status = cast("Mapping[str, object]", await qemu.ask("query-status"))
        seen.status = str(status["status"])
        seen.resets = qemu.events.count("RESET")
        seen.has_panicked = "GUEST_PANICKED" in qemu.events
        seen.has_shut_down = "SHUTDOWN" in qemu.events
        devices = cast("Sequence[Mapping[str, Mapping[str, int]]]", await qemu.ask("query-blockstats"))
        disks = [device["stats"] for device in devices if str(device.get("node-name", "")).startswith("disk")]
        seen.read_bytes = sum(disk["rd_bytes"] for disk in disks)
        seen.written_bytes = sum(disk["wr_bytes"] for disk in disks)
        self._saw_use(elapsed_s, qemu.cpu_s)
        if elapsed_s - self._screen_s >= _SCREEN_S:
            await self.look_at_screen(elapsed_s)
        return seen

    async def look_at_screen(self, elapsed_s: float) -> None:
        """Take a screenshot. Raises InstantError."""
        self._screen_s = elapsed_s
        await self._saw_screen(elapsed_s, pixels_of(await self._qemu.screen()))

    def _look_for_fatal(self, elapsed_s: float) -> None:
        """A text is the last word while nothing comes after it."""
        total = self._qemu.console.total_bytes
        if fatal_text(self.seen.console) is None:
            self._fatal = None
        elif self._fatal is None or self._fatal[0] != total:
            self._fatal = (total, elapsed_s)
        self.seen.fatal_s = 0.0 if self._fatal is None else elapsed_s - self._fatal[1]
