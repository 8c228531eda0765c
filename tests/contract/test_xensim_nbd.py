"""The simulator's NBD servers, asked by libnbd's tools and, for what those never ask, by hand."""

from __future__ import annotations

import hashlib
import socket
import ssl
import struct
import subprocess
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import pytest

from tests.support.xensim import BACKUP_USER, MIB, XenSim, default_world, running_sim
from tests.support.xensim_client import login

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

SIZE = 6 * MIB
STARTTLS, EXPORT_NAME, LIST, GO, STRUCTURED = 5, 1, 3, 7, 8
ERR_UNSUP, ERR_POLICY, ERR_INVALID, ERR_TLS_REQD = 0x80000001, 0x80000002, 0x80000003, 0x80000005
EPERM, EINVAL = 1, 22
ABORTED = (ConnectionError, ssl.SSLEOFError)


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("image") / "disk.raw"
    noise = hashlib.shake_128(b"disk").digest(4 * MIB - 4096)
    path.write_bytes(noise[: 3 * MIB] + bytes(2 * MIB) + noise[3 * MIB :])
    return path


@pytest.fixture(scope="module")
def sim(tmp_path_factory: pytest.TempPathFactory, image: Path) -> Iterator[XenSim]:
    disks = [{"sr": "nfs", "image": str(image)}]
    world = default_world(vms=[{"name": "vm", "disks": disks}], users=[BACKUP_USER])
    with running_sim(world, tmp_path_factory.mktemp("sim"), time_scale=0.01) as running:
        yield running


class Export:
    """One of the places where the disk can be read."""

    def __init__(self, sim: XenSim) -> None:
        self.api = login(sim)
        (self.vdi,) = sim.disks("vm")
        self.info: dict[str, Any] = self.api.VDI.get_nbd_info(self.api.VDI.get_by_uuid(self.vdi))[0]
        self.address = (self.info["address"], int(self.info["port"]))
        self.clients: list[Client] = []

    def close(self) -> None:
        for client in self.clients:
            client.socket.close()
        self.api.logout()

    def uri(self, scheme: str) -> str:
        name = quote(self.info["exportname"], safe="")
        return f"{scheme}://{self.address[0]}:{self.address[1]}/{name}"


@pytest.fixture
def export(sim: XenSim) -> Iterator[Export]:
    found = Export(sim)
    yield found
    found.close()
    wait_for_no_vbds(sim)


class Client:
    """The client's side of the protocol, a step at a time."""

    def __init__(self, export: Export, *, flags: int = 1) -> None:
        self.export = export
        self.socket: socket.socket = socket.create_connection(export.address, timeout=10)
        export.clients.append(self)
        self.greeting = self.take(18)
        self.socket.sendall(struct.pack(">I", flags))

    def take(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            piece = self.socket.recv(size - len(data))
            if not piece:
                raise ConnectionError(f"closed after {len(data)} bytes")
            data += piece
        return data

    def option(self, number: int, data: bytes = b"") -> None:
        self.socket.sendall(struct.pack(">8sII", b"IHAVEOPT", number, len(data)) + data)

    def answer(self, number: int, data: bytes = b"") -> int:
        self.option(number, data)
        magic, option, kind, length = struct.unpack(">QIII", self.take(20))
        assert (magic, option, length) == (0x3E889045565A9, number, 0)
        return int(kind)

    def start_tls(self, version: ssl.TLSVersion = ssl.TLSVersion.TLSv1_2) -> Client:
        assert self.answer(STARTTLS) == 1
        context = ssl.create_default_context(cadata=self.export.info["cert"])
        context.minimum_version = version
        self.socket = context.wrap_socket(self.socket, server_hostname=self.export.info["subject"])
        return self

    def open(self) -> int:
        self.option(EXPORT_NAME, self.export.info["exportname"].encode())
        size, flags = struct.unpack(">QH124x", self.take(134))
        assert flags == 3
        return int(size)

    def request(self, command: int, offset: int, length: int) -> int:
        self.socket.sendall(struct.pack(">IIQQI", 0x25609513, command, 77, offset, length))
        magic, error, handle = struct.unpack(">IIQ", self.take(16))
        assert (magic, handle) == (0x67446698, 77)
        return int(error)

    def ended(self) -> bool:
        try:
            return self.socket.recv(1) == b""
        except ABORTED:
            return True


@contextmanager
def opened(export: Export) -> Iterator[Client]:
    client = Client(export).start_tls()
    try:
        assert client.open() == SIZE
        yield client
    finally:
        client.socket.close()


def wait_for_no_vbds(sim: XenSim) -> None:
    until = time.monotonic() + 10
    while len(vbds(sim)) > 0:
        assert time.monotonic() < until
        time.sleep(0.02)


def vbds(sim: XenSim) -> list[dict[str, Any]]:
    """The VBDs of control domains."""
    found = sim.dump("VM", "VBD")
    dom0 = {vm["uuid"] for vm in found["VM"] if vm["is_control_domain"]}
    return [vbd for vbd in found["VBD"] if vbd["VM"] in dom0]


def padded(image: Path) -> bytes:
    return image.read_bytes().ljust(SIZE, b"\0")


def test_nbdcopy_reads_the_disk_over_tls(export: Export, image: Path, tmp_path: Path) -> None:
    (tmp_path / "pki").mkdir()
    (tmp_path / "pki" / "ca-cert.pem").write_text(export.info["cert"])
    uri = export.uri("nbds") + f"?tls-certificates={tmp_path / 'pki'}"
    subprocess.run(["nbdcopy", "--connections=2", uri, tmp_path / "copy"], check=True, timeout=30)
    assert (tmp_path / "copy").read_bytes() == padded(image)
    shown = subprocess.run(["nbdinfo", "--size", uri], check=True, capture_output=True, timeout=30, text=True)
    assert int(shown.stdout) == SIZE
    mapped = subprocess.run(["nbdinfo", "--map", uri], check=False, capture_output=True, timeout=30, text=True)
    assert mapped.returncode != 0, "a host tells nobody what is allocated"


def test_a_pool_without_tls_serves_in_the_clear_and_without_purpose_not_at_all(tmp_path: Path, image: Path) -> None:
    world = default_world(vms=[{"name": "vm", "disks": [{"sr": "nfs", "image": str(image)}]}], users=[BACKUP_USER])
    world["networks"][0]["purpose"] = ["insecure_nbd"]
    with running_sim(world, tmp_path / "sim", time_scale=0.01) as sim:
        export = Export(sim)
        subprocess.run(["nbdcopy", export.uri("nbd"), tmp_path / "copy"], check=True, timeout=30)
        assert (tmp_path / "copy").read_bytes() == padded(image)
        client = Client(export)
        assert client.answer(STARTTLS) == ERR_POLICY
        (network,) = [net["uuid"] for net in sim.dump("network")["network"] if net["purpose"]]
        sim.call("network.remove_purpose", f"uuid:network:{network}", "insecure_nbd")
        assert export.api.VDI.get_nbd_info(export.api.VDI.get_by_uuid(export.vdi)) == []
        with socket.create_connection(export.address, timeout=10) as plain:
            assert plain.recv(1) == b""
        export.close()
        wait_for_no_vbds(sim)


def test_the_greeting_offers_fixed_newstyle_alone_and_tls_is_a_must(export: Export) -> None:
    client = Client(export)
    assert client.greeting == b"NBDMAGICIHAVEOPT\x00\x01"
    assert [client.answer(option) for option in (LIST, GO, STRUCTURED)] == [ERR_TLS_REQD] * 3
    client.option(EXPORT_NAME, export.info["exportname"].encode())
    assert client.ended()
    old = Client(export, flags=0)
    assert old.ended()


def test_options_behind_tls_are_refused_and_tls_is_1_2(export: Export) -> None:
    client = Client(export).start_tls()
    assert isinstance(client.socket, ssl.SSLSocket)
    assert client.socket.version() == "TLSv1.2"
    assert [client.answer(option) for option in (STARTTLS, LIST, GO, STRUCTURED)] == [
        ERR_INVALID,
        ERR_POLICY,
        ERR_UNSUP,
        ERR_UNSUP,
    ]
    with pytest.raises((ssl.SSLError, ConnectionError)):
        Client(export).start_tls(ssl.TLSVersion.TLSv1_3)


def test_errors_end_the_connection(export: Export, image: Path) -> None:
    refused = [
        (1, 0, 512, EPERM),
        (3, 0, 0, EINVAL),
        (0, 1, 512, EINVAL),
        (0, 0, 100, EINVAL),
        (1 << 16, 0, 512, EINVAL),
    ]
    for command, offset, length, error in refused:
        with opened(export) as client:
            assert client.request(0, MIB, 4096) == 0
            assert client.take(4096) == padded(image)[MIB : MIB + 4096]
            assert client.request(command, offset, length) == error
            assert client.ended()
    with opened(export) as client:
        assert client.request(0, SIZE - 512, 1024) == 0
        assert client.ended()


def test_what_cannot_be_opened_is_closed_without_a_word(sim: XenSim, export: Export) -> None:
    client = Client(export).start_tls()
    export.info["exportname"] = export.info["exportname"].replace("session_id=OpaqueRef:", "session_id=OpaqueRef:0")
    with pytest.raises(ABORTED):
        client.open()
    export.info["exportname"] = export.info["exportname"].replace(export.vdi, export.vdi[::-1])
    with pytest.raises(ABORTED):
        Client(export).start_tls().open()
    assert vbds(sim) == []


def test_each_connection_has_a_vbd_and_outlives_its_session(sim: XenSim, export: Export) -> None:
    with opened(export) as client:
        (vbd,) = vbds(sim)
        assert (vbd["VDI"], vbd["mode"], vbd["currently_attached"]) == (export.vdi, "RO", True)
        sim.do("expire_sessions")
        assert client.request(0, 0, 512) == 0
        assert len(client.take(512)) == 512
        with pytest.raises(ABORTED):
            Client(export).start_tls().open()
    export.api.close()
    export.api = login(sim)


def test_a_host_has_sixteen_connections(sim: XenSim, export: Export) -> None:
    clients = []
    for _ in range(16):
        clients.append(Client(export).start_tls())
        clients[-1].open()
    assert sorted(int(vbd["userdevice"]) for vbd in vbds(sim)) == list(range(16))
    with pytest.raises(ConnectionError):
        Client(export)
    for client in clients:
        client.socket.close()


def test_a_disk_with_data_destroyed_cannot_be_read(sim: XenSim, export: Export) -> None:
    api = export.api
    vdi = api.VDI.get_by_uuid(export.vdi)
    api.VDI.enable_cbt(vdi)
    snapshot = api.VDI.snapshot(vdi, {})
    uuid = api.VDI.get_uuid(snapshot)
    export.info = api.VDI.get_nbd_info(snapshot)[0]
    with opened(export), pytest.raises(api.Failure, match="VDI_IN_USE"):
        api.VDI.data_destroy(snapshot)
    wait_for_no_vbds(sim)
    api.VDI.data_destroy(snapshot)
    with pytest.raises(api.Failure, match="VDI_INCOMPATIBLE_TYPE"):
        api.VDI.get_nbd_info(snapshot)
    with pytest.raises(ABORTED):
        Client(export).start_tls().open()
    api.VDI.destroy(api.VDI.get_by_uuid(uuid))


@pytest.mark.parametrize("effect", ["truncate", "corrupt"])
def test_faults_strike_the_payload(sim: XenSim, export: Export, image: Path, effect: str) -> None:
    number = sim.fault("NBD.payload", effect)
    with opened(export) as client:
        assert client.request(0, 0, MIB) == 0
        if effect == "truncate":
            with pytest.raises(ABORTED):
                client.take(MIB)
        else:
            assert client.take(MIB) != padded(image)[:MIB]
    sim.clear(number)


@pytest.mark.parametrize(("effect", "error"), [("drop", None), ("error", 5)])
def test_faults_strike_a_request(sim: XenSim, export: Export, effect: str, error: int | None) -> None:
    number = sim.fault("NBD.request", effect, nth=2)
    with opened(export) as client:
        assert client.request(0, 0, 512) == 0
        client.take(512)
        if error is None:
            with pytest.raises(ABORTED):
                client.request(0, 0, 512)
        else:
            assert client.request(0, 0, 512) == error
            assert client.ended()
    sim.clear(number)
    refused = sim.fault("NBD.open", "drop")
    with pytest.raises(ABORTED):
        Client(export).start_tls().open()
    sim.clear(refused)
