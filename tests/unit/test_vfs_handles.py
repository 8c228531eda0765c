"""An open image: what is cached is answered at once, reading in order is noticed and decoded ahead."""

from __future__ import annotations

import itertools
import random  # noqa: TID251 - seeded
from typing import TYPE_CHECKING

import pytest

from tests.support.disks import MemoryDisk
from xbfs.vfs.handles import PIECE_BYTES, WINDOW_MAX_BYTES, ImageHandle
from xbfs_engine.core.errors import ChunkCorrupt, XbfsError
from xbfs_engine.core.limits import KIB, MIB

if TYPE_CHECKING:
    from collections.abc import Callable

SIZE = 64 * MIB


class FakeImage:
    """A disk none of which is cached, and a note of what was to be decoded ahead."""

    def __init__(self, size: int) -> None:
        self.access = MemoryDisk(size, {})
        self.access.cold = set(range(size // (64 * KIB)))
        self.warmed: list[tuple[int, int]] = []

    def warm(self, offset: int, length: int) -> None:
        self.warmed.append((offset, length))


class FakePool:
    """Does everything at once; takes ``room`` calls of read-ahead."""

    def __init__(self) -> None:
        self.room = 1000
        self.runs = 0

    async def run(self, call: Callable[[], bytes], timeout_s: float) -> bytes:
        self.runs += 1
        return call()

    def offer(self, call: Callable[[], None]) -> bool:
        if self.room == 0:
            return False
        self.room -= 1
        call()
        return True


class Opened:
    def __init__(self, size: int = SIZE) -> None:
        self.image, self.pool = FakeImage(size), FakePool()
        self.failures: list[tuple[int, int, XbfsError]] = []
        self.handle = ImageHandle(
            self.image,  # type: ignore[arg-type]  # a fake
            self.pool,  # type: ignore[arg-type]  # a fake
            timeout_s=30,
            failed=lambda offset, size, problem: self.failures.append((offset, size, problem)),
        )

    async def read(self, offset: int, size: int) -> bytes | memoryview:
        data = self.handle.read_cached(offset, size)
        return await self.handle.read(offset, size) if data is None else data


async def test_what_is_cached_needs_no_thread() -> None:
    opened = Opened()
    opened.image.access.cold = set()
    assert await opened.read(4096, 100) == bytes(100)
    assert opened.pool.runs == 0
    opened.image.access.cold = {0}
    assert await opened.read(4096, 100) == bytes(100)
    assert opened.pool.runs == 1


async def test_reading_in_order_is_decoded_ahead_once_and_within_the_window() -> None:
    opened = Opened()
    step = 128 * KIB
    for offset in range(0, SIZE, step):
        await opened.read(offset, step)
        ahead = max((start + length for start, length in opened.image.warmed), default=0)
        assert ahead <= offset + step + WINDOW_MAX_BYTES + PIECE_BYTES
        if offset > 4 * MIB:
            assert ahead >= min(offset + step + WINDOW_MAX_BYTES, SIZE)
    spans = opened.image.warmed
    assert all(length <= PIECE_BYTES for _, length in spans)
    for (start, length), (after, _) in itertools.pairwise(spans):
        assert start + length == after, "nothing twice, nothing left out"


async def test_random_reads_decode_nothing_ahead() -> None:
    size = 1024 * MIB
    opened = Opened(size)
    seeded = random.Random(1)
    for _ in range(300):
        await opened.read(seeded.randrange(size // 4096) * 4096, 4096)
    assert opened.image.warmed == []


@pytest.mark.parametrize("order", [(1, 0, 3, 2), (0, 2, 1, 3)])
async def test_reads_sent_several_at_once_are_still_in_order(order: tuple[int, ...]) -> None:
    opened = Opened()
    for base in range(0, 16 * MIB, 4 * MIB):
        for number in order:
            await opened.read(base + number * MIB, MIB)
    assert max(start + length for start, length in opened.image.warmed) >= 16 * MIB


async def test_a_jump_starts_over() -> None:
    opened = Opened()
    for number in range(4):
        await opened.read(number * MIB, MIB)
    before = len(opened.image.warmed)
    await opened.read(40 * MIB, MIB)
    assert len(opened.image.warmed) == before
    await opened.read(41 * MIB, MIB)
    await opened.read(42 * MIB, MIB)
    assert all(start >= 40 * MIB for start, _ in opened.image.warmed[before:])
    assert len(opened.image.warmed) > before


async def test_a_full_pool_gets_no_more() -> None:
    opened = Opened()
    opened.pool.room = 0
    for number in range(8):
        await opened.read(number * MIB, MIB)
    assert opened.image.warmed == []
    opened.pool.room = 1000
    await opened.read(8 * MIB, MIB)
    assert opened.image.warmed[0][0] >= 8 * MIB, "what was read meanwhile is not decoded again"


async def test_a_failed_read_is_told_and_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    opened = Opened()

    def fail(offset: int, length: int) -> bytes:
        raise ChunkCorrupt("bad")

    monkeypatch.setattr(opened.image.access, "read_at", fail)
    with pytest.raises(ChunkCorrupt):
        await opened.read(4096, 8192)
    assert [(offset, size) for offset, size, _ in opened.failures] == [(4096, 8192)]
