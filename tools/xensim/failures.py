"""The one way a simulated call fails: an XAPI error code and its parameters, and the causes that are no errors."""

from __future__ import annotations


class Failure(Exception):
    """An XAPI error; ``code`` as published ("VDI_IN_USE"), ``params`` always strings."""

    def __init__(self, code: str, *params: str) -> None:
        super().__init__(code, *params)
        self.code = code
        self.params = params

    @property
    def description(self) -> list[str]:
        """The list that travels as ErrorDescription and as a task's error_info."""
        return [self.code, *self.params]


class DropConnection(Exception):
    """An injected fault: the connection of the caller ends here without another byte."""
