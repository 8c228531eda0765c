"""Disks of any size with scattered data and no filesystem, and scattered changes to any disk: for benchmarks.

The same arguments give the same bytes. Works block by block: memory does not grow with the disk.
"""

from __future__ import annotations

import os
import random
from typing import TYPE_CHECKING

from images import disk

if TYPE_CHECKING:
    from pathlib import Path

_RUN_BLOCKS = 16  # data lies in runs of 1 MiB
_PAGE_BYTES = 4096


def make_sparse(path: Path, *, size_bytes: int, data_bytes: int, seed: int) -> None:
    """A new sparse file with ``data_bytes`` (to the next 64 KiB) of data in runs spread evenly over it."""
    blocks, data = size_bytes // disk.CBT_BLOCK_BYTES, -(-data_bytes // disk.CBT_BLOCK_BYTES)
    if data > blocks:
        raise disk.ImageError(f"{data_bytes} bytes of data do not fit a disk of {size_bytes} bytes")
    disk.create(path, size_bytes)
    chance = random.Random(seed)
    runs = -(-data // _RUN_BLOCKS)
    with path.open("r+b", buffering=0) as file:
        for number in range(runs):
            # The disk in as many slots as there are runs, each run somewhere in its own slot.
            low, high = number * blocks // runs, (number + 1) * blocks // runs
            length = (number + 1) * data // runs - number * data // runs
            start = low + chance.randrange(high - low - length + 1)
            payload = b"".join(_block(chance) for _ in range(length))
            os.pwrite(file.fileno(), payload, start * disk.CBT_BLOCK_BYTES)


def mutate(path: Path, *, fraction: float, seed: int) -> list[int]:
    """Rewrite pages in ``fraction`` of the blocks that hold data, in place; returns the changed blocks' numbers."""
    chance = random.Random(seed)
    size_bytes = path.stat().st_size
    with path.open("r+b", buffering=0) as file:
        present = list(disk.data_blocks(file.fileno(), size_bytes))
        changed = sorted(chance.sample(present, min(len(present), max(1, round(len(present) * fraction)))))
        for block in changed:
            start = block * disk.CBT_BLOCK_BYTES
            pages = max(1, min(disk.CBT_BLOCK_BYTES, size_bytes - start) // _PAGE_BYTES)
            for page in chance.sample(range(pages), min(pages, chance.choice((1, 1, 2, 4, 16)))):
                _change_page(file.fileno(), start + page * _PAGE_BYTES, chance)
    return changed


def _change_page(descriptor: int, offset: int, chance: random.Random) -> None:
    old = os.pread(descriptor, _PAGE_BYTES, offset)
    new = bytearray(chance.randbytes(len(old) // 2) + old[len(old) // 2 :])
    new[0] = old[0] ^ 0xFF  # changed for certain
    os.pwrite(descriptor, new, offset)


def _block(chance: random.Random) -> bytes:
    """64 KiB: half of the blocks incompressible, half like a table of records that compresses about threefold."""
    if chance.random() < 0.5:
        return chance.randbytes(disk.CBT_BLOCK_BYTES)
    return b"".join(chance.randbytes(20) + b" record of a table with fixed words.       " for _ in range(1024))
