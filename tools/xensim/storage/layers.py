"""Layers: sparse files that know which 4 KiB units they hold; a disk is read through a chain of them.

A layer has one writer at a time (the caller sees to it); any number of threads may read while it is written. Files
live as long as the object: a reader that still holds a layer may go on after its disk is gone.
"""

from __future__ import annotations

import os
import weakref
from itertools import pairwise
from typing import TYPE_CHECKING, Final

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

UNIT: Final = 4096
"""Bytes that are present or absent in a layer as one; sizes of disks are multiples of it."""
BLOCK: Final = 2 << 20
"""What the BAT of a VHD counts."""
# A VHD block on disk: bitmap sector and data, aligned by tapdisk to a pitch of 4104 sectors (blktap libvhd.c).
VHD_PITCH: Final = 4104 * 512
_COPY_BYTES: Final = 4 << 20


class Layer:
    """The part of a disk that was written between two snapshots. The file appears with the first write."""

    def __init__(self, path: Path, size_bytes: int) -> None:
        assert size_bytes % UNIT == 0
        self._path = path
        self._fd = -1
        self.units: NDArray[np.bool_] = np.zeros(size_bytes // UNIT, dtype=np.bool_)
        self.blocks: NDArray[np.bool_] = np.zeros(-(-size_bytes // BLOCK), dtype=np.bool_)

    @property
    def size_bytes(self) -> int:
        """Bytes the layer can hold."""
        return len(self.units) * UNIT

    @property
    def empty(self) -> bool:
        """Whether nothing was ever written."""
        return self._fd < 0

    def grow(self, size_bytes: int) -> None:
        """Make room up to ``size_bytes``; what is there stays."""
        self.units = _longer(self.units, size_bytes // UNIT)
        self.blocks = _longer(self.blocks, -(-size_bytes // BLOCK))

    def open(self) -> int:
        """The descriptor, for writing whole units that are then told to ``add``."""
        if self._fd < 0:
            self._fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            weakref.finalize(self, _discard, self._fd, self._path)
        return self._fd

    def write(self, offset_bytes: int, data: bytes | bytearray | memoryview) -> None:
        """Whole units only."""
        view = memoryview(data)
        assert offset_bytes % UNIT == 0
        assert len(view) % UNIT == 0
        assert offset_bytes + len(view) <= self.size_bytes
        fd, done = self.open(), 0
        while done < len(view):
            done += os.pwrite(fd, view[done:], offset_bytes + done)
        self.add(offset_bytes, len(view))

    def add(self, offset_bytes: int, length_bytes: int) -> None:
        """The units of this range are present from now on (their bytes were written before)."""
        end_bytes = offset_bytes + length_bytes
        self.units[offset_bytes // UNIT : -(-end_bytes // UNIT)] = True
        self.blocks[offset_bytes // BLOCK : -(-end_bytes // BLOCK)] = True

    def read_into(self, offset_bytes: int, view: memoryview) -> None:
        """Bytes of present units; behind the end of the file there are zeros."""
        done = 0
        while done < len(view):
            count = os.preadv(self._fd, [view[done:]], offset_bytes + done)
            if count == 0:
                view[done:] = bytes(len(view) - done)
                return
            done += count

    def link(self, uuid: str) -> None:
        """The layer of a disk becomes that of the base ``uuid`` too; only layers that are files on a share care."""

    def hide(self) -> None:
        """No disk is the layer any more."""

    def remove(self) -> None:
        """The disk is destroyed."""

    def stored_bytes(self) -> int:
        """Bytes the layer would take as a VHD file."""
        return vhd_overhead(self.size_bytes) + int(self.blocks.sum()) * VHD_PITCH

    def absorb(self, other: Layer) -> None:
        """Take over everything ``other`` holds, over what is here."""
        self.grow(other.size_bytes)
        for first, last, present in runs(other.units, 0, len(other.units)):
            if present:
                offset = first * UNIT
                copy_range(other.open(), offset, self.open(), offset, (last - first) * UNIT)
                self.add(offset, (last - first) * UNIT)


def _discard(fd: int, path: Path) -> None:
    os.close(fd)
    path.unlink(missing_ok=True)


def runs(units: NDArray[np.bool_], first: int, last: int) -> Iterator[tuple[int, int, bool]]:
    """Cut [first, last) into runs (start, end, present); what lies behind the end of ``units`` is absent."""
    inside = units[first:last]
    if len(inside):
        edges = (np.flatnonzero(inside[1:] != inside[:-1]) + 1 + first).tolist()
        for start, end in pairwise([first, *edges, first + len(inside)]):
            yield start, end, bool(units[start])
    behind = first + len(inside)
    if behind < last:
        yield behind, last, False


def read_chain(layers: Sequence[Layer], offset_bytes: int, view: memoryview) -> None:
    """Fill ``view`` with the bytes of a disk, topmost layer first; zeros where no layer has anything."""
    end_bytes = offset_bytes + len(view)
    missing = [(offset_bytes // UNIT, -(-end_bytes // UNIT))]
    for layer in layers:
        left: list[tuple[int, int]] = []
        for lower, upper in missing:
            for first, last, present in runs(layer.units, lower, upper):
                if present:
                    start, end = max(first * UNIT, offset_bytes), min(last * UNIT, end_bytes)
                    layer.read_into(start, view[start - offset_bytes : end - offset_bytes])
                else:
                    left.append((first, last))
        missing = left
        if not missing:
            return
    for first, last in missing:
        start, end = max(first * UNIT, offset_bytes), min(last * UNIT, end_bytes)
        view[start - offset_bytes : end - offset_bytes] = bytes(end - start)


def allocated(layers: Sequence[Layer], size_bytes: int) -> NDArray[np.bool_]:
    """Which 2 MiB blocks of a disk some layer has written to, as the BATs of a chain tell."""
    found = np.zeros(-(-size_bytes // BLOCK), dtype=np.bool_)
    for layer in layers:
        found[: len(layer.blocks)] |= layer.blocks
    return found


def vhd_overhead(size_bytes: int) -> int:
    """Headers, BAT and batmap of a VHD, in bytes."""
    entries = -(-size_bytes // BLOCK)
    bat_sectors, batmap_sectors = -(-entries * 4 // 512), -(-entries // (8 * 512))
    return 512 * (2 + 2 + bat_sectors + 1 + batmap_sectors)


def _longer(flags: NDArray[np.bool_], length: int) -> NDArray[np.bool_]:
    return np.concatenate([flags, np.zeros(max(0, length - len(flags)), dtype=np.bool_)])


def copy_range(source: int, source_offset: int, target: int, target_offset: int, length_bytes: int) -> int:
    """Copy between files, inside the kernel where it can; returns the bytes copied (fewer at the end of a file)."""
    done, clone = 0, True
    while done < length_bytes:
        want = length_bytes - done
        if clone:
            try:
                count = os.copy_file_range(source, target, want, source_offset + done, target_offset + done)
            except OSError:
                clone = False
                continue
        else:
            data = os.pread(source, min(want, _COPY_BYTES), source_offset + done)
            count = os.pwrite(target, data, target_offset + done) if data else 0
        if count == 0:
            break
        done += count
    return done


def data_ranges(fd: int, size_bytes: int) -> Iterator[tuple[int, int]]:
    """Ranges (offset, length) of a file that are not holes."""
    offset = 0
    while offset < size_bytes:
        try:
            start = os.lseek(fd, offset, os.SEEK_DATA)
        except OSError:  # ENXIO: only a hole is left
            return
        offset = min(os.lseek(fd, start, os.SEEK_HOLE), size_bytes)
        if start < offset:
            yield start, offset - start
