"""A VHD of ours that qemu's vpc driver wrote into, and what libvhdi finds in one that our tests' host wrote into."""

from __future__ import annotations

import mmap
from typing import TYPE_CHECKING

import pytest
import pyvhdi

from tests.support.disks import MemoryDisk, dynamic_vhd, write_sparse
from tests.support.vhd_files import run
from tests.support.vhd_writer import BLOCK, HostWriter
from xbfs.instant.vhd_disk import VhdDisk
from xbfs.view.base import Extent
from xbfs.view.overlay import Layer, Region

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

SIZE = 5 * BLOCK
DISK = MemoryDisk.holding(SIZE, (0, 5, 70, 130))
WRITES = [(4096, 512, 0x41), (BLOCK - 1024, 4096, 0x42), (3 * BLOCK + 512, 1024, 0x43), (SIZE - 512, 512, 0x44)]


class File:
    """A file as a RandomAccess."""

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self.size_bytes = len(self._map)

    def read_at(self, offset: int, length: int) -> bytes:
        return self._map[offset : offset + length]

    read_cached = read_at

    def parts_at(self, offset: int, length: int) -> list[bytes | memoryview]:
        return [self.read_at(offset, length)]

    parts_cached = parts_at

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        yield Extent(offset, min(length, self.size_bytes - offset), True)


@pytest.fixture
def vhd(memory_dir: Path) -> Path:
    path = memory_dir / "guest.vhd"
    write_sparse(dynamic_vhd(DISK), path)
    return path


def expected() -> bytes:
    plain = bytearray(DISK.read_at(0, SIZE))
    for offset, length, byte in WRITES:
        plain[offset : offset + length] = bytes([byte]) * length
    return bytes(plain)


def differing(path: Path) -> list[Region]:
    base, now = dynamic_vhd(DISK), path.read_bytes()
    units = range(0, len(now), 4096)
    return [Region(at, 4096, Layer.DATA) for at in units if now[at : at + 4096] != base.read_at(at, 4096)]


def demand_the_writes(path: Path) -> None:
    disk = VhdDisk(File(path), lambda: differing(path), dynamic_vhd(DISK), SIZE)
    assert disk.size_bytes == SIZE
    assert disk.read_at(0, SIZE) == expected()
    again = bytearray(DISK.read_at(0, SIZE))
    for region in disk.changed_extents():
        again[region.offset : region.offset + region.length] = disk.read_at(region.offset, region.length)
    assert again == expected()


def test_what_qemu_wrote_is_the_guests_disk(vhd: Path) -> None:
    """Not into an empty VHD of blktap's: there qemu writes over the batmap."""
    commands = [word for at, length, byte in WRITES for word in ("-c", f"write -P {byte} {at} {length}")]
    run("qemu-io", "-f", "vpc", *commands, vhd)
    demand_the_writes(vhd)


def test_what_our_host_writes_is_what_others_read(vhd: Path) -> None:
    # libvhdi does not look at the bitmaps of a dynamic disk.
    host = HostWriter(bytearray(vhd.read_bytes()), absent=0)
    for offset, length, byte in WRITES:
        host.write(offset, bytes([byte]) * length)
    host.close()
    vhd.write_bytes(host.file)
    demand_the_writes(vhd)
    peer = pyvhdi.file()
    peer.open(str(vhd))
    try:
        assert peer.get_media_size() == SIZE
        found = peer.read_buffer_at_offset(SIZE, 0)
    finally:
        peer.close()
    assert found == expected()
