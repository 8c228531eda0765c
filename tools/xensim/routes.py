"""The HTTP handlers beside the calls: registry, and the request they get. A request belongs to one thread."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final
from urllib.parse import urlencode

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Mapping
    from typing import BinaryIO

    from .context import Context, World
    from .schema import Ref
    from .tasks import Task

    Handler = Callable[[Context, "HttpRequest"], None]

_ROUTES: dict[tuple[str, str], tuple[str, Handler]] = {}

REASONS: Final = {
    200: "OK",
    302: "Found",
    401: "Unauthorised",
    403: "Forbidden",
    404: "Not Found",
    500: "Internal Error",
}


@dataclass(slots=True)
class HttpRequest:
    """A request as a handler sees it. The connection closes when the handler returns.

    The caller's session has been checked. If the query has a ``task_id``, ``ctx.task`` is that task: a handler that
    returns has completed it (with ``result``) unless it redirected the caller, one that raises Failure has failed it;
    if nothing has been sent by then, the failure is also sent as a status 500.
    """

    world: World
    method: str
    path: str
    query: Mapping[str, str]
    headers: Mapping[str, str]  # names in lower case
    rfile: BinaryIO  # buffered, of the body and nothing else only if Content-Length is respected
    connection: socket.socket
    task: Task | None = None
    result: str = ""
    sent: bool = False
    redirected: bool = False
    more: dict[str, str] = field(default_factory=dict)

    @property
    def length(self) -> int | None:
        """Content-Length, or None."""
        text = self.headers.get("content-length", "")
        return int(text) if text.isdigit() else None

    def send(self, data: bytes | memoryview) -> None:
        """Raw bytes."""
        self.sent = True
        self.connection.sendall(data)

    def respond(self, status: int, headers: Mapping[str, str] | None = None, body: bytes = b"") -> None:
        """Status line, headers (always ``Connection: close``) and a body."""
        lines = [
            f"HTTP/1.1 {status} {REASONS.get(status, 'Status')}",
            "Connection: close",
            "Cache-Control: no-cache, no-store",
        ]
        lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
        self.send("\r\n".join([*lines, "", ""]).encode() + body)

    def redirect(self, host: Ref) -> None:
        """302 to the same request at another host of the pool."""
        node = self.world.nodes[host]
        location = f"https://{node.address}:{node.port}{self.path}?{urlencode(self.query)}"
        self.redirected = True
        self.respond(302, {"Location": location, "Content-Length": "0"})


def route(method: str, path: str, *, role: str) -> Callable[[Handler], Handler]:
    """Register the handler of ``GET``/``PUT`` on a path; ``role`` is the least that may use it."""

    def register(handler: Handler) -> Handler:
        _ROUTES[method, path] = (role, handler)
        return handler

    return register


def find(method: str, path: str) -> tuple[str, Handler] | None:
    """Role and handler, or None."""
    return _ROUTES.get((method, path))
