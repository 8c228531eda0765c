"""Exports: byte for byte what was backed up, sparse, all or nothing, in every format, to files and to pipes."""

from __future__ import annotations

import os
import subprocess
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import pytest
import trio

from tests.support.engine import CHUNK, LEAF, Engine, MemorySource, blobs, pattern
from tests.support.faulty_storage import Fault, FaultyStorage, Kind, Mode
from tests.support.vhd_rules import RuleReader
from xbfs_engine.core.errors import ChunkCorrupt, ImageUnsupported, StorageFull, TargetExists, TargetUnwritable
from xbfs_engine.core.limits import GIB, MIB
from xbfs_engine.restore.image import export_image, stream_image
from xbfs_engine.restore.layouts import ImageFormat, allocated_blocks, image_layout
from xbfs_engine.storage.memory import MemoryStorage

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from xbfs_engine.catalog.restore_point import RestorePoint
    from xbfs_engine.restore.image import ExportProgress, ExportStatistics

SIZE = 3 * LEAF + 5 * CHUNK + 777
PIECES = {
    0: pattern(1),
    3 * CHUNK + 100: pattern(2, 70_000),
    LEAF - CHUNK: pattern(3, 2 * CHUNK),
    SIZE - 1000: pattern(4, 1000),
}


def content() -> bytes:
    image = bytearray(SIZE)
    for at, data in PIECES.items():
        image[at : at + len(data)] = data
    return bytes(image)


@pytest.fixture
def engine(tmp_path: Path) -> Engine:
    return Engine.fresh(tmp_path / "cache")


@pytest.fixture
def point(engine: Engine) -> RestorePoint:
    return engine.backup(MemorySource(SIZE, PIECES))


@pytest.fixture
def target(tmp_path: Path) -> Path:
    folder = tmp_path / "target"
    folder.mkdir()
    return folder / "disk.img"


def export(
    engine: Engine, point: RestorePoint, path: Path, image_format: ImageFormat = ImageFormat.RAW, **options
) -> ExportStatistics:
    disk = point.disks[0]

    async def run() -> ExportStatistics:
        layout = image_layout(point, disk, image_format)
        return await export_image(engine.repository, point, disk, layout, path, **options)

    return trio.run(run)


def stream(engine: Engine, point: RestorePoint, fd: int, image_format: ImageFormat = ImageFormat.RAW):
    disk = point.disks[0]

    async def run() -> ExportStatistics:
        return await stream_image(engine.repository, point, disk, image_layout(point, disk, image_format), fd)

    return trio.run(run)


@contextmanager
def pipe_reader() -> Iterator[tuple[int, list[bytes]]]:
    """The writing end of a pipe; what went through it is there on leaving."""
    reading, writing = os.pipe()
    pieces: list[bytes] = []

    def drain() -> None:
        while piece := os.read(reading, 1 << 20):
            pieces.append(piece)

    thread = threading.Thread(target=drain)
    thread.start()
    try:
        yield writing, pieces
    finally:
        os.close(writing)
        thread.join()
        os.close(reading)


def data_extents(path: Path) -> list[tuple[int, int]]:
    found = []
    with path.open("rb") as file:
        size, offset = path.stat().st_size, 0
        while offset < size:
            try:
                start = os.lseek(file.fileno(), offset, os.SEEK_DATA)
            except OSError:
                break
            offset = os.lseek(file.fileno(), start, os.SEEK_HOLE)
            found.append((start, offset))
    return found


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_raw_is_the_disk_and_sparse(engine: Engine, point: RestorePoint, target: Path, threads: int) -> None:
    statistics = export(engine, point, target, threads=threads)
    assert target.read_bytes() == content()
    touched = {chunk for at, data in PIECES.items() for chunk in range(at // CHUNK, (at + len(data) - 1) // CHUNK + 1)}
    assert {at // CHUNK for start, end in data_extents(target) for at in range(start, end, 4096)} == touched
    assert statistics.chunks == len(touched)
    assert statistics.image_bytes == SIZE
    assert statistics.written_bytes == sum(min(CHUNK, SIZE - chunk * CHUNK) for chunk in touched)
    assert target.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("size", [0, 1, CHUNK - 1, CHUNK + 1, LEAF, LEAF + 1])
def test_disks_of_any_size(engine: Engine, target: Path, size: int) -> None:
    data = pattern(size, size)
    point = engine.backup(data)
    export(engine, point, target)
    assert target.read_bytes() == data
    with pipe_reader() as (writing, pieces):
        stream(engine, point, writing)
    assert b"".join(pieces) == data


def test_a_huge_empty_disk_costs_nothing(engine: Engine, target: Path) -> None:
    point = engine.backup(MemorySource(1 << 42, {(1 << 41) + 5: b"\x01"}))
    statistics = export(engine, point, target)
    assert (target.stat().st_size, statistics.chunks) == (1 << 42, 1)
    assert target.stat().st_blocks * 512 <= 2 * CHUNK
    with target.open("rb") as file:
        file.seek((1 << 41) + 5)
        assert file.read(1) == b"\x01"


@pytest.mark.parametrize("image_format", [ImageFormat.VHD, ImageFormat.VHD_FIXED])
def test_vhd_holds_the_disk(engine: Engine, point: RestorePoint, target: Path, image_format: ImageFormat) -> None:
    export(engine, point, target, image_format)
    padded = content().ljust(-(-SIZE // (2 * MIB)) * 2 * MIB, b"\0")
    if image_format is ImageFormat.VHD:
        with target.open("rb") as file:
            reader = RuleReader(lambda offset, length: os.pread(file.fileno(), length, offset), target.stat().st_size)
            assert reader.disk(0, len(padded)) == padded
        # Blocks 0, 1 and 2 hold pieces, and the last one; the others are absent.
        assert allocated_blocks(point.disks[0]).nonzero()[0].tolist() == [0, 1, 2, 6]
    raw = target.with_suffix(".raw")
    subprocess.run(["qemu-img", "convert", "-f", "vpc", "-O", "raw", target, raw], check=True)
    assert raw.read_bytes() == padded


@pytest.mark.parametrize("image_format", list(ImageFormat))
def test_a_pipe_gets_the_same_bytes(
    engine: Engine, point: RestorePoint, target: Path, image_format: ImageFormat
) -> None:
    export(engine, point, target, image_format)
    with pipe_reader() as (writing, pieces):
        stream(engine, point, writing, image_format)
    assert b"".join(pieces) == target.read_bytes()


def test_every_point_restores_as_it_was(engine: Engine, target: Path) -> None:
    """Random deltas; each point is compared with the disk as it was then."""
    random = np.random.default_rng(5)
    disk = bytearray(content())
    states = [(engine.backup(bytes(disk)), bytes(disk))]
    for _ in range(4):
        changed = sorted(random.choice(SIZE // CHUNK, 6, replace=False).tolist())
        for number, chunk in enumerate(changed):
            fresh = bytes(CHUNK) if number % 3 == 0 else random.bytes(CHUNK)
            disk[chunk * CHUNK : (chunk + 1) * CHUNK] = fresh
        engine.clock.advance(10)
        states.append((engine.backup(bytes(disk), changed=[(c * CHUNK, CHUNK) for c in changed]), bytes(disk)))
    for point, state in states:
        export(engine, point, target, overwrite=True)
        assert target.read_bytes() == state


def test_an_existing_file_stays_unless_told_otherwise(engine: Engine, point: RestorePoint, target: Path) -> None:
    target.write_bytes(b"mine")
    with pytest.raises(TargetExists):
        export(engine, point, target)
    assert target.read_bytes() == b"mine"
    export(engine, point, target, overwrite=True)
    assert target.read_bytes() == content()
    assert list(target.parent.iterdir()) == [target]


def test_no_directory_is_a_clear_error(engine: Engine, point: RestorePoint, target: Path) -> None:
    with pytest.raises(TargetUnwritable):
        export(engine, point, target.parent / "missing" / "disk.img")


def test_a_vhd_above_its_limit_is_refused(engine: Engine) -> None:
    point = engine.backup(MemorySource(2041 * GIB, {}))
    with pytest.raises(ImageUnsupported):
        image_layout(point, point.disks[0], ImageFormat.VHD)


def test_a_damaged_chunk_leaves_no_file_and_says_where(engine: Engine, point: RestorePoint, target: Path) -> None:
    name, blob = next((name, data) for name, data in blobs(engine.storage, "data/").items())
    engine.storage.delete(name)
    engine.storage.put(name, [blob[:200] + bytes([blob[200] ^ 1]) + blob[201:]])
    with pytest.raises(ChunkCorrupt, match=f"disk 0 of restore point {point.id[:12]}") as caught:
        export(engine, point, target)
    assert name in caught.value.message
    assert list(target.parent.iterdir()) == []
    with pipe_reader() as (writing, pieces), pytest.raises(ChunkCorrupt):
        stream(engine, point, writing)
    assert content().startswith(b"".join(pieces)), "a stream ends before what can not be read"


def test_cancelling_leaves_nothing(engine: Engine, point: RestorePoint, target: Path) -> None:
    slow = FaultyStorage(engine.storage, [Fault(Mode.HANG, Kind.READ, nth=6)])
    late = Engine(slow, target.parent.parent / "late", clock=engine.clock)
    disk = point.disks[0]

    async def run() -> None:
        with trio.move_on_after(10) as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(lambda: export_image(late.repository, point, disk, layout, target))
                await trio.to_thread.run_sync(slow.hanging.wait)
                assert len(list(target.parent.iterdir())) == 1, "the temporary file"
                nursery.cancel_scope.cancel()
                slow.release()
        assert not scope.cancelled_caught

    layout = image_layout(point, disk, ImageFormat.RAW)
    trio.run(run)
    assert slow.injected
    assert list(target.parent.iterdir()) == []


def test_cancelling_stops_the_work_soon(engine: Engine, target: Path) -> None:
    """Ten batches; the first read of a chunk hangs until the task is cancelled."""
    point = engine.backup(b"".join(pattern(number, 64) * (CHUNK // 64) for number in range(320)))
    disk = point.disks[0]
    layout = image_layout(point, disk, ImageFormat.RAW)
    whole = FaultyStorage(engine.storage)
    export(Engine(whole, target.parent.parent / "whole", clock=engine.clock), point, target, threads=1)
    target.unlink()
    slow = FaultyStorage(engine.storage)
    late = Engine(slow, target.parent.parent / "late", clock=engine.clock)
    before = slow.counts[Kind.READ]
    slow._script = (Fault(Mode.HANG, Kind.READ, nth=before + 4),)

    async def run() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(lambda: export_image(late.repository, point, disk, layout, target, threads=1))
            await trio.to_thread.run_sync(slow.hanging.wait)
            nursery.cancel_scope.cancel()
            # The workers hear of it before the read that hangs comes back.
            with trio.CancelScope(shield=True):
                await trio.sleep(0.05)
            slow.release()

    trio.run(run)
    assert slow.injected
    assert slow.counts[Kind.READ] < whole.counts[Kind.READ] - 5
    assert list(target.parent.iterdir()) == []


def test_a_stream_to_a_reader_that_stalls_can_be_cancelled(engine: Engine, point: RestorePoint) -> None:
    reading, writing = os.pipe()
    disk = point.disks[0]

    async def run() -> bool:
        with trio.move_on_after(0.3) as scope:
            layout = image_layout(point, disk, ImageFormat.RAW)
            await stream_image(engine.repository, point, disk, layout, writing)
        return scope.cancelled_caught

    assert trio.run(run)
    # The thread that hangs in write(2) ends as soon as the pipe does.
    os.close(reading)
    os.close(writing)


def test_a_reader_that_goes_away_is_a_clear_error(engine: Engine, point: RestorePoint) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    try:
        with pytest.raises(TargetUnwritable, match="has gone"):
            stream(engine, point, writing)
    finally:
        os.close(writing)


def test_a_full_target_is_typed(engine: Engine, point: RestorePoint) -> None:
    fd = os.open("/dev/full", os.O_WRONLY)
    try:
        with pytest.raises(StorageFull):
            stream(engine, point, fd)
    finally:
        os.close(fd)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small tmpfs")
def test_a_full_disk_leaves_nothing(engine: Engine, tmp_path: Path) -> None:
    place = tmp_path / "small"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=128k,mode=700", "xbfs-test", place], check=True)
    try:
        point = engine.backup(pattern(9, 1 * MIB))
        with pytest.raises(StorageFull):
            export(engine, point, place / "disk.img")
        assert list(place.iterdir()) == []
    finally:
        subprocess.run(["umount", place], check=True)


def test_progress_ends_with_everything(engine: Engine, point: RestorePoint, target: Path) -> None:
    seen: list[ExportProgress] = []
    statistics = export(engine, point, target, report=seen.append)
    assert seen[-1].written_bytes == statistics.written_bytes
    assert statistics.to_record()["chunks"] == statistics.chunks


def test_memory_storage_is_enough(target: Path, tmp_path: Path) -> None:
    """A point exports from a bare copy of the blobs, without any local cache."""
    first = Engine.fresh(tmp_path / "first")
    point = first.backup(content())
    copy = MemoryStorage()
    for name, data in blobs(first.storage).items():
        copy.put(name, [data])
    export(Engine(copy, tmp_path / "second"), point, target)
    assert target.read_bytes() == content()
