"""Disks that the kernel has the files of, exported: nfs-ganesha and nbdkit read and write them as any."""

from __future__ import annotations

import os
import subprocess
from typing import TYPE_CHECKING

import pytest

from tests.support.disks import CHUNK, MemoryDisk
from tests.support.export_lab import Exported
from tests.support.live_mounts import SESSION
from tests.support.nfs_network import needs_ganesha, needs_libnfs, private_network
from tools.xensim.storage.nfs_client import NfsClient

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="the kernel takes files from root only"),
    pytest.mark.skipif(
        tuple(map(int, os.uname().release.split(".")[:2])) < (6, 9), reason="the kernel does not know it before 6.9"
    ),
]

SIZE = 8 << 20
CHUNKS = (0, 1, 7, 40, 127)
DISK = MemoryDisk.holding(SIZE, CHUNKS).read_at(0, SIZE)
PORT, MOUNT_PORT = 20492, 20493


def exported(folder: Path, kind: str, address: str, *more: str) -> Exported:
    made = Exported(folder, kind, address, *more)
    made.disk("disk.raw", "0", SIZE, CHUNKS)
    (made.control / "passes").touch()
    return made


def data_of(server: Exported) -> bytes:
    return (server.state / SESSION / "overlays/0/data").read_bytes()


def assert_passed(server: Exported) -> None:
    fd = os.open(server.directory / "disk.raw", os.O_RDONLY)
    try:
        with server.asleep():
            assert os.pread(fd, SIZE, 0) == data_of(server)
    finally:
        os.close(fd)


@needs_ganesha
@needs_libnfs
@pytest.mark.parametrize("version", [3, 4])
def test_by_nfs(tmp_path: Path, version: int) -> None:
    with private_network() as address:
        server = exported(tmp_path, "nfs", address, str(PORT), str(MOUNT_PORT), f"{address}/32")
        with server:
            port = PORT if version == 4 else 0
            with (
                NfsClient(address, server.nfs.path(SESSION), version=version, port=port) as client,
                client.open("/disk.raw") as disk,
            ):
                assert b"".join(disk.read(at, CHUNK) for at in range(0, SIZE, CHUNK)) == DISK
                disk.write(3 * CHUNK + 512, b"w" * 5000)
                before = server.count("flush")
                disk.sync()
                assert server.count("flush") > before
                assert disk.read(3 * CHUNK, CHUNK) == data_of(server)[3 * CHUNK : 4 * CHUNK]
                assert data_of(server)[3 * CHUNK + 512 :][:5000] == b"w" * 5000
                assert_passed(server)


def test_by_nbd(tmp_path: Path) -> None:
    with exported(tmp_path, "nbd", "127.0.0.1") as server:
        uri = server.nbd.local_uri("disk.raw")
        command = ["qemu-io", "-f", "raw", "-c", "write -P 0x57 8192 4096", "-c", "discard 65536 65536", "-c", "flush"]
        subprocess.run([*command, "-c", "read -P 0 65536 65536", uri], check=True, stdout=subprocess.DEVNULL)
        wanted = bytearray(DISK)
        wanted[8192:12288] = b"\x57" * 4096
        wanted[CHUNK : 2 * CHUNK] = bytes(CHUNK)
        assert data_of(server) == wanted
        out = tmp_path / "copy"
        subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", "raw", uri, out], check=True)
        assert out.read_bytes() == wanted
        with subprocess.Popen(
            ["qemu-io", "-f", "raw", uri], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL
        ) as holder:
            assert_passed(server)
            holder.kill()
