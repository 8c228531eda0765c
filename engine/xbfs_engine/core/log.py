"""Structured logs: an event name and fields, never secrets. WARNING means that an operator should look.

structlog is imported at the first event: most commands log nothing and should start fast.
"""

from __future__ import annotations

import sys
from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from structlog.typing import FilteringBoundLogger

_LEVELS = {"debug": 10, "info": 20, "warning": 30, "error": 40}


class Logger:
    """A named logger that binds to structlog at its first event. Any thread may use it."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._bound: FilteringBoundLogger | None = None

    def debug(self, event: str, **fields: object) -> None:
        """Details for a developer."""
        self._get().debug(event, **fields)

    def info(self, event: str, **fields: object) -> None:
        """Something expected happened."""
        self._get().info(event, **fields)

    def warning(self, event: str, **fields: object) -> None:
        """An operator should look."""
        self._get().warning(event, **fields)

    def error(self, event: str, **fields: object) -> None:
        """Something failed."""
        self._get().error(event, **fields)

    def _get(self) -> FilteringBoundLogger:
        if self._bound is None:
            import structlog

            if not structlog.is_configured():
                configure("warning")
            self._bound = structlog.get_logger(name=self._name)
        return self._bound


def configure(level: str, *, json: bool = False) -> None:
    """Send events of ``level`` and above to standard error, one line each, as key=value or JSON."""
    import structlog

    render = (
        structlog.processors.JSONRenderer()
        if json
        else structlog.processors.KeyValueRenderer(key_order=["timestamp", "level", "event"])
    )
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            render,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(_LEVELS[level]),
        logger_factory=lambda *_: _Lines(),
        cache_logger_on_first_use=False,
    )


class _Lines:
    """Lines to standard error, as it is at the time of the event. One that can not be written, to a full disk or a
    terminal that is gone, is lost: whoever logs it has other work to do."""

    def msg(self, message: str) -> None:
        with suppress(OSError, ValueError):
            sys.stderr.write(f"{message}\n")
            sys.stderr.flush()

    debug = info = warning = error = msg
