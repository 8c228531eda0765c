"""The root of the tree of errors, and what belongs to no kind."""

from __future__ import annotations

from typing import ClassVar


class XbfsError(Exception):
    """Anything XBFS reports to its user.

    ``message`` states facts; ``hint`` is the next action or empty.
    """

    exit_code: ClassVar[int] = 1
    retryable: ClassVar[bool] = False
    default_hint: ClassVar[str] = ""

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = self.default_hint if hint is None else hint


class UsageError(XbfsError):
    """The command was called with arguments that do not make sense together."""

    exit_code = 2


class Cancelled(XbfsError):
    """The user or a signal stopped the command; nothing half-done is visible."""

    exit_code = 130
