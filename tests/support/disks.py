"""Disks and images for tests: a sparse disk in memory, and helpers to make and write images of it.

A MemoryDisk is immutable but for `cold`, which a test may change between reads; any thread may read it.
"""

from __future__ import annotations

import hashlib
import os
from typing import TYPE_CHECKING

import numpy as np

from xbfs.view.base import Extent, RandomAccess
from xbfs.view.synthetic import SyntheticImage
from xbfs_engine.formats.vhd import VhdDynamicLayout, VhdFixedLayout, vhd_block_count

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

CHUNK = 64 << 10
VHD_BLOCK = 2 << 20
UUID16 = bytes.fromhex("6ba7b8109dad51d180b400c04fd430c8")
TIMESTAMP_S = 841_000_000


class MemoryDisk:
    """A disk of chunks of 64 KiB; absent chunks are holes, chunks in ``cold`` are data that is not cached."""

    def __init__(self, size_bytes: int, chunks: dict[int, bytes]) -> None:
        assert all(number * CHUNK < size_bytes and len(data) == CHUNK for number, data in chunks.items())
        self._size = size_bytes
        self._chunks = chunks
        self._numbers = np.array(sorted(chunks), np.int64)
        self.cold: set[int] = set()

    @classmethod
    def holding(cls, size_bytes: int, numbers: Iterable[int]) -> MemoryDisk:
        """Chunks of these numbers full of bytes that differ from chunk to chunk and are never zero."""
        return cls(size_bytes, {number: _content(number) for number in numbers})

    @classmethod
    def full(cls, size_bytes: int) -> MemoryDisk:
        """Every chunk holds data."""
        return cls.holding(size_bytes, range(-(-size_bytes // CHUNK)))

    @property
    def size_bytes(self) -> int:
        return self._size

    @property
    def allocated(self) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
        """Which VHD blocks of 2 MiB hold data."""
        bits = np.zeros(vhd_block_count(self._size), np.bool_)
        bits[self._numbers * CHUNK // VHD_BLOCK] = True
        return bits

    def read_at(self, offset: int, length: int) -> bytes:
        end = min(offset + length, self._size)
        parts: list[bytes] = []
        while offset < end:
            number, skip = divmod(offset, CHUNK)
            take = min(CHUNK - skip, end - offset)
            chunk = self._chunks.get(number)
            parts.append(bytes(take) if chunk is None else chunk[skip : skip + take])
            offset += take
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def parts_at(self, offset: int, length: int) -> list[bytes]:
        return [self.read_at(offset, length)]

    def parts_cached(self, offset: int, length: int) -> list[bytes | memoryview] | None:
        data = self.read_cached(offset, length)
        return None if data is None else [data]

    def read_cached(self, offset: int, length: int) -> bytes | memoryview | None:
        end = min(offset + length, self._size)
        if any(offset < (number + 1) * CHUNK and number * CHUNK < end for number in self.cold):
            return None
        return self.read_at(offset, length)

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        end = min(offset + length, self._size)
        position = max(offset, 0)
        low, high = np.searchsorted(self._numbers, (offset // CHUNK, -(-end // CHUNK)))
        run_end = position
        for number in self._numbers[low:high].tolist() if position < end else ():
            if number * CHUNK > run_end:
                if run_end > position:
                    yield Extent(position, run_end - position, True)
                yield Extent(run_end, number * CHUNK - run_end, False)
                position = number * CHUNK
            run_end = min((number + 1) * CHUNK, end)
        if run_end > position:
            yield Extent(position, run_end - position, True)
        if run_end < end:
            yield Extent(run_end, end - run_end, False)


def dynamic_vhd(disk: MemoryDisk) -> SyntheticImage:
    layout = VhdDynamicLayout(disk.size_bytes, disk.allocated, uuid16=UUID16, timestamp_s=TIMESTAMP_S)
    return SyntheticImage(layout, disk)


def fixed_vhd(disk: MemoryDisk) -> SyntheticImage:
    return SyntheticImage(VhdFixedLayout(disk.size_bytes, uuid16=UUID16, timestamp_s=TIMESTAMP_S), disk)


def write_sparse(image: RandomAccess, path: Path) -> None:
    """The image as a file whose holes are holes."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        os.ftruncate(fd, image.size_bytes)
        for extent in image.extents(0, image.size_bytes):
            if extent.is_data:
                for offset in range(extent.offset, extent.offset + extent.length, 4 << 20):
                    take = min(4 << 20, extent.offset + extent.length - offset)
                    assert os.pwrite(fd, image.read_at(offset, take), offset) == take
    finally:
        os.close(fd)


def _content(number: int) -> bytes:
    digest = hashlib.blake2b(number.to_bytes(8, "big"), digest_size=64).digest()
    return bytes(byte | 1 for byte in digest) * (CHUNK // 64)
