"""Disks written out as VHD files and as the raw disks that readers shall find in them."""

from __future__ import annotations

import os
import subprocess
from typing import TYPE_CHECKING

from tests.support.disks import CHUNK, VHD_BLOCK, MemoryDisk, dynamic_vhd, fixed_vhd, write_sparse
from xbfs_engine.core.limits import GIB, MIB
from xbfs_engine.formats.vhd_records import VHD_SIZE_MAX

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from xbfs.view.synthetic import SyntheticImage

TIMEOUT_S = 120

DISKS: dict[str, Callable[[], MemoryDisk]] = {
    "0 bytes": lambda: MemoryDisk(0, {}),
    "1 byte": lambda: MemoryDisk.full(1),
    "all zeros": lambda: MemoryDisk(GIB, {}),
    "sparse": lambda: MemoryDisk.holding(100 * MIB, (0, 5, 96, 700, 1599)),
    "sparse, odd size": lambda: MemoryDisk.holding(100 * MIB + 7 * 512 + 13, (31, 32, 33, 1600)),
    "full": lambda: MemoryDisk.full(24 * MIB),
    "full, odd size": lambda: MemoryDisk.full(9 * MIB - CHUNK - 1),
    "batmap rounded down": lambda: MemoryDisk.holding(4097 * VHD_BLOCK, (7, 4096 * 32 + 31)),
    "above 127 GiB": lambda: MemoryDisk.holding(300 * GIB, (0, 1_234_567, 300 * 16384 - 1)),
    "2040 GiB": lambda: MemoryDisk.holding(VHD_SIZE_MAX, (0, 16_711_680, 33_423_359)),
}
KINDS: dict[str, Callable[[MemoryDisk], SyntheticImage]] = {"dynamic": dynamic_vhd, "fixed": fixed_vhd}
PAIRS = [(kind, disk) for kind in KINDS for disk in DISKS]
LARGE = {"batmap rounded down", "above 127 GiB", "2040 GiB"}


class Written:
    """One disk written as a VHD and as the raw virtual disk that readers shall find in it."""

    def __init__(self, directory: Path, kind: str, disk: MemoryDisk) -> None:
        self.kind = kind
        self.disk = disk
        self.virtual_size = max(-(-disk.size_bytes // VHD_BLOCK), 1) * VHD_BLOCK
        self.vhd = directory / f"{kind}.vhd"
        self.raw = directory / "expected.raw"
        write_sparse(KINDS[kind](disk), self.vhd)
        write_sparse(disk, self.raw)
        os.truncate(self.raw, self.virtual_size)

    def places(self) -> Iterator[tuple[int, int]]:
        """Ranges that cover all data, its surroundings and the end of the disk."""
        for extent in self.disk.extents(0, self.disk.size_bytes):
            if extent.is_data:
                start = max(extent.offset - 4096, 0)
                yield start, extent.length + 8192
        yield self.virtual_size - VHD_BLOCK, VHD_BLOCK

    def expected(self, offset: int, length: int) -> bytes:
        length = max(min(length, self.virtual_size - offset), 0)
        return self.disk.read_at(offset, length).ljust(length, b"\0")


def run(*command: str | Path) -> str:
    finished = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    assert finished.returncode == 0, f"{command}: {finished.stdout}{finished.stderr}"
    return finished.stdout
