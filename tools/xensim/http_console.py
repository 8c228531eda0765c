"""CONNECT /console: the screen of a VM, as RFB (xen-api, console.ml). What draws it is whoever a test says."""

from __future__ import annotations

import contextlib
import socket
import threading
from typing import TYPE_CHECKING, Final

from .failures import Failure
from .routes import route

if TYPE_CHECKING:
    from .context import Context
    from .routes import HttpRequest
    from .schema import Ref

_STEP: Final = 1 << 16


@route("CONNECT", "/console", role="vm-operator")
def console(ctx: Context, request: HttpRequest) -> None:
    """Bytes both ways until one side has no more."""
    vm = _vm(ctx, request)
    db = ctx.db
    if db.text(vm, "power_state") != "Running" or db.text(vm, "resident_on") != ctx.host:
        raise Failure("INTERNAL_ERROR", "Console.Failure")
    path = ctx.world.screens.get(db.text(vm, "uuid")) or ctx.world.screens.get("")
    if path is None:
        request.respond(404)
        return
    request.respond(200)  # before anything is known of who draws
    with socket.socket(socket.AF_UNIX) as screen, contextlib.suppress(OSError):
        screen.connect(path)
        threading.Thread(target=_typed, args=(request, screen), daemon=True).start()
        while piece := screen.recv(_STEP):
            request.connection.sendall(piece)


def _typed(request: HttpRequest, screen: socket.socket) -> None:
    """What the client sends."""
    with contextlib.suppress(OSError, ValueError):
        while piece := request.rfile.read1(_STEP):  # type: ignore[attr-defined]
            screen.sendall(piece)
    with contextlib.suppress(OSError):
        screen.shutdown(socket.SHUT_RDWR)


def _vm(ctx: Context, request: HttpRequest) -> Ref:
    """Of a request that names a console, or a VM."""
    db, query = ctx.db, request.query
    ref = query.get("ref", "")
    if "uuid" in query:
        found = db.where("VM", uuid=query["uuid"]) or db.where("console", uuid=query["uuid"])
        ref = next(iter(found), "")
    if not db.exists(ref):
        raise Failure("INTERNAL_ERROR", "Console.Failure")
    return db.text(ref, "VM") if db.cls(ref) == "console" else ref
