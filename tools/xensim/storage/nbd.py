"""The NBD servers of the hosts, as poor as the real one (xapi-nbd and the OCaml nbd library).

Fixed newstyle with EXPORT_NAME and nothing else; TLS exactly 1.2; one request at a time, in order; an error reply ends
the connection; what fails while an export is opened is a silent close. Each connection has a VBD of its own on dom0.
A thread per connection; ``NbdServers`` may be called from any thread.
"""

from __future__ import annotations

import contextlib
import errno
import socket
import ssl
import struct
import threading
from typing import TYPE_CHECKING, Final
from urllib.parse import parse_qs, urlsplit

from ..failures import DropConnection, Failure

if TYPE_CHECKING:
    from ..context import HostNode, World
    from ..schema import Ref
    from .manager import StorageManager

CONNECTIONS_MOST: Final = 16
"""Per host, of all clients together (xapi-nbd consts.ml)."""
LINGER_S: Final = 5.0
"""Simulated seconds that unplugging the VBD of a client that left takes."""
SERVED_BYTES: Final = 512 * 1024
SECTOR: Final = 512

# NBD protocol, doc/proto.md.
_GREETING: Final = b"NBDMAGICIHAVEOPT"
_OPTION: Final = struct.Struct(">8sII")
_OPTION_REPLY: Final = struct.Struct(">QIII")
_OPTION_REPLY_MAGIC: Final = 0x3E889045565A9
_REQUEST: Final = struct.Struct(">IIQQI")  # flags are read as part of the type, so any flag makes an unknown command
_REPLY: Final = struct.Struct(">IIQ")
_REQUEST_MAGIC: Final = 0x25609513
_REPLY_MAGIC: Final = 0x67446698
_FIXED_NEWSTYLE: Final = 1
_EXPORT_NAME: Final = 1
_ABORT: Final = 2
_LIST: Final = 3
_STARTTLS: Final = 5
_ACK: Final = 1
_UNSUPPORTED: Final = 1 << 31 | 1
_POLICY: Final = 1 << 31 | 2
_INVALID: Final = 1 << 31 | 3
_TLS_REQUIRED: Final = 1 << 31 | 5
_HAS_FLAGS_READ_ONLY: Final = 3
_READ: Final = 0
_WRITE: Final = 1
_DISCONNECT: Final = 2
_OPTION_BYTES_MOST: Final = 1 << 16


class Closed(Exception):
    """The connection ends without another byte."""


class NbdServers:
    """A listener per host, all on one port number."""

    def __init__(self, world: World, storage: StorageManager) -> None:
        self._world = world
        self._storage = storage
        self._listeners: list[socket.socket] = []
        self._lock = threading.Lock()
        self._open: dict[Ref, int] = {}
        self.port = 0

    def start(self) -> None:
        """Listen on the address of every host (IPv4 only, as the real one)."""
        nodes = list(self._world.nodes.values())
        for _ in range(20):
            with contextlib.suppress(OSError):
                for node in nodes:
                    self._listeners.append(socket.create_server((node.address, self.port), backlog=64))
                    self.port = self._listeners[0].getsockname()[1]
                break
            self.close()
        else:
            raise OSError(errno.EADDRINUSE, "no port is free at every address of the pool")
        for node, listener in zip(nodes, self._listeners, strict=True):
            threading.Thread(target=self._accept, args=(node, listener), name="nbd accept", daemon=True).start()

    def close(self) -> None:
        """Accept no more."""
        for listener in self._listeners:
            with contextlib.suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)
            listener.close()
        self._listeners.clear()
        self.port = 0

    def _accept(self, node: HostNode, listener: socket.socket) -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(node, connection), name="nbd", daemon=True).start()

    def _serve(self, node: HostNode, connection: socket.socket) -> None:
        with self._lock:
            admitted = self._open.get(node.ref, 0) < CONNECTIONS_MOST
            self._open[node.ref] = self._open.get(node.ref, 0) + admitted
        if not admitted:
            connection.close()
            return
        try:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            _Connection(self._world, self._storage, node, connection).run()
        except (Closed, DropConnection, OSError, Failure, ValueError):
            connection.close()
        finally:
            with self._lock:
                self._open[node.ref] -= 1


class _Connection:
    """One client. Always closes the socket, and cleans up its VBD afterwards."""

    def __init__(self, world: World, storage: StorageManager, node: HostNode, connection: socket.socket) -> None:
        self._world = world
        self._storage = storage
        self._node = node
        self._socket = connection
        self._tls = False

    def run(self) -> None:
        """Negotiate, then serve until the client leaves or an error ends it."""
        try:
            export = self._negotiate()
            vbd = self._attach(export)
        except BaseException:
            self._socket.close()
            raise
        try:
            self._export(export)
        finally:
            self._socket.close()
            self._world.clock.sleep(LINGER_S)
            with contextlib.suppress(Failure):
                self._detach(vbd)

    def _negotiate(self) -> tuple[Ref, Ref]:
        """Session and VDI of the export the client asked for."""
        purposes = {item for net in self._world.db.all("network") for item in self._world.db.refs(net, "purpose")}
        purposes &= {"nbd", "insecure_nbd"}
        if len(purposes) != 1:
            raise Closed
        must_encrypt = "nbd" in purposes
        self._socket.sendall(_GREETING + struct.pack(">H", _FIXED_NEWSTYLE))
        (flags,) = struct.unpack(">I", self._take(4))
        if must_encrypt and not flags & _FIXED_NEWSTYLE:
            raise Closed
        while True:
            magic, option, length = _OPTION.unpack(self._take(_OPTION.size))
            if magic != _GREETING[8:] or length > _OPTION_BYTES_MOST:
                raise Closed
            data = self._take(length)
            if must_encrypt and not self._tls:
                self._before_tls(option)
            elif option == _EXPORT_NAME:
                return self._named(data)
            elif option == _ABORT:
                self._answer(option, _ACK)
                raise Closed
            else:
                refusals = {_LIST: _POLICY, _STARTTLS: _INVALID if self._tls else _POLICY}
                self._answer(option, refusals.get(option, _UNSUPPORTED))

    def _before_tls(self, option: int) -> None:
        if option in (_EXPORT_NAME, _ABORT):
            raise Closed
        if option != _STARTTLS:
            self._answer(option, _TLS_REQUIRED)
            return
        self._answer(option, _ACK)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_2
        context.load_cert_chain(self._node.certificate_file)
        self._socket = context.wrap_socket(self._socket, server_side=True)
        self._tls = True

    def _answer(self, option: int, kind: int) -> None:
        self._socket.sendall(_OPTION_REPLY.pack(_OPTION_REPLY_MAGIC, option, kind, 0))

    def _named(self, name: bytes) -> tuple[Ref, Ref]:
        split = urlsplit(name.decode("utf-8", "replace"))
        session = parse_qs(split.query).get("session_id", [""])[0]
        self._world.enter(session, self._node.ref)
        return session, self._world.db.by_uuid("VDI", split.path.removeprefix("/"))

    def _attach(self, export: tuple[Ref, Ref]) -> Ref:
        """A VBD on dom0, made with the session of the client."""
        session, vdi = export
        ctx = self._world.enter(session, self._node.ref)
        fault = self._world.faults.take("NBD.open", vdi)
        if fault:
            fault.before(self._world.clock)
            raise Closed
        (dom0,) = self._world.db.where("VM", is_control_domain=True, resident_on=self._node.ref)
        vbd = ctx.ref(
            "VBD.create",
            {
                "VM": dom0,
                "VDI": vdi,
                "userdevice": "autodetect",
                "bootable": False,
                "mode": "RO",
                "type": "Disk",
                "unpluggable": True,
                "empty": False,
                "other_config": {"xapi-nbd": "true"},
                "qos_algorithm_type": "",
                "qos_algorithm_params": {},
            },
        )
        try:
            ctx.invoke("VBD.plug", vbd)
        except Failure:
            self._world.db.destroy(vbd)
            raise
        return vbd

    def _detach(self, vbd: Ref) -> None:
        ctx = self._world.internal(self._node.ref)
        with contextlib.suppress(Failure):
            ctx.invoke("VBD.unplug_force", vbd)
        ctx.invoke("VBD.destroy", vbd)

    def _export(self, export: tuple[Ref, Ref]) -> None:
        vdi = export[1]
        uuid, size_bytes = self._world.db.text(vdi, "uuid"), self._world.db.number(vdi, "virtual_size")
        self._socket.sendall(struct.pack(">QH124x", size_bytes, _HAS_FLAGS_READ_ONLY))
        buffer = memoryview(bytearray(SERVED_BYTES))
        while True:
            magic, command, handle, offset, length = _REQUEST.unpack(self._take(_REQUEST.size))
            if magic != _REQUEST_MAGIC or command == _DISCONNECT:
                return
            error = self._refusal(vdi, command, offset, length)
            self._socket.sendall(_REPLY.pack(_REPLY_MAGIC, error, handle))
            if error or offset + length > size_bytes:
                return
            self._send(vdi, uuid, offset, length, buffer)

    def _refusal(self, vdi: Ref, command: int, offset: int, length: int) -> int:
        """The error number of the reply, 0 for none."""
        fault = self._world.faults.take("NBD.request", vdi)
        if fault and fault.effect == "error":
            return errno.EIO
        if fault:
            fault.before(self._world.clock)
        if command == _WRITE:
            return errno.EPERM
        if command != _READ or offset % SECTOR or length % SECTOR:
            return errno.EINVAL
        return 0

    def _send(self, vdi: Ref, uuid: str, offset: int, length: int, buffer: memoryview) -> None:
        fault = self._world.faults.take("NBD.payload", vdi)
        for start in range(offset, offset + length, SERVED_BYTES):
            piece = buffer[: min(SERVED_BYTES, offset + length - start)]
            self._storage.store.read_into(uuid, start, piece)
            if fault and fault.effect == "truncate":
                self._socket.sendall(piece[: len(piece) // 2])
                raise Closed
            if fault and fault.effect == "corrupt":
                piece[0] ^= 0xFF
            self._socket.sendall(piece)

    def _take(self, size: int) -> bytes:
        data = bytearray(size)
        view = memoryview(data)
        while view:
            count = self._socket.recv_into(view)
            if count == 0:
                raise Closed
            view = view[count:]
        return bytes(data)
