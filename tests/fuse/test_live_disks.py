"""Overlay disks in the live mount: bytes, sizes, holes, flushes, deadlines, crashes; fio and the kernel's handles."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from tests.support.disks import CHUNK, MemoryDisk
from tests.support.live_mounts import SESSION, LiveMounted
from tests.support.mounts import drop_page_cache
from xbfs.fuse.mount import DataPlaneKind
from xbfs_engine.core.runtime import SystemClock

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.parametrize("data_plane", [DataPlaneKind.DEVICE], indirect=True, scope="session")

SIZE = 8 << 20
CHUNKS = (0, 1, 7, 40, 127)
DISK = MemoryDisk.holding(SIZE, CHUNKS).read_at(0, SIZE)
HANDLES = Path(__file__).with_name("file_handle.py")
KEEP_SIZE, PUNCH_HOLE, ZERO_RANGE, COLLAPSE = 1, 2, 16, 8


@pytest.fixture
def live(tmp_path: Path) -> Iterator[LiveMounted]:
    mounted = LiveMounted(tmp_path, deadline_s=2.0)
    mounted.disk("disk.raw", "0", SIZE, CHUNKS)
    with mounted:
        yield mounted


@pytest.fixture
def disk(live: LiveMounted) -> Iterator[int]:
    fd = os.open(live.directory / "disk.raw", os.O_RDWR)
    yield fd
    os.close(fd)


def content(fd: int) -> bytes:
    """The bytes, not those that the kernel has kept."""
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    return os.pread(fd, 1 << 30, 0)


def fallocate(fd: int, mode: int, offset: int, length: int) -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    return ctypes.get_errno() if libc.fallocate(fd, mode, offset, length) else 0


def test_writes_of_any_place_and_size(disk: int) -> None:
    wanted = bytearray(DISK)
    chance = np.random.default_rng(1)
    for size in (1, 512, 511, 4096, 5000, CHUNK, 300_000, 1 << 20, (1 << 20) + 512):
        offset = int(chance.integers(SIZE - size))
        data = chance.bytes(size)
        assert os.pwrite(disk, data, offset) == size
        wanted[offset : offset + size] = data
        assert os.pread(disk, size, offset) == data
    assert content(disk) == wanted


def test_direct_reads_and_writes_of_sectors(live: LiveMounted, disk: int) -> None:
    direct = os.open(live.directory / "disk.raw", os.O_RDWR | os.O_DIRECT)
    page = mmap.mmap(-1, 4096)
    page[:512] = b"s" * 512
    assert os.pwritev(direct, [memoryview(page)[:512]], 512) == 512
    assert os.preadv(direct, [page], 0) == 4096
    assert page[:2048] == DISK[:512] + b"s" * 512 + DISK[1024:2048]
    assert os.pread(disk, 512, 512) == b"s" * 512
    os.close(direct)


def test_shared_memory_maps(disk: int) -> None:
    with mmap.mmap(disk, SIZE) as memory:
        memory[CHUNK - 3 : CHUNK + 3] = b"across"
        memory.flush()
    assert content(disk)[CHUNK - 3 : CHUNK + 3] == b"across"


def test_sizes_change_both_ways_and_by_writing(disk: int) -> None:
    os.ftruncate(disk, CHUNK + 5)
    assert content(disk) == DISK[: CHUNK + 5]
    os.ftruncate(disk, 3 * CHUNK)
    assert os.fstat(disk).st_size == 3 * CHUNK
    assert content(disk) == DISK[: CHUNK + 5] + bytes(2 * CHUNK - 5)
    os.pwrite(disk, b"end", 4 * CHUNK + 7)
    assert os.fstat(disk).st_size == 4 * CHUNK + 10
    assert content(disk) == DISK[: CHUNK + 5] + bytes(3 * CHUNK + 2) + b"end"
    with pytest.raises(OSError, match=os.strerror(errno.EFBIG)):
        os.ftruncate(disk, 1 << 60)


def test_opening_to_truncate(live: LiveMounted, disk: int) -> None:
    (live.directory / "disk.raw").write_bytes(b"all there is")
    assert os.fstat(disk).st_size == 12
    assert content(disk) == b"all there is"


def test_many_writers_behind_the_end(live: LiveMounted, disk: int) -> None:
    def append(number: int) -> None:
        fd = os.open(live.directory / "disk.raw", os.O_WRONLY)
        for turn in range(10):
            os.pwrite(fd, bytes([number + 1]) * 1000, SIZE + (turn * 4 + number) * 1000)
        os.close(fd)

    threads = [threading.Thread(target=append, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert content(disk)[SIZE:] == b"".join(bytes([number + 1]) * 1000 for number in range(4)) * 10


def test_holes_and_zeros(disk: int) -> None:
    wanted = bytearray(DISK)
    os.pwrite(disk, b"x" * CHUNK, CHUNK // 2)
    wanted[CHUNK // 2 : CHUNK + CHUNK // 2] = b"x" * CHUNK
    for mode, offset, length in [
        (PUNCH_HOLE | KEEP_SIZE, 1000, 10_000),
        (ZERO_RANGE | KEEP_SIZE, 7 * CHUNK, CHUNK),
        (PUNCH_HOLE | KEEP_SIZE, SIZE - 100, 1000),
        (ZERO_RANGE | KEEP_SIZE, 2 * SIZE, 10),
    ]:
        assert fallocate(disk, mode, offset, length) == 0
        wanted[offset : offset + length] = bytes(max(0, min(length, SIZE - offset)))
    before = os.fstat(disk).st_blocks
    assert fallocate(disk, PUNCH_HOLE | KEEP_SIZE, CHUNK, CHUNK // 2) == 0
    wanted[CHUNK : CHUNK + CHUNK // 2] = bytes(CHUNK // 2)
    assert content(disk) == wanted
    assert os.fstat(disk).st_blocks == before - CHUNK // 2 // 512
    assert fallocate(disk, ZERO_RANGE, SIZE - 5, 10) == 0
    assert fallocate(disk, 0, 0, SIZE + 10) == 0
    assert os.fstat(disk).st_size == SIZE + 10
    assert fallocate(disk, COLLAPSE, 0, 4096) == errno.EOPNOTSUPP


def test_seeking_finds_data_and_holes(disk: int) -> None:
    os.pwrite(disk, b"x", 20 * CHUNK)
    fallocate(disk, PUNCH_HOLE | KEEP_SIZE, 0, CHUNK)
    at = 0
    for begin, end in [(1, 2), (7, 8), (20, 20 + 1 / 16), (40, 41), (127, 128)]:
        at = os.lseek(disk, at, os.SEEK_DATA)
        assert at == begin * CHUNK
        at = os.lseek(disk, at, os.SEEK_HOLE)
        assert at == end * CHUNK
    with pytest.raises(OSError, match=os.strerror(errno.ENXIO)):
        os.lseek(disk, at, os.SEEK_DATA)


def test_times_follow_writes_and_blocks_follow_data(live: LiveMounted, disk: int) -> None:
    os.utime(disk, ns=(1, 2))
    assert os.fstat(disk).st_mtime_ns == 2
    blocks = os.fstat(disk).st_blocks
    assert blocks > 0, "GNU tar takes none for: all zeros"
    began = SystemClock().now_ns()
    os.pwrite(disk, bytes(CHUNK), 0)
    assert os.fstat(disk).st_mtime_ns >= began
    assert (live.backing / "disk.raw").stat().st_mtime_ns >= began
    assert os.fstat(disk).st_blocks == blocks + CHUNK // 512
    os.utime(disk, ns=(1, 2))
    os.pwrite(disk, b"x", 0)
    deadline = time.monotonic() + 10
    while (live.backing / "disk.raw").stat().st_mtime_ns < began:
        assert time.monotonic() < deadline, "nobody asked, but it is put down all the same"
        time.sleep(0.05)


def test_what_was_flushed_survives_a_kill_and_a_power_cut_of_the_server(live: LiveMounted, disk: int) -> None:
    """Without a flush a power cut leaves nothing in the map: this sees whether fsync, O_DSYNC and O_SYNC flush it."""
    os.pwrite(disk, b"f" * 4096, 0)
    os.fsync(disk)
    for place, flag in ((2, os.O_DSYNC), (3, os.O_SYNC), (4, os.O_DSYNC | os.O_DIRECT)):
        fd = os.open(live.directory / "disk.raw", os.O_WRONLY | flag)
        page = mmap.mmap(-1, 4096)
        page[:] = b"f" * 4096
        os.pwritev(fd, [page], place * CHUNK)
        os.close(fd)
    os.pwrite(disk, b"u" * 4096, 5 * CHUNK)
    live.stop(signal.SIGKILL)
    (recent,) = (live.state / SESSION).rglob("recent")
    recent.unlink()  # of another boot it would tell nothing
    live.start()
    with (live.directory / "disk.raw").open("rb") as again:
        for place in (0, 2, 3, 4):
            assert os.pread(again.fileno(), 4096, place * CHUNK) == b"f" * 4096
        assert os.pread(again.fileno(), 4096, 5 * CHUNK) == DISK[5 * CHUNK : 5 * CHUNK + 4096]


def test_what_was_not_flushed_survives_a_kill(live: LiveMounted) -> None:
    with (live.directory / "disk.raw").open("r+b", buffering=0) as file:
        os.pwrite(file.fileno(), b"u" * 5000, 5 * CHUNK - 500)
        os.pwrite(file.fileno(), b"v" * 100, SIZE + 77)
    live.restart(signal.SIGKILL)
    with (live.directory / "disk.raw").open("rb") as again:
        assert os.pread(again.fileno(), 5000, 5 * CHUNK - 500) == b"u" * 5000
        assert os.pread(again.fileno(), 1000, SIZE) == bytes(77) + b"v" * 100


def test_handles_of_an_nfs_client_outlive_the_server(live: LiveMounted) -> None:
    (live.directory / "d/e").mkdir(parents=True)
    (live.directory / "d/e/file").write_bytes(b"foreign")

    def handle(*arguments: object) -> str:
        command = [sys.executable, HANDLES, *arguments]
        return subprocess.run([*map(str, command)], capture_output=True, text=True, check=True).stdout.strip()

    names = (".", "disk.raw", "d/e", "d/e/file")
    kept = {name: handle("take", live.directory / name) for name in names}
    numbers = {name: (live.directory / name).stat().st_ino for name in names}
    (live.directory / "disk.raw").rename(live.directory / "d/renamed.raw")
    live.restart(signal.SIGKILL)
    assert bytes.fromhex(handle("read", live.mount, kept["disk.raw"], 7, 500)) == DISK[7:507]
    assert bytes.fromhex(handle("read", live.mount, kept["d/e/file"], 0, 100)) == b"foreign"
    assert handle("list", live.mount, kept["d/e"]) == "file"
    assert handle("list", live.mount, kept["."]) == "d"
    assert numbers["disk.raw"] == (live.directory / "d/renamed.raw").stat().st_ino
    (live.directory / "d/e/file").unlink()
    live.restart()
    for number in range(50):  # one of them gets the old inode number, or none does
        (live.directory / f"new{number}").write_bytes(b"other")
    gone = subprocess.run(
        [sys.executable, HANDLES, "read", live.mount, kept["d/e/file"], "0", "10"], capture_output=True, text=True
    )
    assert "Stale file handle" in gone.stderr


def test_a_storage_that_hangs_stops_only_who_needs_it(live: LiveMounted, disk: int) -> None:
    os.pwrite(disk, b"w" * 4096, 8192)
    os.fsync(disk)
    (live.control / "hang").touch()
    began = time.monotonic()
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        os.pread(disk, 4096, 7 * CHUNK)
    drop_page_cache(live.directory / "disk.raw")
    partial = os.open(live.directory / "disk.raw", os.O_WRONLY | os.O_DIRECT)
    failures: list[int | None] = []

    def write_a_part() -> None:
        try:
            os.pwritev(partial, [memoryview(mmap.mmap(-1, 512))], 40 * CHUNK)
        except OSError as exc:
            failures.append(exc.errno)

    writer = threading.Thread(target=write_a_part)
    writer.start()
    assert os.pread(disk, 4096, 8192) == b"w" * 4096
    writer.join()
    os.close(partial)
    assert failures == [errno.EIO]
    assert time.monotonic() - began < 10
    os.pwrite(disk, b"v" * 4096, 12288)  # needs nothing of the restore point
    os.fsync(disk)
    (live.control / "hang").unlink()
    assert os.pread(disk, 4096, 7 * CHUNK) == DISK[7 * CHUNK : 7 * CHUNK + 4096]
    time.sleep(0.2)
    found = content(disk)[40 * CHUNK : 41 * CHUNK]
    assert found[512:] == DISK[40 * CHUNK + 512 : 41 * CHUNK]
    assert found[:512] in (bytes(512), DISK[40 * CHUNK : 40 * CHUNK + 512])


def filled(fd: int) -> int:
    """Write until there is no room; how far."""
    for offset in range(0, SIZE, CHUNK):
        try:
            os.pwrite(fd, b"d" * CHUNK, offset)
        except OSError as exc:
            if exc.errno != errno.ENOSPC:
                raise
            return offset
    return SIZE


def test_a_full_disk_is_told_and_loses_nothing(tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "none", small], check=True)
    try:
        live = LiveMounted(small)
        live.log = tmp_path / "log"
        live.disk("disk.raw", "0", SIZE, CHUNKS)
        with live:
            fd = os.open(live.directory / "disk.raw", os.O_RDWR)
            written = filled(fd)
            assert 1 << 20 < written < SIZE
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            assert os.pread(fd, written, 0) == b"d" * written
            rest = os.pread(fd, SIZE, written + CHUNK)
            assert rest == DISK[written + CHUNK :]
            torn = os.pread(fd, CHUNK, written)
            assert all(torn[at : at + 512] in (b"d" * 512, DISK[written + at :][:512]) for at in range(0, CHUNK, 512))
            fallocate(fd, PUNCH_HOLE | KEEP_SIZE, 0, 4 * CHUNK)
            os.fsync(fd)
            assert os.pwrite(fd, b"again", written) == 5, "there is room again"
            os.fsync(fd)
            os.close(fd)
    finally:
        subprocess.run(["umount", "-l", small], check=True)


@pytest.mark.skipif(shutil.which("fio") is None, reason="fio is not installed")
def test_fio_verifies_what_several_writers_wrote(live: LiveMounted) -> None:
    command = ["fio", "--name=v", f"--filename={live.directory}/disk.raw", "--ioengine=psync", "--rw=randwrite"]
    command += ["--bsrange=512-64k", "--bs_unaligned=0", "--verify=crc32c", "--fsync=16", "--do_verify=1"]
    command += ["--numjobs=4", "--size=2m", "--offset_increment=2m", "--loops=2", "--invalidate=1", "--minimal"]
    subprocess.run(command, check=True, capture_output=True, cwd=live.control)


def test_acknowledged_flushes_of_a_killed_server_are_there(live: LiveMounted) -> None:
    """Generations of one block are written and flushed in order: after the kill none is older than the last flush."""
    path = live.directory / "disk.raw"
    for _ in range(3):
        flushed = [0]
        stop = threading.Event()

        def write(flushed: list[int], stop: threading.Event) -> None:
            fd = os.open(path, os.O_WRONLY)
            try:
                for generation in range(1, 1 << 20):
                    if stop.is_set():
                        break
                    for place in range(8):
                        os.pwrite(fd, generation.to_bytes(8, "little") * 512, place * 5 * 4096)
                    os.fsync(fd)
                    flushed[0] = generation
            except OSError:
                pass
            finally:
                with suppress(OSError):
                    os.close(fd)

        writer = threading.Thread(target=write, args=(flushed, stop))
        writer.start()
        time.sleep(0.5)
        assert live.server is not None
        live.server.kill()
        stop.set()
        writer.join()
        live.stop(signal.SIGKILL)
        live.start()
        assert flushed[0] > 0
        with path.open("rb") as disk:
            for place in range(8):
                block = os.pread(disk.fileno(), 4096, place * 5 * 4096)
                generations = {int.from_bytes(block[at : at + 8], "little") for at in range(0, 4096, 8)}
                assert flushed[0] <= min(generations) <= max(generations) <= flushed[0] + 1
