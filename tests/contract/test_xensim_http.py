"""Disks of the simulator over HTTPS: raw, VHD both ways with qemu-img as the other end, pieces, and what goes wrong."""

from __future__ import annotations

import http.client
import json
import os
import ssl
import struct
import subprocess
import time
from contextlib import suppress
from hashlib import shake_128
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode, urlsplit

import pytest

from tests.support.xensim import BACKUP_USER, MIB, XenSim, default_world, running_sim
from tests.support.xensim_client import Api, login

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from pathlib import Path

SIZE = 12 * MIB
CBT_BLOCK = 64 * 1024
IO_ERROR = ["VDI_IO_ERROR", "Device I/O errors"]


def noise(seed: str, size: int) -> bytes:
    return shake_128(seed.encode()).digest(size)


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("image") / "disk.raw"
    with path.open("wb") as file:
        file.write(noise("start", 5000))
        file.seek(5 * MIB)
        file.write(noise("middle", 2 * MIB))
        file.truncate(SIZE)
    return path


@pytest.fixture(scope="module")
def sim(tmp_path_factory: pytest.TempPathFactory, image: Path) -> Iterator[XenSim]:
    disks = [{"sr": "nfs", "image": str(image)}]
    srs = [
        {"name": "nfs", "type": "nfs"},
        {"name": "lvm", "type": "lvmoiscsi"},
        {"name": "beta only", "type": "ext", "hosts": ["beta"], "shared": False},
    ]
    running = {"name": "running", "power_state": "Running", "disks": [{"sr": "nfs", "size": 2 * MIB}]}
    world = default_world(vms=[{"name": "vm", "disks": disks}, running], users=[BACKUP_USER], srs=srs)
    with running_sim(world, tmp_path_factory.mktemp("sim"), time_scale=0.01) as started:
        started.fault("storage.gc", "fail", times=1 << 30)
        yield started


@pytest.fixture
def api(sim: XenSim) -> Iterator[Api]:
    session = login(sim)
    yield session
    session.logout()


class Transfer:
    """One request with a task of its own."""

    def __init__(self, sim: XenSim, api: Api, path: str, query: Mapping[str, str]) -> None:
        self._api = api
        self._host = sim.master
        self.task = str(api.task.create("transfer", ""))
        self.target = f"{path}?{urlencode({'session_id': api.ref, 'task_id': self.task, **query})}"

    def send(
        self, method: str, body: bytes | Iterable[bytes] | None = None, headers: Mapping[str, str] | None = None
    ) -> tuple[int, bytes, dict[str, str]]:
        context = ssl.create_default_context()
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        link = http.client.HTTPSConnection(self._host.address, self._host.port, timeout=20, context=context)
        try:
            link.request(method, self.target, body=body, headers=dict(headers or {}))
            response = link.getresponse()
            return response.status, response.read(), dict(response.getheaders())
        finally:
            link.close()

    def verdict(self) -> dict[str, Any]:
        """The task when it has ended."""
        until = time.monotonic() + 10
        while (record := self._api.task.get_record(self.task))["status"] == "pending":
            assert time.monotonic() < until
            time.sleep(0.01)
        return dict(record)


def export(sim: XenSim, api: Api, vdi: str, **query: str) -> bytes:
    transfer = Transfer(sim, api, "/export_raw_vdi", {"vdi": vdi, **query})
    status, body, headers = transfer.send("GET")
    assert (status, headers.get("Content-Length")) == (200, None)
    assert transfer.verdict()["status"] == "success"
    return body


def put(sim: XenSim, api: Api, vdi: str, body: bytes, **query: str) -> dict[str, Any]:
    """What the task says; a host that fails hangs up on the rest of the body."""
    transfer = Transfer(sim, api, "/import_raw_vdi", {"vdi": vdi, **query})
    with suppress(OSError):
        assert transfer.send("PUT", body)[0] == 200
    return transfer.verdict()


def create(api: Api, sr: str, size: int, **more: Any) -> str:
    (found,) = api.SR.get_by_name_label(sr)
    fixed = {"name_label": "x", "type": "user", "sharable": False, "read_only": False, "other_config": {}}
    return str(api.VDI.create({"SR": found, "virtual_size": str(size), **fixed, **more}))


def disk(sim: XenSim, api: Api) -> str:
    return str(api.VDI.get_by_uuid(sim.disks("vm")[0]))


def from_vhd(path: Path) -> bytes:
    """The content of a VHD as qemu-img reads it; creators it does not know need to be told where the size is."""
    options = {"driver": "vpc", "force_size_calc": "current_size", "file": {"driver": "file", "filename": str(path)}}
    target = path.with_suffix(".raw")
    subprocess.run(["qemu-img", "convert", "-O", "raw", f"json:{json.dumps(options)}", target], check=True, timeout=30)
    return target.read_bytes()


def to_vhd(path: Path) -> bytes:
    target = path.with_suffix(".vhd")
    command = ["qemu-img", "convert", "-f", "raw", "-O", "vpc", "-o", "subformat=dynamic,force_size=on", path, target]
    subprocess.run(command, check=True, timeout=30)
    return target.read_bytes()


def test_a_raw_export_is_the_disk(sim: XenSim, api: Api, image: Path) -> None:
    assert export(sim, api, disk(sim, api)) == image.read_bytes()
    assert export(sim, api, sim.disks("vm")[0], format="raw") == image.read_bytes()


def test_a_vhd_export_is_laid_out_as_by_a_host_and_qemu_reads_it(
    sim: XenSim, api: Api, image: Path, tmp_path: Path
) -> None:
    stream = export(sim, api, disk(sim, api), format="vhd")
    (tmp_path / "disk.vhd").write_bytes(stream)
    assert stream[:8] == b"conectix"
    assert stream[28:40] == b"caml\0\0\0\1\0\0\0\0"
    assert stream[:512] == stream[-512:]
    assert stream[512:520] == b"cxsparse"
    assert struct.unpack(">Q", stream[528:536]) == (2048,)
    assert stream[1536:2048] == bytes(512)
    bat = struct.unpack(">6I", stream[2048:2072])
    unused, pitch = 0xFFFFFFFF, 4097
    assert bat == (5, unused, 5 + pitch, 5 + 2 * pitch, unused, unused)
    assert len(stream) == 2560 + 3 * pitch * 512 + 512
    assert stream[2560:3072] == b"\xff" * 512
    assert from_vhd(tmp_path / "disk.vhd") == image.read_bytes()
    shown = subprocess.run(["vhdiinfo", tmp_path / "disk.vhd"], check=True, capture_output=True, text=True, timeout=30)
    assert "12 MiB" in shown.stdout


def test_a_differencing_export_holds_what_the_base_does_not(sim: XenSim, api: Api, tmp_path: Path) -> None:
    vdi = create(api, "nfs", SIZE)
    uuid = api.VDI.get_uuid(vdi)
    sim.guest_write(uuid, 0, noise("old", MIB))
    base = api.VDI.snapshot(vdi, {})
    sim.guest_write(uuid, 10 * MIB + 512, b"new")
    stream = export(sim, api, api.VDI.snapshot(vdi, {}), format="vhd", base=base)
    assert struct.unpack(">I", stream[60:64]) == (4,)
    assert stream[512 + 40 : 512 + 56] != bytes(16)
    assert [place != 0xFFFFFFFF for place in struct.unpack(">6I", stream[2048:2072])] == [False] * 5 + [True]
    copy = api.VDI.copy(base, api.VDI.get_SR(vdi))
    assert put(sim, api, copy, stream, format="vhd")["status"] == "success"
    assert sim.read(api.VDI.get_uuid(copy), 0, SIZE) == sim.read(uuid, 0, SIZE)


def test_imports_write_a_disk_and_are_tracked(sim: XenSim, api: Api, image: Path, tmp_path: Path) -> None:
    (tmp_path / "disk").write_bytes(image.read_bytes())
    stream = to_vhd(tmp_path / "disk")
    for body, query in ((image.read_bytes(), {}), (stream, {"format": "vhd"})):
        vdi = create(api, "nfs", SIZE)
        api.VDI.enable_cbt(vdi)
        before = api.VDI.snapshot(vdi, {})
        assert put(sim, api, vdi, body, **query)["status"] == "success"
        assert sim.read(api.VDI.get_uuid(vdi), 0, SIZE) == image.read_bytes()
        assert api.VDI.list_changed_blocks(before, vdi).rstrip("A=")


def test_pieces_patch_a_disk(sim: XenSim, api: Api) -> None:
    vdi = create(api, "nfs", SIZE)
    put(sim, api, vdi, noise("whole", SIZE))
    api.VDI.enable_cbt(vdi)
    before = api.VDI.snapshot(vdi, {})
    pieces = {3 * CBT_BLOCK: b"first" * 100, 7 * MIB + 1: noise("second", 2 * MIB)}
    body = b"".join(struct.pack("<QI", at, len(data)) + data for at, data in pieces.items()) + bytes(12)
    assert put(sim, api, vdi, body, chunked="true")["status"] == "success"
    expected = bytearray(noise("whole", SIZE))
    for at, data in pieces.items():
        expected[at : at + len(data)] = data
    assert sim.read(api.VDI.get_uuid(vdi), 0, SIZE) == expected
    after = api.VDI.snapshot(vdi, {})
    bits = sim.call("VDI.list_changed_blocks", before, after)
    assert bits == api.VDI.list_changed_blocks(before, after)


def test_an_import_into_an_sr_makes_the_disk(sim: XenSim, api: Api, image: Path) -> None:
    (sr,) = api.SR.get_by_name_label("nfs")
    transfer = Transfer(sim, api, "/import_raw_vdi", {"sr_id": sr, "format": "raw"})
    assert transfer.send("PUT", image.read_bytes())[0] == 200
    result = transfer.verdict()["result"]
    vdi = result.removeprefix("<value>").removesuffix("</value>")
    assert sim.read(api.VDI.get_uuid(vdi), 0, SIZE) == image.read_bytes()


@pytest.mark.parametrize("effect", ["close", "error_text"])
def test_an_export_says_200_and_fails_later(sim: XenSim, api: Api, image: Path, effect: str) -> None:
    number = sim.fault("export.body", effect, params=[str(MIB)])
    transfer = Transfer(sim, api, "/export_raw_vdi", {"vdi": disk(sim, api)})
    status, body, _ = transfer.send("GET")
    sim.clear(number)
    assert status == 200
    assert body[:MIB] == image.read_bytes()[:MIB]
    assert (body[MIB:].startswith(b"HTTP/1.1 500 ")) == (effect == "error_text")
    assert len(body) < MIB + 200
    verdict = transfer.verdict()
    assert (verdict["status"], verdict["error_info"]) == ("failure", IO_ERROR)


def test_metadata_and_unknown_formats_are_not_exported(sim: XenSim, api: Api) -> None:
    vdi = create(api, "nfs", SIZE)
    api.VDI.enable_cbt(vdi)
    snapshot = api.VDI.snapshot(vdi, {})
    assert Transfer(sim, api, "/export_raw_vdi", {"vdi": vdi, "format": "vmdk"}).send("GET")[0] == 404
    api.VDI.data_destroy(snapshot)
    transfer = Transfer(sim, api, "/export_raw_vdi", {"vdi": snapshot})
    assert transfer.send("GET")[:2] == (200, b"")
    assert transfer.verdict()["error_info"][0] == "VDI_INCOMPATIBLE_TYPE"


def test_a_host_that_does_not_see_the_sr_sends_the_caller_on(sim: XenSim, api: Api) -> None:
    vdi = create(api, "beta only", 2 * MIB)
    transfer = Transfer(sim, api, "/export_raw_vdi", {"vdi": vdi})
    status, _, headers = transfer.send("GET")
    beta = sim.hosts[1]
    assert status == 302
    assert urlsplit(headers["Location"]).netloc == f"{beta.address}:{beta.port}"
    assert sim.call("task.get_status", transfer.task) == "pending"
    transfer._host = beta
    assert transfer.send("GET")[:2] == (200, bytes(2 * MIB))
    assert transfer.verdict()["status"] == "success"


def test_imports_that_hosts_refuse(sim: XenSim, api: Api, image: Path, tmp_path: Path) -> None:
    vdi = create(api, "nfs", SIZE)
    chunked = Transfer(sim, api, "/import_raw_vdi", {"vdi": vdi})
    status, _, _ = chunked.send("PUT", iter([b"data"]), {"Transfer-Encoding": "chunked"})
    assert status == 403
    assert chunked.verdict()["status"] == "failure"
    raw = create(api, "lvm", SIZE, sm_config={"type": "raw"})
    (tmp_path / "disk").write_bytes(image.read_bytes())
    stream = to_vhd(tmp_path / "disk")
    used = api.VDI.get_by_uuid(sim.disks("running")[0])
    assert put(sim, api, used, bytes(2 * MIB))["error_info"][0] == "SR_BACKEND_FAILURE_46"
    assert put(sim, api, raw, stream, format="vhd")["error_info"] == IO_ERROR
    assert sim.read(api.VDI.get_uuid(raw), 0, SIZE) == bytes(SIZE)


def test_an_import_that_goes_wrong_shows_in_the_task_alone(sim: XenSim, api: Api, image: Path, tmp_path: Path) -> None:
    vdi = create(api, "nfs", SIZE)
    with (tmp_path / "disk").open("wb") as file:
        file.truncate(SIZE + 4 * MIB)
        os.pwrite(file.fileno(), b"behind the end", SIZE + 3 * MIB)
    too_large = to_vhd(tmp_path / "disk")
    body = image.read_bytes()
    number = sim.fault("import.body", "fail_late", params=[str(4 * MIB)])
    assert put(sim, api, vdi, body)["error_info"] == IO_ERROR
    sim.clear(number)
    broken = bytearray(too_large)
    broken[100] ^= 1
    for stream, query in ((too_large, {"format": "vhd"}), (broken, {"format": "vhd"}), (body + b"x", {})):
        assert put(sim, api, vdi, bytes(stream), **query)["error_info"] == IO_ERROR
    assert put(sim, api, vdi, struct.pack("<QI", SIZE, 3) + b"end", chunked="true")["error_info"] == IO_ERROR
