"""Disks of which the kernel has the file: as any file to programs, as any disk to what comes after. As root only."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import signal
import subprocess
import time
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

import numpy as np
import pytest

from tests.support.disks import CHUNK, MemoryDisk
from tests.support.live_mounts import SESSION, LiveMounted
from xbfs.fuse.mount import DataPlaneKind
from xbfs_engine.core.errors import OverlayInUse

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

pytestmark = [
    pytest.mark.parametrize("data_plane", [DataPlaneKind.DEVICE], indirect=True, scope="session"),
    pytest.mark.skipif(os.geteuid() != 0, reason="the kernel takes files from root only"),
    pytest.mark.skipif(
        tuple(map(int, os.uname().release.split(".")[:2])) < (6, 9), reason="the kernel does not know it before 6.9"
    ),
]

SIZE = 4 << 20
CHUNKS = (0, 1, 7, 40, 63)
DISK = MemoryDisk.holding(SIZE, CHUNKS).read_at(0, SIZE)
PAGE = 4096
KEEP_SIZE, PUNCH_HOLE, ZERO_RANGE = 1, 2, 16
PATIENCE_S = 10
LIBC = ctypes.CDLL(None, use_errno=True)


@pytest.fixture
def live(tmp_path: Path) -> Iterator[LiveMounted]:
    with shown(tmp_path) as mounted:
        hydrate(mounted)
        yield mounted


@contextmanager
def shown(folder: Path) -> Iterator[LiveMounted]:
    mounted = LiveMounted(folder, passes=True)
    mounted.disk("disk.raw", "0", SIZE, CHUNKS)
    with mounted:
        yield mounted


def wait(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def hydrate(live: LiveMounted) -> None:
    wish = live.control / "hydrate"
    wish.touch()
    wait(lambda: not wish.exists())


def freeze(live: LiveMounted) -> bool:
    """Whether the disks could be frozen, as a commit does it."""
    wish = live.control / "freeze"
    wish.touch()
    wait(lambda: not wish.exists() or wish.read_text() == "refused")
    done = not wish.exists()
    wish.unlink(missing_ok=True)
    return done


def place(live: LiveMounted) -> Path:
    return live.directory / "disk.raw"


def data_file(live: LiveMounted) -> Path:
    return live.state / SESSION / "overlays/0/data"


def synced(live: LiveMounted) -> int:
    """How often the data file was."""
    told = live.control / "syncs"
    return told.read_text().splitlines().count(str(data_file(live))) if told.exists() else 0


@contextmanager
def opened(path: Path, flags: int = os.O_RDWR) -> Iterator[int]:
    fd = os.open(path, flags)
    try:
        yield fd
    finally:
        os.close(fd)


def fallocate(fd: int, mode: int, offset: int, length: int) -> int:
    LIBC.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    return ctypes.get_errno() if LIBC.fallocate(fd, mode, offset, length) else 0


def test_the_kernel_reads_and_writes_without_the_server(live: LiveMounted) -> None:
    with opened(place(live)) as fd:
        os.pwrite(fd, DISK[:PAGE], 0)
        with live.asleep():
            assert os.pread(fd, SIZE, 0) == DISK
            os.pwrite(fd, b"here", 5000)
            assert os.pread(fd, 4, 5000) == b"here"
        assert data_file(live).read_bytes()[5000:5004] == b"here"
    with opened(place(live)) as fd:
        assert os.pread(fd, 4, 5000) == b"here"


@pytest.mark.parametrize("seed", range(4))
def test_a_disk_is_as_any_file_is(live: LiveMounted, tmp_path: Path, seed: int) -> None:
    """Random operations of three openings and a shared map, on the disk and on a plain file of the same bytes."""
    plain = tmp_path / "plain"
    plain.write_bytes(DISK)
    chance = np.random.default_rng(seed)
    buffers = mmap.mmap(-1, 16 * PAGE)
    pair = (place(live), plain)
    buffered = [os.open(path, os.O_RDWR) for path in pair]
    direct = [os.open(path, os.O_RDWR | os.O_DIRECT) for path in pair]
    synced_ones = [os.open(path, os.O_RDWR | os.O_DSYNC) for path in pair]
    maps = [mmap.mmap(fd, SIZE) for fd in buffered]
    try:
        for _ in range(400):
            size = int(chance.choice((1, 511, 512, PAGE, 5000, 3 * PAGE, CHUNK + 1)))
            offset = int(chance.integers(SIZE - size))
            data = chance.bytes(size)
            pages, at = int(chance.integers(1, 17)), PAGE * int(chance.integers(SIZE // PAGE - 16))
            match int(chance.integers(8)):
                case 0:
                    assert [os.pwrite(fd, data, offset) for fd in buffered] == [size, size]
                case 1:
                    assert [os.pwrite(fd, data, offset) for fd in synced_ones] == [size, size]
                case 2:
                    for memory in maps:
                        memory[offset : offset + size] = data
                case 3:
                    buffers[: pages * PAGE] = chance.bytes(pages * PAGE)
                    written = [os.pwritev(fd, [memoryview(buffers)[: pages * PAGE]], at) for fd in direct]
                    assert written == [pages * PAGE] * 2
                case 4:
                    found = []
                    for fd in direct:
                        os.preadv(fd, [memoryview(buffers)[: pages * PAGE]], at)
                        found.append(buffers[: pages * PAGE])
                    assert found[0] == found[1]
                case 5:
                    mode = int(chance.choice((PUNCH_HOLE, ZERO_RANGE))) | KEEP_SIZE
                    assert [fallocate(fd, mode, offset, size) for fd in buffered] == [0, 0]
                case 6:
                    assert maps[0][offset : offset + size] == maps[1][offset : offset + size]
                case _:
                    parts = [os.pread(fd, size, offset) for fd in synced_ones]
                    assert parts[0] == parts[1]
        assert maps[0][:] == maps[1][:]
    finally:
        for memory in maps:
            memory.close()
        for fd in (*buffered, *direct, *synced_ones):
            os.close(fd)
    assert place(live).read_bytes() == plain.read_bytes()
    live.restart()
    assert place(live).read_bytes() == plain.read_bytes()


def test_what_was_not_flushed_outlives_the_server(live: LiveMounted) -> None:
    with opened(place(live)) as fd:
        os.pwrite(fd, b"w" * PAGE, 3 * PAGE)
        os.pwrite(fd, b"z" * 10, 2 * CHUNK + 5)  # where the point has nothing
        with mmap.mmap(fd, SIZE) as memory:
            memory[9 * CHUNK : 9 * CHUNK + 3] = b"map"
    live.restart(signal.SIGKILL)
    wanted = bytearray(DISK)
    wanted[3 * PAGE : 4 * PAGE] = b"w" * PAGE
    wanted[2 * CHUNK + 5 : 2 * CHUNK + 15] = b"z" * 10
    wanted[9 * CHUNK : 9 * CHUNK + 3] = b"map"
    assert place(live).read_bytes() == wanted


def test_a_program_that_outlives_the_server_keeps_the_disk_from_the_next(live: LiveMounted) -> None:
    fd = os.open(place(live), os.O_RDWR)
    live.stop(signal.SIGKILL)
    os.pwrite(fd, b"late", 0)
    with pytest.raises(OSError, match=os.strerror(errno.ENOTCONN)):
        os.fsync(fd)
    with pytest.raises(AssertionError, match="a program still writes to the overlay"):
        live.start()
    assert live.server is not None
    assert live.server.returncode == OverlayInUse.exit_code
    with pytest.raises(OSError, match=os.strerror(errno.ENOTCONN)):
        os.close(fd)
    live.start()
    assert place(live).read_bytes()[:8] == b"late" + DISK[4:8]


def test_each_fsync_syncs_the_data_file(live: LiveMounted) -> None:
    with opened(place(live)) as fd:
        for turn in range(3):
            os.pwrite(fd, b"f" * PAGE, turn * PAGE)
            before = synced(live)
            os.fdatasync(fd)
            assert synced(live) == before + 1
        with mmap.mmap(fd, SIZE) as memory, live.asleep():
            memory[:4] = b"map!"
            memory.flush()  # the kernel syncs the file by itself


def test_a_map_that_outlives_its_file_keeps_the_disk_passed_through(live: LiveMounted) -> None:
    with opened(place(live)) as fd:
        memory = map_without_descriptor(fd)
    try:
        ctypes.memmove(memory, b"first", 5)
        assert not freeze(live)
        with opened(place(live)) as fd:
            assert os.pread(fd, 5, 0) == b"first"
            ctypes.memmove(memory, b"then!", 5)
            assert os.pread(fd, 5, 0) == b"then!"
        time.sleep(1.5)
        assert not freeze(live)
    finally:
        unmap(memory)
    wait(lambda: freeze(live))
    assert place(live).read_bytes() == b"then!" + DISK[5:]


def map_without_descriptor(fd: int) -> int:
    """Python's own maps keep a descriptor."""
    LIBC.mmap.restype = ctypes.c_void_p
    LIBC.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_int64)
    return int(LIBC.mmap(None, SIZE, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED, fd, 0))


def unmap(memory: int) -> None:
    LIBC.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
    assert LIBC.munmap(memory, SIZE) == 0


def test_the_size_stays(live: LiveMounted) -> None:
    busy = os.strerror(errno.EBUSY)
    with opened(place(live)) as fd:
        for size in (0, SIZE - 1, SIZE + 1):
            with pytest.raises(OSError, match=busy):
                os.ftruncate(fd, size)
            with pytest.raises(OSError, match=busy):
                os.truncate(place(live), size)
        with pytest.raises(OSError, match=busy):
            os.open(place(live), os.O_WRONLY | os.O_TRUNC)
        assert fallocate(fd, 0, SIZE - 1, 2) == errno.EBUSY
        assert fallocate(fd, 0, 0, SIZE) == 0
        assert os.fstat(fd).st_size == SIZE
        assert os.pread(fd, SIZE, 0) == DISK

    def cut() -> bool:
        """The kernel tells of a close after it has returned."""
        with suppress(OSError):
            os.truncate(place(live), SIZE - 5)
            return True
        return False

    wait(cut)
    assert place(live).read_bytes() == DISK[:-5]


def test_what_is_written_behind_the_end_does_not_stay_and_fsync_says_so(live: LiveMounted) -> None:
    with opened(place(live)) as fd:
        os.pwrite(fd, b"kept", SIZE - 4)
        assert os.pwrite(fd, b"behind", SIZE + 1) == 6
        with pytest.raises(OSError, match=os.strerror(errno.EFBIG)):
            os.fsync(fd)
    wait(lambda: data_file(live).stat().st_size == SIZE)
    assert place(live).read_bytes() == DISK[:-4] + b"kept"
    assert place(live).stat().st_size == SIZE
    assert "cut off" in live.log.read_text()


def test_the_stubs_time_follows(live: LiveMounted) -> None:
    stub = live.backing / "disk.raw"
    with opened(place(live)) as fd:
        before = os.fstat(fd).st_mtime_ns
        os.pread(fd, PAGE, 0)
        time.sleep(0.01)
        os.pwrite(fd, b"moved", 0)
        assert os.fstat(fd).st_mtime_ns > before
        before = stub.stat().st_mtime_ns
        time.sleep(0.01)
        os.pwrite(fd, b"again", 0)
        wait(lambda: stub.stat().st_mtime_ns > before)  # nobody asks


def test_who_opened_it_before_it_was_hydrated_stays_as_he_is(tmp_path: Path) -> None:
    with shown(tmp_path) as live:
        with opened(place(live)) as first:
            assert os.pread(first, SIZE, 0) == DISK  # the kernel keeps its pages
            hydrate(live)
            with opened(place(live)) as second:
                os.pwrite(second, b"through us", 0)
                assert os.pread(first, 10, 0) == b"through us"
                assert freeze(live)  # until the server is started anew
            with opened(place(live)) as third, opened(place(live)) as fourth:
                assert os.pread(third, 10, 0) == os.pread(fourth, 10, 0) == b"through us"
        live.restart()
        with opened(place(live)) as fd, live.asleep():
            assert os.pread(fd, SIZE, 0) == b"through us" + DISK[10:]


def test_pages_of_before_do_not_lie(tmp_path: Path) -> None:
    """Read through the server, written by the kernel, and read through the server once more."""
    with shown(tmp_path) as live:
        with opened(place(live)) as fd:
            assert os.pread(fd, SIZE, 0) == DISK
        hydrate(live)
        with opened(place(live)) as fd:
            assert not freeze(live), "that is how we know that the kernel has it"
            os.pwrite(fd, b"n" * PAGE, 7 * CHUNK)
            assert os.pread(fd, PAGE, 7 * CHUNK) == b"n" * PAGE
        wait(lambda: freeze(live))
        with opened(place(live)) as fd:
            assert os.pread(fd, PAGE, 7 * CHUNK) == b"n" * PAGE
            os.pwrite(fd, b"m" * PAGE, 7 * CHUNK)
            assert os.pread(fd, PAGE, 7 * CHUNK) == b"m" * PAGE
        assert data_file(live).read_bytes()[7 * CHUNK : 7 * CHUNK + PAGE] == b"m" * PAGE


def fill(fd: int) -> None:
    for offset in range(0, SIZE, CHUNK):
        os.pwrite(fd, b"x" * CHUNK, offset)


def test_a_full_disk_is_told(tmp_path: Path) -> None:
    """The point's zeros have no room of their own: writing there may find none."""
    small = tmp_path / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "none", small], check=True)
    try:
        with shown(small) as live:
            hydrate(live)
            with opened(place(live)) as fd:
                assert not freeze(live)
                with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
                    fill(fd)
                assert os.pread(fd, CHUNK, 0) == b"x" * CHUNK
                assert os.pread(fd, CHUNK, 63 * CHUNK) == DISK[63 * CHUNK :]
    finally:
        subprocess.run(["umount", "-l", small], check=True)


def test_where_the_system_refuses_it_all_goes_on_as_without(tmp_path: Path) -> None:
    """The kernel does not take files of a file system that is stacked on another."""
    for name in ("lower", "upper", "work", "merged"):
        (tmp_path / name).mkdir()
    layers = ",".join(f"{name}dir={tmp_path / name}" for name in ("lower", "upper", "work"))
    merged = tmp_path / "merged"
    subprocess.run(["mount", "-t", "overlay", "-o", layers, "none", merged], check=True)
    try:
        with shown(merged) as live:
            hydrate(live)
            with opened(place(live)) as fd, opened(place(live)) as other:
                os.pwrite(fd, b"as ever", 0)
                assert os.pread(other, SIZE, 0) == b"as ever" + DISK[7:]
                assert os.fstat(fd).st_blocks < CHUNK // 512, "the map was not changed in vain"
                os.ftruncate(fd, CHUNK)
                assert os.fstat(other).st_size == CHUNK
                assert freeze(live)
            assert live.log.read_text().count("the system refuses it") == 1
    finally:
        subprocess.run(["umount", "-l", merged], check=True)
