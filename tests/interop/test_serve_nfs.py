"""The live mount by nfs-ganesha, as a XenServer's storage manager and its guests use it; libnfs is the client."""

from __future__ import annotations

import os
import random  # noqa: TID251 - a reproducible load
import shutil
import signal
import subprocess
import time
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import UUID

import pytest
import trio

from tests.support.disks import CHUNK, MemoryDisk
from tests.support.export_lab import Exported, children, wait_until
from tests.support.live_mounts import SESSION
from tests.support.nfs_network import needs_ganesha, needs_libnfs, private_network
from tools.xensim.storage.nfs_client import NfsClient
from xbfs.instant.share import Share
from xbfs.serve.device import _file_system as file_system
from xbfs.serve.nfs import NfsExport, NfsPlace, change_clients, serve_nfs
from xbfs_engine.core.errors import ExportFailed

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [needs_ganesha, needs_libnfs]

SIZE = 8 << 20
CHUNKS = (0, 1, 7, 40, 127)
DISK = MemoryDisk.holding(SIZE, CHUNKS).read_at(0, SIZE)
PORT, MOUNT_PORT = 20490, 20491
NFS_TIMEOUT_S = 20
"""SR.other_config nfs-timeout: after that a soft mount gives guests I/O errors."""
FIRST, SECOND = (str(UUID(int=number)) for number in (1, 2))


@pytest.fixture(scope="module")
def network() -> Iterator[str]:
    with private_network() as address:
        yield address


@pytest.fixture(scope="module")
def server(network: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Exported]:
    exported = Exported(tmp_path_factory.mktemp("nfs"), "nfs", network, str(PORT), str(MOUNT_PORT), f"{network}/32")
    for number in range(4):
        exported.disk(f"disk{number}.raw", str(number), SIZE, CHUNKS)
    (exported.state.parent / "late").mkdir()
    with exported:
        yield exported


@pytest.fixture(params=[3, 4])
def client(server: Exported, request: pytest.FixtureRequest) -> Iterator[NfsClient]:
    with mount(server, version=request.param) as mounted:
        yield mounted


@pytest.fixture
def client3(server: Exported) -> Iterator[NfsClient]:
    """By the version that XenServer mounts by if it is not told another."""
    with mount(server) as mounted:
        yield mounted


def mount(server: Exported, session: str = SESSION, *, version: int = 3) -> NfsClient:
    return NfsClient(server.nfs.address, server.nfs.path(session), version=version, port=PORT if version == 4 else 0)


def test_what_the_storage_manager_does_to_a_directory(client: NfsClient) -> None:
    """xen-contract §9: write test, hard-link test, snapshot by rename, journal, foreign files, room."""
    client.write_file(f"/{FIRST}", b"")
    client.unlink(f"/{FIRST}")

    client.write_file("/x", b"link test")
    client.link("/x", "/x.new")
    assert client.attributes("/x").nlink == client.attributes("/x.new").nlink == 2
    assert client.attributes("/x").inode == client.attributes("/x.new").inode
    client.unlink("/x")
    client.unlink("/x.new")

    client.write_file(f"/{FIRST}.vhd", b"leaf")
    client.rename(f"/{FIRST}.vhd", f"/{SECOND}.vhd")
    client.write_file(f"/{FIRST}.vhd.new", b"child")
    client.write_file(f"/{FIRST}.vhd", b"in the way")
    client.rename(f"/{FIRST}.vhd.new", f"/{FIRST}.vhd")
    assert client.read_file(f"/{FIRST}.vhd") == b"child"
    assert {f"{FIRST}.vhd", f"{SECOND}.vhd"} <= set(client.listing())
    assert not client.exists(f"/{FIRST}.vhd.new")

    with client.open("/filelog.txt", os.O_RDWR | os.O_CREAT) as log:
        log.write(0, b"one\n")
        log.write(4, b"two\n")
    assert client.read_file("/filelog.txt") == b"one\ntwo\n"
    client.chmod("/filelog.txt", 0o600)
    assert client.attributes("/filelog.txt").mode & 0o777 == 0o600

    for name in (f"{FIRST}.vhd", f"{SECOND}.vhd", "filelog.txt"):
        client.unlink(f"/{name}")
    assert 0 < client.room().available <= client.room().total


def test_files_grow_and_shrink(client: NfsClient) -> None:
    with client.open("/sparse", os.O_RDWR | os.O_CREAT) as file:
        far = (5 << 30) + 512
        file.write(far, b"z" * 512)
        file.sync()
        assert file.attributes().size == far + 512
        assert file.read(1 << 30, 512) == bytes(512)
        assert file.read(far, 4096) == b"z" * 512
        file.truncate(1000)
        file.truncate(3000)
        assert file.attributes().size == 3000
        assert file.read(0, 4096) == bytes(3000)
    client.unlink("/sparse")


def test_a_disk_has_the_bytes_of_the_point(client: NfsClient) -> None:
    with client.open("/disk0.raw") as disk:
        assert disk.attributes().size == SIZE
        assert b"".join(disk.read(at, CHUNK) for at in range(0, SIZE, CHUNK)) == DISK


def test_a_disk_takes_sectors_and_other_sizes(client: NfsClient) -> None:
    with client.open("/disk1.raw") as disk:
        disk.truncate(SIZE)
        before = disk.read(CHUNK, 4096)
        disk.write(CHUNK + 512, b"s" * 512)
        assert disk.read(CHUNK, 4096) == before[:512] + b"s" * 512 + before[1024:]

        disk.write(SIZE + 1024, b"t" * 512)
        assert disk.attributes().size == SIZE + 1536
        assert disk.read(SIZE, 2048) == bytes(1024) + b"t" * 512
        disk.truncate(SIZE)
        disk.truncate(SIZE + 4096)
        assert disk.read(SIZE, 8192) == bytes(4096)

        earlier = disk.attributes().mtime_ns
        disk.write(0, DISK[:512])
        assert disk.attributes().mtime_ns > earlier


def test_a_disk_is_renamed_and_linked(client: NfsClient) -> None:
    client.link("/disk2.raw", "/leaf.raw")
    client.rename("/disk2.raw", "/parent.raw")
    assert client.attributes("/parent.raw").inode == client.attributes("/leaf.raw").inode
    client.rename("/parent.raw", "/disk2.raw")
    client.unlink("/leaf.raw")
    with client.open("/disk2.raw") as disk:
        assert disk.read(7 * CHUNK, CHUNK) == DISK[7 * CHUNK : 8 * CHUNK]


def test_a_commit_has_returned_when_the_overlay_has_flushed(server: Exported, client3: NfsClient) -> None:
    with client3.open("/disk0.raw") as disk:
        before = server.count("flush")
        for at in range(0, 1 << 20, CHUNK):
            disk.write(at, DISK[at : at + CHUNK])
        assert server.count("flush") == before
        disk.sync()
        assert server.count("flush") > before


def test_a_stable_write_has_returned_when_the_overlay_has_flushed(server: Exported, client3: NfsClient) -> None:
    with client3.open("/disk0.raw", os.O_RDWR | os.O_SYNC) as disk:
        for number in range(3):
            before = server.count("flush")
            disk.write(number * 4096, DISK[number * 4096 : (number + 1) * 4096])
            assert server.count("flush") > before


@contextmanager
def mounts_elsewhere(count: int) -> Iterator[None]:
    """Somebody mounts things just when the live mount is gone: they take device numbers."""
    with ExitStack() as descriptors:
        for _ in range(count):
            descriptors.callback(os.close, file_system())
        yield


def test_handles_stay_valid_when_everything_was_killed(server: Exported) -> None:
    with (
        mount(server) as client,
        client.open("/disk3.raw") as disk,
        client.open("/note", os.O_RDWR | os.O_CREAT) as note,
    ):
        for file in (disk, note):
            file.write(4096, b"committed")
            file.sync()
        handles = disk.handle(), note.handle()
        starts = (server.state.parent / "nfs" / "start").read_text()
        for number in range(3):
            begin = time.monotonic()
            server.stop(signal.SIGKILL)
            with mounts_elsewhere(number):
                server.start()
            assert disk.read(4096, 9) == note.read(4096, 9) == b"committed"
            assert time.monotonic() - begin < NFS_TIMEOUT_S
            disk.write(CHUNK, b"afterwards")
            disk.sync()
        with client.open("/disk3.raw") as again:
            assert (again.handle(), note.handle()) == handles
            assert again.read(CHUNK, 10) == b"afterwards"
        assert int((server.state.parent / "nfs" / "start").read_text()) >= int(starts) + 3


def test_ganesha_comes_back_by_itself(server: Exported, client3: NfsClient) -> None:
    assert server.server is not None
    with client3.open("/disk3.raw") as disk:
        disk.write(0, b"not committed")
        (ganesha,) = children(server.server.pid, "ganesha.nfsd")
        os.kill(ganesha, signal.SIGKILL)
        assert disk.read(0, 13) == b"not committed"
    assert children(server.server.pid, "ganesha.nfsd") != [ganesha]


def test_random_writes_are_read_back(server: Exported, client3: NfsClient) -> None:
    expected = bytearray(DISK)
    choose = random.Random(5)
    with client3.open("/disk2.raw") as disk:
        for number in range(300):
            at = choose.randrange(0, SIZE - CHUNK, 512)
            data = choose.randbytes(choose.randrange(512, CHUNK, 512))
            disk.write(at, data)
            expected[at : at + len(data)] = data
            if number % 50 == 49:
                disk.sync()
    server.restart(signal.SIGKILL)
    with mount(server, version=4) as other, other.open("/disk2.raw") as disk:
        assert b"".join(disk.read(at, CHUNK) for at in range(0, SIZE, CHUNK)) == expected


def test_closed_files_do_not_keep_a_session_busy(server: Exported, client3: NfsClient) -> None:
    """NFSv3 has no close: ganesha has to let go of files by itself."""
    assert server.server is not None
    with client3.open("/disk1.raw") as disk:
        disk.read(0, 512)
    (ganesha,) = children(server.server.pid, "ganesha.nfsd")

    def is_open() -> bool:
        links = (str(link.readlink()) for link in Path(f"/proc/{ganesha}/fd").iterdir())
        return any(link.startswith(str(server.directory)) for link in links)

    wait_until(lambda: not is_open(), "ganesha keeps files open")


def test_a_session_that_begins_later_is_seen(server: Exported) -> None:
    assert server.server is not None
    with mount(server, "") as root:
        assert "late" not in root.listing()
        with pytest.raises(FileNotFoundError):
            root.attributes("/late")
        server.server.send_signal(signal.SIGHUP)
        wait_until((server.mount / "late").exists, "the session is not shown")
        assert root.attributes("/late").mode & 0o40000
        assert "late" in root.listing()
    with mount(server, "late") as session:
        session.write_file("/x", b"y")


def test_what_qemu_writes_is_there(server: Exported) -> None:
    uri = server.nfs.uri(SESSION, "disk1.raw")
    commands = ["-c", "write -P 7 1M 64k", "-c", "flush", "-c", "read -P 7 1M 64k"]
    subprocess.run(["qemu-io", "-f", "raw", *commands, uri], check=True, capture_output=True, timeout=60)
    assert (server.directory / "disk1.raw").read_bytes()[1 << 20 : (1 << 20) + CHUNK] == b"\x07" * CHUNK


@pytest.mark.skipif(shutil.which("fio") is None, reason="fio is not installed")
def test_fio_verifies(server: Exported, tmp_path: Path) -> None:
    """fio of Debian has no client for NFS: qemu-nbd stands between, as a guest's QEMU does."""
    socket, uri = tmp_path / "s", server.nfs.uri(SESSION, "disk2.raw")
    # QEMU's client takes no other size afterwards, and earlier tests wrote behind the end.
    size = (server.directory / "disk2.raw").stat().st_size // 4096 * 4096
    bridge = ["qemu-nbd", "--format=raw", "--shared=4", "--persistent", f"--socket={socket}", uri]
    with subprocess.Popen(bridge) as process:
        try:
            wait_until(socket.exists, "qemu-nbd does not listen")
            load = ["--ioengine=nbd", f"--uri=nbd+unix:///?socket={socket}", "--rw=randrw", "--bsrange=512-64k"]
            load += ["--blockalign=512", "--iodepth=8", "--fsync=32", f"--size={size}", "--randseed=7"]
            proof = ["--verify=crc32c", "--verify_fatal=1", "--do_verify=1"]
            command = ["fio", "--name=proof", f"--aux-path={tmp_path}", *load, *proof]
            subprocess.run(command, check=True, capture_output=True, timeout=120)
        finally:
            process.terminate()


def refusal(export: NfsExport) -> ExportFailed:
    with pytest.raises(ExportFailed) as failed:
        trio.run(serve_nfs, export)
    return failed.value


def test_nobody_else_may_mount(network: str, tmp_path: Path) -> None:
    (tmp_path / "files" / "s").mkdir(parents=True)
    export = NfsExport(tmp_path / "files", tmp_path / "state", network, 20590, ("10.99.0.64/26", "192.0.2.7"), 20591)

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            place = await nursery.start(serve_nfs, export)
            for version, port in ((3, place.port), (4, place.port)):
                with pytest.raises(OSError, match=r"mount|ACCESS|PERM|NOENT|not available|Lookup"):
                    NfsClient(network, place.path("s"), version=version, port=port, mount_port=20591).listing()
            nursery.cancel_scope.cancel()

    trio.run(main)


def test_clients_change_while_it_runs(network: str, tmp_path: Path) -> None:
    (tmp_path / "files" / "s").mkdir(parents=True)
    others = ("192.0.2.7/32",)
    export = NfsExport(tmp_path / "files", tmp_path / "state", network, 20590, others, 20591)

    def mounted(place: NfsPlace, version: int) -> NfsClient:
        return NfsClient(network, place.path("s"), version=version, port=20590, mount_port=20591)

    def refused(place: NfsPlace) -> None:
        for version in (3, 4):
            with pytest.raises(OSError, match=r"mount|ACCESS|PERM|NOENT|not available|Lookup"):
                mounted(place, version).listing()

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            place = await nursery.start(serve_nfs, export)
            running = children(os.getpid(), "ganesha.nfsd")
            refused(place)
            await change_clients(replace(export, clients=(*others, f"{network}/32")))
            for version in (3, 4):
                with mounted(place, version) as client, client.open("/x", os.O_RDWR | os.O_CREAT) as file:
                    file.write(0, b"before")
                    await change_clients(replace(export, clients=(f"{network}/32",)))
                    assert file.read(0, 6) == b"before"
                    file.write(6, b"after")
                    file.sync()
                    await change_clients(replace(export, clients=(*others, f"{network}/32")))
            await change_clients(export)
            refused(place)
            assert children(os.getpid(), "ganesha.nfsd") == running
            nursery.cancel_scope.cancel()

    trio.run(main)
    assert (tmp_path / "files/s/x").read_bytes() == b"beforeafter"


def test_sessions_with_other_clients_leave_the_server_running(network: str, tmp_path: Path) -> None:
    (tmp_path / "live" / "s").mkdir(parents=True)

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            share = Share(tmp_path / "live", tmp_path / "state")
            await nursery.start(share.run)
            await share.settle([f"{network}/32"])
            running = children(os.getpid(), "ganesha.nfsd")
            for clients in ((f"{network}/32", "192.0.2.0/24"), (f"{network}/32",), ("192.0.2.7/32", f"{network}/32")):
                await share.settle(clients)
                assert children(os.getpid(), "ganesha.nfsd") == running
                assert share.place is not None
                with NfsClient(network, share.place.path("s"), version=3) as client:
                    assert client.listing() is not None
            await share.settle([])
            assert share.place is None
            assert children(os.getpid(), "ganesha.nfsd") == []
            nursery.cancel_scope.cancel()

    trio.run(main)


def test_a_port_that_is_taken_is_told(server: Exported, tmp_path: Path) -> None:
    export = NfsExport(tmp_path, tmp_path / "state", server.nfs.address, PORT, (), MOUNT_PORT + 100)
    assert "stop nfs-kernel-server" in refusal(export).hint


def test_what_can_not_be_is_told(network: str, tmp_path: Path) -> None:
    assert "ADDRESS/BITS" in refusal(NfsExport(tmp_path, tmp_path / "s", network, clients=("host; }",))).hint
    assert "listen at" in refusal(NfsExport(tmp_path, tmp_path / "s", "192.0.2.1", 20590, (), 20591)).hint


def test_without_rpcbind_it_is_told(tmp_path: Path) -> None:
    with private_network(with_rpcbind=False) as address:
        failed = refusal(NfsExport(tmp_path, tmp_path / "state", address, 20590, (), 20591))
    assert "Cannot register" in str(failed)
    assert "rpcbind" in failed.hint
