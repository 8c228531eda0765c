"""Progress of long work: amount done, percent, rate, time left and a note such as the bottleneck.

Nothing with --json or --quiet; one redrawn line on a terminal; a plain line now and then elsewhere. One thread uses it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

from xbfs.cli import text

if TYPE_CHECKING:
    from xbfs.cli.output import Output
    from xbfs_engine.core.runtime import Clock

REDRAW_INTERVAL_S = 0.2
LINE_INTERVAL_S = 5.0
_BAR = 24


class ProgressLine:
    """Shows how far work is. A context manager: leaving it takes a redrawn line away."""

    def __init__(self, output: Output, clock: Clock) -> None:
        self._output = output
        self._clock = clock
        self._started = clock.monotonic_s()
        self._label = ""
        self._shown = self._started
        self._interval = REDRAW_INTERVAL_S if output.redraws else LINE_INTERVAL_S

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._output.clear_status()

    def update(self, label: str, done: int, total: int, *, items: bool = False, note: str = "") -> None:
        """``done`` of ``total`` (0: unknown) bytes, or ``items``; a new ``label`` starts the rate anew."""
        now = self._clock.monotonic_s()
        if label != self._label:
            self._label, self._started = label, now
        if not self._output.shows_progress or now - self._shown < self._interval:
            return
        self._shown = now
        self._output.status(self._line(done, total, now - self._started, items=items, note=note))

    def _line(self, done: int, total: int, elapsed_s: float, *, items: bool, note: str) -> str:
        parts = [self._label]
        amount = str if items else text.size
        share = min(done / total, 1.0) if total else 0.0
        if total:
            if self._output.redraws:
                parts.append("[" + ("#" * round(share * _BAR)).ljust(_BAR, "-") + "]")
            parts.append(f"{share:4.0%}")
        parts.append(amount(done) + (f" of {amount(total)}" if total else ""))
        if not items:
            parts.append(text.rate(done, elapsed_s))
        if 0.0 < share < 1.0:
            parts.append(f"{text.clock(elapsed_s * (1 - share) / share)} left")
        if note:
            parts.append(note)
        return "  ".join(parts)
