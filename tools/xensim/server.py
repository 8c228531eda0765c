"""The HTTPS listener of one host: XML-RPC and JSON-RPC calls, and the HTTP handlers. One thread per connection."""

from __future__ import annotations

import base64
import binascii
import contextlib
import http.client
import importlib
import pkgutil
import socket
import ssl
import threading
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Final, cast
from urllib.parse import parse_qsl, urlsplit

from . import calls, routes, rpc
from .context import Context, Done
from .failures import DropConnection, Failure
from .routes import HttpRequest

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import BinaryIO

    from .context import HostNode, World
    from .schema import Value
    from .tasks import Task

_HANDSHAKE_S: Final = 30.0
_MAX_LINE: Final = 1 << 16
_MAX_BODY: Final = 64 << 20
_BUFFER: Final = 1 << 18
_JSON_PATHS: Final = frozenset({"/jsonrpc", "/json"})
_RPC_PATHS: Final = frozenset({"/", "/RPC2"}) | _JSON_PATHS


class HostServer:
    """Serves one host until ``close``."""

    def __init__(self, world: World, node: HostNode) -> None:
        self._world = world
        self._node = node
        self._tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._tls.minimum_version = ssl.TLSVersion.TLSv1_2
        self._tls.load_cert_chain(node.certificate_file)
        self._socket = socket.create_server((node.address, node.port), backlog=128)
        node.port = self._socket.getsockname()[1]

    @property
    def port(self) -> int:
        """Where it listens."""
        return self._node.port

    def start(self) -> None:
        """Accept in a thread."""
        for module in pkgutil.iter_modules([str(Path(__file__).parent)]):
            if module.name.startswith("http_"):
                importlib.import_module(f".{module.name}", __package__)
        threading.Thread(target=self._accept, name=f"accept {self._node.name}", daemon=True).start()

    def close(self) -> None:
        """Accept no more; connections end with the process."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            threading.Thread(
                target=self._serve, args=(connection,), name=f"https {self._node.name}", daemon=True
            ).start()

    def _serve(self, plain: socket.socket) -> None:
        with contextlib.suppress(OSError, DropConnection), plain:
            plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            plain.settimeout(_HANDSHAKE_S)
            with self._tls.wrap_socket(plain, server_side=True, suppress_ragged_eofs=True) as connection:
                connection.settimeout(None)
                with cast("BinaryIO", connection.makefile("rb", buffering=_BUFFER)) as rfile:
                    while self._request(connection, rfile):
                        pass

    def _request(self, connection: socket.socket, rfile: BinaryIO) -> bool:
        """Answer one request; whether another may follow."""
        words = rfile.readline(_MAX_LINE).decode("latin-1").split()
        if len(words) != 3 or self._node.offline:
            return False
        method, target, version = words
        headers = {name.lower(): value for name, value in http.client.parse_headers(rfile).items()}
        split = urlsplit(target)
        request = HttpRequest(self._world, method, split.path, dict(parse_qsl(split.query)), headers, rfile, connection)
        if method == "POST" and split.path in _RPC_PATHS:
            return self._rpc(request) and version != "HTTP/1.0" and headers.get("connection", "").lower() != "close"
        self._handler(request)
        with contextlib.suppress(OSError):
            connection.shutdown(socket.SHUT_WR)
        return False

    def _rpc(self, request: HttpRequest) -> bool:
        length = request.length
        if length is None or length > _MAX_BODY:
            request.respond(500)
            return False
        body = request.rfile.read(length)
        if len(body) < length:
            return False
        as_json = request.path in _JSON_PATHS
        call = rpc.Request("json2" if as_json else "xml", "", [])
        try:
            call = rpc.parse_json(body) if as_json else rpc.parse_xml(body)
            answer = rpc.success(call, self._call(call))
        except Failure as failure:
            answer = rpc.failure(call, failure)
        kind = "application/json" if as_json else "text/xml"
        head = f"HTTP/1.1 200 OK\r\nContent-Type: {kind}\r\nContent-Length: {len(answer)}\r\n\r\n"
        request.connection.sendall(head.encode() + answer)
        return True

    def _call(self, call: rpc.Request) -> Value:
        world, host = self._world, self._node.ref
        if host != world.master:
            raise Failure("HOST_IS_SLAVE", world.nodes[world.master].address)
        name = call.method.removeprefix("Async.")
        found = calls.find(name)
        if found and not found.session:
            return self._journalled(Context(world, host, "root"), call.method, call.args, secret=True)
        if found is None and not call.args:
            raise Failure("MESSAGE_METHOD_UNKNOWN", call.method)
        session = call.args[0] if call.args else ""
        if not isinstance(session, str):
            raise Failure("SESSION_INVALID", str(session))
        ctx = world.enter(session, host)
        args = call.args[1:]
        if name != call.method:
            return self._journalled(ctx, call.method, args, asynchronous=True)
        return self._journalled(ctx, call.method, args)

    def _journalled(
        self, ctx: Context, method: str, args: Sequence[Value], *, asynchronous: bool = False, secret: bool = False
    ) -> Value:
        status = "Success"
        try:
            if asynchronous:
                return self._world.tasks.start(ctx, method.removeprefix("Async."), args)
            return calls.execute(ctx, method, args)
        except Failure as failure:
            status = failure.code
            raise
        except DropConnection:
            status = "dropped"
            raise
        finally:
            first = str(args[0]) if args and not secret else ""
            user, originator = (ctx.session.user, ctx.session.originator) if ctx.session else ("", "")
            self._world.journal.append(Done(method, first, user, originator, status))

    def _handler(self, request: HttpRequest) -> None:
        found = routes.find(request.method, request.path)
        if found is None:
            request.respond(404)
            return
        role, handler = found
        try:
            ctx, temporary = self._authenticate(request)
        except Failure:
            request.respond(401, {"WWW-Authenticate": 'Basic realm="XAPI"'})
            return
        try:
            ctx.require(role, f"http/{request.method.lower()}{request.path.replace('/', '_')}")
            task, own = self._task(ctx, request)
        except Failure as failure:
            request.respond(403 if failure.code == "RBAC_PERMISSION_DENIED" else 500, body=failure.code.encode())
            return
        request.task = task
        try:
            self._run(handler, replace(ctx, task=task), request, task)
        finally:
            if own:
                self._world.tasks.destroy(task.ref)
            if temporary and ctx.session:
                self._world.sessions.end(ctx.session.ref)

    def _run(self, handler: routes.Handler, ctx: Context, request: HttpRequest, task: Task) -> None:
        status = "Success"
        point = f"{request.method} {request.path}"
        fault = self._world.faults.take(point)
        try:
            if fault:
                fault.before(self._world.clock)
            handler(ctx, request)
            if fault:
                fault.after()
            if not request.redirected:  # the host that the caller is sent to completes it
                task.succeed(request.result)
        except Failure as failure:
            status = failure.code
            task.fail(failure)
            if not request.sent:
                request.respond(500, {"Content-Type": "text/html"}, " ".join(failure.description).encode())
        except (OSError, DropConnection) as exc:
            status = "dropped"
            task.fail(Failure("INTERNAL_ERROR", f"Unix.Unix_error(Unix.EPIPE, {type(exc).__name__})"))
            raise
        except Exception as exc:
            status = "INTERNAL_ERROR"
            task.fail(Failure("INTERNAL_ERROR", repr(exc)))
            raise
        finally:
            session = ctx.session
            user, originator = (session.user, session.originator) if session else ("", "")
            argument = request.query.get("vdi") or request.query.get("ref") or request.query.get("uuid") or ""
            self._world.journal.append(Done(point, argument, user, originator, status))

    def _authenticate(self, request: HttpRequest) -> tuple[Context, bool]:
        """The caller, and whether the session was made for this request alone. Raises Failure."""
        session = request.query.get("session_id", "")
        for part in request.headers.get("cookie", "").split(";"):
            name, _, value = part.strip().partition("=")
            session = session or (value if name == "session_id" else "")
        scheme, _, secret = request.headers.get("authorization", "").partition(" ")
        temporary = not session and scheme.lower() == "basic"
        if temporary:
            try:
                user, _, password = base64.b64decode(secret, validate=True).decode().partition(":")
            except (binascii.Error, UnicodeDecodeError) as exc:
                raise Failure("SESSION_AUTHENTICATION_FAILED", "", "bad header") from exc
            session = self._world.sessions.login(user, password, "")
        return self._world.enter(session, self._node.ref), temporary

    def _task(self, ctx: Context, request: HttpRequest) -> tuple[Task, bool]:
        """The task of the query, or one for this request alone. Raises Failure."""
        ref = request.query.get("task_id")
        if ref:
            return self._world.tasks.get(ref), False
        return self._world.tasks.create(ctx, f"{request.method} {request.path}"), True
