"""What is sent to a host as VHD is a VHD to qemu-img, with the disk's bytes in it."""

from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING

import pytest
import trio

from tests.support.engine import CHUNK, Engine, MemorySource, pattern
from xbfs_engine.core.errors import BlobLost, TransferFailed
from xbfs_engine.core.limits import MIB
from xbfs_engine.formats.raw import RawLayout
from xbfs_engine.restore.image import send_image
from xbfs_engine.restore.layouts import ImageFormat, image_layout

if TYPE_CHECKING:
    from pathlib import Path

SIZE = 9 * MIB
PIECES = {0: pattern(1, 3 * CHUNK + 7), 5 * MIB - 9: pattern(2, 2 * MIB), SIZE - 1: b"!"}


@pytest.mark.parametrize("pieces", [PIECES, {}], ids=["data", "empty"])
@pytest.mark.parametrize("threads", [1, 3])
def test_the_stream_is_a_vhd_of_the_disk(tmp_path: Path, pieces: dict[int, bytes], threads: int) -> None:
    engine = Engine.fresh(tmp_path / "cache")
    point = engine.backup(MemorySource(SIZE, pieces))
    disk = point.disks[0]
    layout = image_layout(point, disk, ImageFormat.VHD)
    with (tmp_path / "disk.vhd").open("wb") as file:
        statistics = trio.run(
            lambda: send_image(
                engine.repository, point, disk, layout, file.write, size_bytes=layout.size_bytes, threads=threads
            )
        )
    assert (tmp_path / "disk.vhd").stat().st_size == statistics.image_bytes == layout.size_bytes
    assert statistics.image_bytes < 2 * sum(map(len, pieces.values())) + 7 * MIB, "zeros are left out"
    command = ["qemu-img", "convert", "-f", "vpc", "-O", "raw", tmp_path / "disk.vhd", tmp_path / "disk.raw"]
    subprocess.run(command, check=True, capture_output=True)
    content = (tmp_path / "disk.raw").read_bytes()
    assert content[:SIZE] == engine.read(disk)
    assert content[SIZE:] == bytes(10 * MIB - SIZE), "rounded up to 2 MiB"


def test_raw_goes_on_with_zeros_to_the_end_of_the_vdi(tmp_path: Path) -> None:
    engine = Engine.fresh(tmp_path / "cache")
    point = engine.backup(MemorySource(SIZE, PIECES))
    disk = point.disks[0]
    sent = bytearray()
    trio.run(
        lambda: send_image(engine.repository, point, disk, RawLayout(SIZE), sent.extend, size_bytes=12 * MIB, threads=2)
    )
    assert sent == engine.read(disk) + bytes(3 * MIB)


def test_what_the_writer_raises_comes_out(tmp_path: Path) -> None:
    engine = Engine.fresh(tmp_path / "cache")
    point = engine.backup(MemorySource(SIZE, PIECES))

    def write(_view: memoryview) -> None:
        raise TransferFailed("gone")

    with pytest.raises(TransferFailed):
        trio.run(lambda: send_image(engine.repository, point, point.disks[0], RawLayout(SIZE), write, size_bytes=SIZE))


def test_a_lost_pack_is_no_zeros(tmp_path: Path) -> None:
    engine = Engine.fresh(tmp_path / "cache")
    point = engine.backup(MemorySource(SIZE, PIECES))
    for blob in list(engine.storage.list_blobs("data/")):
        engine.storage.delete(blob.name)
    with pytest.raises(BlobLost, match="disk 0 of restore point"):
        trio.run(
            lambda: send_image(
                engine.repository, point, point.disks[0], RawLayout(SIZE), bytearray().extend, size_bytes=SIZE
            )
        )
