"""What a test or the demo may do to the pool that no client can: a unix socket, one JSON object a line each way.

A request is ``{"op": name, …}``, the answer ``{"ok": true, "result": …}`` or ``{"ok": false, "error": …}``.
Anybody who may open the socket may do everything. One thread per connection.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import socket
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from . import rpc
from .faults import Fault

if TYPE_CHECKING:
    from collections.abc import Callable

    from .context import World
    from .schema import Ref, Value

    Request = dict[str, Any]

_STEP: Final = 4 << 20


class ControlServer:
    """Serves the control socket until ``close``."""

    def __init__(self, world: World, path: Path) -> None:
        self._world = world
        self.path = path
        path.unlink(missing_ok=True)
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.bind(str(path))
        self._socket.listen()

    def start(self) -> None:
        """Accept in a thread."""
        threading.Thread(target=self._accept, name="control", daemon=True).start()

    def close(self) -> None:
        """Accept no more."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        self.path.unlink(missing_ok=True)

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(connection,), name="control", daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with contextlib.suppress(OSError), connection, connection.makefile("rwb") as lines:
            for line in lines:
                lines.write(json.dumps(self._answer(line)).encode() + b"\n")
                lines.flush()

    def _answer(self, line: bytes) -> dict[str, object]:
        try:
            request = json.loads(line)
            result = OPERATIONS[request.pop("op")](self._world, request)
        except Exception as exc:  # noqa: BLE001 - a test sees the error, the simulator goes on
            return {"ok": False, "error": f"{type(exc).__name__}: {exc}"}
        return {"ok": True, "result": result}


def _fault(world: World, request: Request) -> object:
    return world.faults.add(Fault(**(request | {"params": tuple(request.get("params", ()))})))


def _clear(world: World, request: Request) -> None:
    world.faults.clear(request.get("number"))


def _wait_fault(world: World, request: Request) -> object:
    return world.faults.wait_hit(request["number"], request.get("hits", 1), request["timeout_s"])


def _advance(world: World, request: Request) -> None:
    world.clock.advance(float(request["seconds"]))


def _expire_sessions(world: World, request: Request) -> None:
    world.sessions.end_all()


def _crash_host(world: World, request: Request) -> None:
    """Power loss of one host: its VMs are halted without a goodbye, logs of their disks stay open."""
    host = _host(world, request["host"])
    db = world.db
    world.storage.crash_host(host)
    with db.lock:
        for vm in db.refs(host, "resident_VMs"):
            if db.flag(vm, "is_control_domain"):
                continue
            for part in (*db.refs(vm, "VBDs"), *db.refs(vm, "VIFs")):
                db.set(part, currently_attached=False)
            db.set(vm, power_state="Halted", resident_on="OpaqueRef:NULL", domid=-1)


def _set_master(world: World, request: Request) -> None:
    """Another host becomes master; the old one answers HOST_IS_SLAVE from now on."""
    world.db.set(world.pool, master=_host(world, request["host"]))


def _offline(world: World, request: Request) -> None:
    """A host that cannot be reached (or, with ``value`` false, can be again); its VMs run on."""
    host = _host(world, request["host"])
    world.nodes[host].offline = request.get("value", True)
    world.db.set(world.db.text(host, "metrics"), live=not world.nodes[host].offline)


def _guest_write(world: World, request: Request) -> None:
    vdi = world.db.by_uuid("VDI", request["vdi"])
    world.storage.guest_write(vdi, request["offset"], base64.b64decode(request["data"]))


def _guest_write_file(world: World, request: Request) -> None:
    """Copy extents ``[[offset, length], …]`` of a file to the same places of a VDI (default: the whole file)."""
    vdi = world.db.by_uuid("VDI", request["vdi"])
    path = Path(request["path"])
    extents = request.get("extents") or [[0, path.stat().st_size]]
    with path.open("rb", buffering=0) as file:
        for offset, length in extents:
            for start in range(offset, offset + length, _STEP):
                data = os.pread(file.fileno(), min(_STEP, offset + length - start), start)
                world.storage.guest_write(vdi, start, data)


def _read(world: World, request: Request) -> object:
    vdi = world.db.by_uuid("VDI", request["vdi"])
    return base64.b64encode(world.storage.read(vdi, request["offset"], request["length"])).decode()


def _read_file(world: World, request: Request) -> None:
    """Write the bytes of a VDI into a file, sparsely."""
    vdi = world.db.by_uuid("VDI", request["vdi"])
    size = world.db.number(vdi, "virtual_size")
    with Path(request["path"]).open("wb") as file:
        for start in range(0, size, _STEP):
            data = world.storage.read(vdi, start, min(_STEP, size - start))
            if data.count(0) != len(data):
                os.pwrite(file.fileno(), data, start)
        file.truncate(size)


def _coalesce(world: World, request: Request) -> None:
    world.storage.coalesce()


def _call(world: World, request: Request) -> object:
    """Any call, as the pool itself: references of objects may be given as ``uuid:CLASS:UUID``."""
    arguments = [_resolve(world, argument) for argument in request.get("args", [])]
    return rpc.jsonable(world.internal().invoke(request["method"], *arguments))


def _set(world: World, request: Request) -> None:
    """Change fields of an object that no call may change."""
    world.db.set(world.db.by_uuid(request["cls"], request["uuid"]), **request["fields"])


def _screen(world: World, request: Request) -> None:
    """Who draws the screen of a VM, or of all others: the unix socket of an RFB server."""
    world.screens[request.get("vm", "")] = request["path"]


def _guest_agent(world: World, request: Request) -> None:
    """What the agent of a guest tells of its system."""
    db = world.db
    with db.lock:
        vm = db.by_uuid("VM", request["vm"])
        if not db.exists(db.text(vm, "guest_metrics")):
            db.set(vm, guest_metrics=db.create("VM_guest_metrics"))
        os_version = request.get("os_version", {"name": "Debian GNU/Linux 12"})
        db.set(db.text(vm, "guest_metrics"), live=True, os_version=os_version, last_updated=world.clock.now())


def _guest_ends(world: World, request: Request) -> None:
    """The guest of a VM switches itself off; or begins ``again``, in another domain."""
    vm = world.db.by_uuid("VM", request["vm"])
    if request.get("again"):
        world.db.set(vm, domid=world.db.number(vm, "domid") + 1)
    else:
        world.internal().invoke("VM.hard_shutdown", vm)


def _journal(world: World, request: Request) -> object:
    """The calls and transfers that have ended, oldest first, from number ``since`` on."""
    return [done._asdict() for done in list(world.journal)[request.get("since", 0) :]]


def _dump(world: World, request: Request) -> object:
    """What could have been left behind: records by class, references replaced by uuids."""
    db = world.db
    with db.lock:
        found: dict[str, list[object]] = {}
        for cls in request.get(
            "classes", ("VM", "VDI", "VBD", "VIF", "VTPM", "SR", "PBD", "network", "task", "message")
        ):
            found[cls] = [_named(world, ref) for ref in db.all(cls)]
        return found


def _named(world: World, ref: Ref) -> dict[str, object]:
    def plain(value: Value) -> object:
        value = rpc.jsonable(value)  # type: ignore[assignment]
        if isinstance(value, str) and value.startswith("OpaqueRef:"):
            return world.db.text(value, "uuid") if world.db.exists(value) else ""
        if isinstance(value, list):
            return [plain(item) for item in value]
        return {key: plain(item) for key, item in value.items()} if isinstance(value, dict) else value

    return {name: plain(value) for name, value in world.db.get(ref).items()}


def _resolve(world: World, argument: Value) -> Value:
    if isinstance(argument, str) and argument.startswith("uuid:"):
        _, cls, uuid = argument.split(":")
        return world.db.by_uuid(cls, uuid)
    return argument


def _host(world: World, name: str) -> Ref:
    return next(ref for ref, node in world.nodes.items() if node.name == name)


OPERATIONS: Final[dict[str, Callable[[World, Request], object]]] = {
    "fault": _fault,
    "clear": _clear,
    "wait_fault": _wait_fault,
    "advance": _advance,
    "expire_sessions": _expire_sessions,
    "crash_host": _crash_host,
    "set_master": _set_master,
    "offline": _offline,
    "guest_write": _guest_write,
    "guest_write_file": _guest_write_file,
    "read": _read,
    "read_file": _read_file,
    "coalesce": _coalesce,
    "call": _call,
    "set": _set,
    "screen": _screen,
    "guest_agent": _guest_agent,
    "guest_ends": _guest_ends,
    "journal": _journal,
    "dump": _dump,
}
