"""A host that answers as a test tells it to: real TLS with a certificate of its own, and every way to misbehave.

Not a simulator (that is tools/xensim): nothing here knows what XAPI means. A test sets ``methods`` (XML-RPC) and
``routes`` (HTTP paths); what came in is in ``calls`` and ``received``.
"""

from __future__ import annotations

import datetime
import hashlib
import socket
import ssl
import threading
import xmlrpc.client
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import parse_qsl, urlsplit

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from xbfs_engine.source.xapi.config import Address, Credentials, PoolConfig

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

PASSWORD = "s3cret-Passw0rd"
SESSION = "OpaqueRef:5e551011-0000-4000-8000-000000000001"
SECRETS = Credentials("root", PASSWORD)
HOSTS = ("127.0.0.1", "127.0.0.2")


class Failure(Exception):
    """XAPI's refusal."""

    def __init__(self, *description: str) -> None:
        self.description = list(description)


class Raw(NamedTuple):
    """An answer to an XML-RPC call that is sent as it is; the connection is closed after it."""

    data: bytes


@dataclass
class Request:
    """What came in."""

    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]
    rest: bytes
    connection: ssl.SSLSocket

    def send(self, data: bytes) -> None:
        self.connection.sendall(data)

    def body(self, length: int) -> bytes:
        """Exactly ``length`` bytes of the body, or fewer if the client stopped."""
        found = self.rest
        while len(found) < length:
            piece = self.connection.recv(65536)
            if not piece:
                break
            found += piece
        self.rest = found[length:]
        return found[:length]


@dataclass
class FakeHost:
    """One host. ``calls``: method and arguments; ``received``: paths of HTTP requests; ``bytes_in`` of all kinds."""

    address: Address
    fingerprint: str
    methods: dict[str, Callable[..., object]] = field(default_factory=dict)
    routes: dict[str, Callable[[Request], None]] = field(default_factory=dict)
    calls: list[tuple[str, tuple[Any, ...]]] = field(default_factory=list)
    received: list[Request] = field(default_factory=list)
    connections: int = 0

    def named(self, method: str) -> list[tuple[Any, ...]]:
        return [arguments for name, arguments in self.calls if name == method]

    def serve(self, connection: ssl.SSLSocket) -> None:
        self.connections += 1
        rest = b""
        while True:
            while b"\r\n\r\n" not in rest:
                piece = connection.recv(65536)
                if not piece:
                    return
                rest += piece
            head, _, rest = rest.partition(b"\r\n\r\n")
            first, *lines = head.decode().split("\r\n")
            method, target, _ = first.split(" ")
            headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
            parts = urlsplit(target)
            request = Request(method, parts.path, dict(parse_qsl(parts.query)), headers, rest, connection)
            self.received.append(request)
            if method != "POST":
                self.routes[parts.path](request)
                return
            if not self._answer(request):
                return
            rest = request.rest

    def _answer(self, request: Request) -> bool:
        body = request.body(int(request.headers["content-length"]))
        arguments, method = xmlrpc.client.loads(body)
        self.calls.append((str(method), arguments))
        try:
            value = self.methods[str(method)](*arguments)
            if isinstance(value, Raw):
                request.send(value.data)
                return False
            answer: dict[str, object] = {"Status": "Success", "Value": value}
        except Failure as exc:
            answer = {"Status": "Failure", "ErrorDescription": exc.description}
        data = xmlrpc.client.dumps((answer,), methodresponse=True).encode()
        request.send(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(data) + data)
        return True


def http_200(data: bytes) -> bytes:
    return b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(data) + data


def refuse(*description: str) -> Callable[..., object]:
    """A method that always fails."""

    def method(*_: object) -> object:
        raise Failure(*description)

    return method


def once(first: Callable[..., object], then: Callable[..., object]) -> Callable[..., object]:
    """``first`` the first time, ``then`` ever after."""
    left = [first]

    def method(*arguments: object) -> object:
        return (left.pop() if left else then)(*arguments)

    return method


def login(*_: object) -> object:
    return SESSION


def make_certificate(directory: Path, name: str) -> tuple[Path, str]:
    """A file with key and certificate, and the certificate's fingerprint."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.UTC)  # noqa: TID251 - the real clock is what TLS looks at
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .sign(key, hashes.SHA256())
    )
    pem = certificate.public_bytes(serialization.Encoding.PEM)
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    path = directory / f"{name}.pem"
    path.write_bytes(private + pem)
    digest = hashlib.sha256(certificate.public_bytes(serialization.Encoding.DER)).hexdigest().upper()
    return path, ":".join(digest[at : at + 2] for at in range(0, 64, 2))


@contextmanager
def fake_hosts(directory: Path, count: int = 1) -> Iterator[list[FakeHost]]:
    """Hosts that listen on one port of several loopback addresses; each logs in and out by itself."""
    with ExitStack() as stack:
        port, hosts = 0, []
        for number in range(count):
            listener = stack.enter_context(socket.create_server((HOSTS[number], port)))
            port = listener.getsockname()[1]
            pem, fingerprint = make_certificate(directory, f"host{number}")
            host = FakeHost(Address(HOSTS[number], port), fingerprint)
            host.methods |= {"session.login_with_password": login, "session.logout": lambda _: ""}
            stack.enter_context(_listening(listener, pem, host))
            hosts.append(host)
        yield hosts


@contextmanager
def _listening(listener: socket.socket, pem: Path, host: FakeHost) -> Iterator[None]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pem)
    stop = threading.Event()
    threads: list[threading.Thread] = []
    open_ones: list[socket.socket] = []

    def serve(plain: socket.socket) -> None:
        with plain, suppress(OSError), context.wrap_socket(plain, server_side=True) as connection:
            open_ones.append(connection)
            host.serve(connection)

    def accept() -> None:
        while not stop.is_set():
            with suppress(TimeoutError):
                plain, _ = listener.accept()
                plain.settimeout(20)
                threads.append(threading.Thread(target=serve, args=(plain,), daemon=True))
                threads[-1].start()

    listener.settimeout(0.05)
    acceptor = threading.Thread(target=accept, daemon=True)
    acceptor.start()
    try:
        yield
    finally:
        stop.set()
        acceptor.join(5)
        for connection in open_ones:
            with suppress(OSError):
                socket.socket.shutdown(connection, socket.SHUT_RDWR)
        for thread in threads:
            thread.join(5)


def pool_config(*hosts: FakeHost, pinned: bool = True) -> PoolConfig:
    """A pool of which the first host is the one that is asked first."""
    pins = {host.address.host: host.fingerprint for host in hosts} if pinned else {}
    return PoolConfig("test", (hosts[0].address,), "root", pins, "xbfs/node")
