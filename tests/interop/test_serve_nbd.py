"""A session's disks by nbdkit, with QEMU, libnbd and fio as clients: TLS, flushes, trims, kills."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import trio

from tests.support.disks import CHUNK, MemoryDisk
from tests.support.export_lab import Exported, descendants, wait_until
from tests.support.nbd_certificates import identity
from tests.support.nbd_servers import needs_nbdkit
from xbfs.serve.certificates import make_certificates
from xbfs.serve.nbd import NbdExport, serve_nbd
from xbfs_engine.core.errors import ExportFailed
from xbfs_engine.core.runtime import SystemClock

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [
    needs_nbdkit,
    pytest.mark.skipif(os.geteuid() != 0 or not Path("/dev/fuse").exists(), reason="needs root and /dev/fuse"),
    pytest.mark.skipif(not (shutil.which("qemu-io") and shutil.which("nbdinfo")), reason="needs qemu-io and nbdinfo"),
]
needs_fio = pytest.mark.skipif(shutil.which("fio") is None, reason="fio is not installed")

SIZE = 8 << 20
CHUNKS = (0, 1, 7, 40, 127)
DISK = MemoryDisk.holding(SIZE, CHUNKS).read_at(0, SIZE)
NAME = "disk one.raw"
YEAR_NS = 365 * 86400 * 10**9


class At:
    """A clock that shows one time."""

    def __init__(self, now_ns: int) -> None:
        self._now_ns = now_ns

    def now_ns(self) -> int:
        return self._now_ns

    def monotonic_s(self) -> float:
        return 0.0


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Exported]:
    exported = Exported(tmp_path_factory.mktemp("nbd"), "nbd", "127.0.0.1")
    for key, name in enumerate((NAME, "two.raw", "three.raw", "four.raw")):
        exported.disk(name, str(key), SIZE, CHUNKS)
    with exported:
        yield exported


def run(*command: str, fails: bool = False) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode != 0) is fails, done.stdout + done.stderr
    return done.stderr if fails else done.stdout


def qemu_io(where: str | tuple[str, str], *commands: str) -> None:
    """``where``: a URI, or the options for QEMU."""
    opened = ["-f", "raw", where] if isinstance(where, str) else ["--object", where[0], "--image-opts", where[1]]
    run("qemu-io", *(word for command in commands for word in ("-c", command)), *opened)


def test_the_disk_is_the_same_by_both_ways(server: Exported, tmp_path: Path) -> None:
    for number, uri in enumerate((server.nbd.uri(NAME), server.nbd.local_uri(NAME))):
        copy = tmp_path / str(number)
        run("nbdcopy", uri, str(copy))
        assert copy.read_bytes() == DISK


def test_what_clients_may_do(server: Exported) -> None:
    for uri, security in ((server.nbd.uri(NAME), True), (server.nbd.local_uri(NAME), False)):
        told = json.loads(run("nbdinfo", "--json", uri))
        assert told["TLS"] is security
        assert told["structured"] is True
        (export,) = told["exports"]
        assert export["export-size"] == SIZE
        wanted = ("can_flush", "can_fua", "can_trim", "can_zero", "can_multi_conn", "can_df")
        assert [name for name in wanted if not export[name]] == []
        assert not export["is_read_only"]
        assert "base:allocation" in export["contexts"]


def test_block_status_tells_holes(server: Exported) -> None:
    pieces = json.loads(run("nbdinfo", "--map", "--json", server.nbd.local_uri("four.raw")))
    data = {piece["offset"]: piece["length"] for piece in pieces if piece["type"] == 0}
    assert data == {0: 2 * CHUNK, 7 * CHUNK: CHUNK, 40 * CHUNK: CHUNK, 127 * CHUNK: CHUNK}


def test_without_our_certificate_nobody_comes_in(server: Exported, tmp_path: Path) -> None:
    place = server.nbd
    address = f"127.0.0.1:{place.port}"
    ours = place.certificates
    assert ours is not None
    plain = run("nbdinfo", f"nbd://{address}/two.raw", fails=True)
    assert "opt_go" in plain
    without = tmp_path / "without"
    without.mkdir()
    shutil.copy(ours / "ca-cert.pem", without)
    run("nbdinfo", f"nbds://{address}/two.raw?tls-certificates={without}", fails=True)
    stranger = identity("localhost")
    for name, text in (("client-cert", stranger.certificate), ("client-key", stranger.key)):
        (without / f"{name}.pem").write_text(text)
    run("nbdinfo", f"nbds://{address}/two.raw?tls-certificates={without}", fails=True)
    other = make_certificates(tmp_path / "other", ["127.0.0.1"], SystemClock()).client
    shutil.copy(ours / "ca-cert.pem", other)
    run("nbdinfo", f"nbds://{address}/two.raw?tls-certificates={other}", fails=True)
    assert [path.stat().st_mode & 0o077 for path in (ours.parent, ours, *ours.iterdir())] == [0] * 5
    assert {path.name for path in ours.iterdir()} == {"ca-cert.pem", "client-cert.pem", "client-key.pem"}


def test_a_flush_and_a_write_with_fua_reach_the_overlay(server: Exported) -> None:
    for where in (server.nbd.local_uri("two.raw"), server.nbd.qemu("two.raw")):
        for command in ("write -f -P 5 64k 4k", "flush"):
            before = server.count("flush")
            qemu_io(where, "write -P 4 128k 4k", command)
            assert server.count("flush") > before


def test_a_trim_and_a_write_of_zeroes_reach_the_overlay(server: Exported) -> None:
    uri = server.nbd.local_uri("two.raw")
    qemu_io(uri, "write -P 9 1M 1M")
    before = server.count("discard"), server.count("write_zeroes")
    qemu_io(uri, "discard 1M 256k")
    assert server.count("discard") + server.count("write_zeroes") > sum(before)
    between = server.count("discard") + server.count("write_zeroes")
    qemu_io(uri, "write -z -u 1280k 256k")
    assert server.count("discard") + server.count("write_zeroes") > between
    qemu_io(uri, "read -P 0 1M 512k", "read -P 9 1536k 512k")
    pieces = json.loads(run("nbdinfo", "--map", "--json", uri))
    assert any(
        piece["type"] == 3 and piece["offset"] <= 1 << 20 < piece["offset"] + piece["length"] for piece in pieces
    )


def test_a_killed_nbdkit_is_back_at_its_place(server: Exported) -> None:
    assert server.server is not None
    place = server.nbd
    qemu_io(place.local_uri("three.raw"), "write -P 1 0 64k")
    old = descendants(server.server.pid, "nbdkit")
    assert len(old) == 2
    for pid in old:
        os.kill(pid, signal.SIGKILL)
    assert server.server is not None

    def is_back() -> bool:
        new = descendants(server.server.pid, "nbdkit") if server.server else []
        return len(new) == 2 and not set(new) & set(old)

    wait_until(is_back, "nbdkit does not come back")
    for uri in (place.local_uri("three.raw"), place.uri("three.raw")):
        wait_until(
            lambda uri=uri: not subprocess.run(["nbdinfo", uri], capture_output=True, check=False).returncode, uri
        )
    for where in (place.local_uri("three.raw"), place.qemu("three.raw")):
        qemu_io(where, "read -P 1 0 64k")


def test_after_a_kill_of_all_flushed_writes_are_there(server: Exported) -> None:
    assert server.server is not None
    place = server.nbd
    qemu_io(place.qemu("three.raw"), "write -P 2 128k 64k", "flush")
    old = descendants(server.server.pid, "nbdkit")
    server.stop(signal.SIGKILL)
    wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in old), "nbdkit outlives the live server")
    server.start()
    assert server.nbd == place
    qemu_io(place.qemu("three.raw"), "read -P 2 128k 64k")


@needs_fio
def test_fio_verifies(server: Exported, tmp_path: Path) -> None:
    uri = server.nbd.local_uri("four.raw")
    load = ["--ioengine=nbd", f"--uri={uri}", "--rw=randrw", "--bsrange=512-64k", "--blockalign=512", "--iodepth=8"]
    proof = ["--verify=crc32c", "--verify_fatal=1", "--do_verify=1", "--fsync=32", f"--size={SIZE}"]
    run("fio", "--name=proof", f"--aux-path={tmp_path}", "--randseed=7", *load, *proof)


def test_a_disk_written_by_tls_is_read_back_after_a_kill(server: Exported, tmp_path: Path) -> None:
    """fio's client can not be given certificates; nbdcopy writes with many requests on several connections."""
    data, copy = tmp_path / "data", tmp_path / "copy"
    data.write_bytes(DISK[::-1])
    run("nbdcopy", "--flush", str(data), server.nbd.uri("four.raw"))
    server.restart(signal.SIGKILL)
    run("nbdcopy", server.nbd.uri("four.raw"), str(copy))
    assert copy.read_bytes() == DISK[::-1]


def test_certificates_are_kept_until_they_run_out(tmp_path: Path) -> None:
    def made(names: list[str], now_ns: int) -> bytes:
        return (make_certificates(tmp_path, names, At(now_ns)).client / "client-cert.pem").read_bytes()

    begin = 2 * 10**18
    first = made(["a.lab", "10.0.0.1"], begin)
    assert made(["a.lab", "10.0.0.1"], begin + YEAR_NS - 10**9) == first
    other = made(["b.lab"], begin)
    assert other != first
    assert made(["b.lab"], begin + YEAR_NS + 10**9) != other
    (tmp_path / "server" / "server-key.pem").unlink()
    again = made(["b.lab"], begin)
    assert (tmp_path / "server" / "server-key.pem").exists()
    (tmp_path / "client" / "client-cert.pem").write_bytes(b"torn")
    assert made(["b.lab"], begin) not in (again, b"torn")


def refusal(export: NbdExport) -> ExportFailed:
    with pytest.raises(ExportFailed) as failed:
        trio.run(serve_nbd, export)
    return failed.value


def test_what_can_not_be_is_told(server: Exported, tmp_path: Path) -> None:
    taken = NbdExport(tmp_path, tmp_path / "a", port=server.nbd.port)
    assert "another program has that port" in refusal(taken).hint
    assert "an address of this machine" in refusal(NbdExport(tmp_path, tmp_path / "b", address="192.0.2.1")).hint
    assert "too long" in str(refusal(NbdExport(tmp_path, tmp_path / ("x" * 100))))
