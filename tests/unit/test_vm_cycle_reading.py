"""Disks as streams and disks that are opened late: every byte in its place, whichever thread asks first."""

from __future__ import annotations

import io
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.engine import MemorySource
from tests.support.runtime import SeededRandom
from xbfs_engine.core.errors import PoolError, SourceUnreadable, TransferFailed
from xbfs_engine.core.limits import KIB
from xbfs_engine.ingest.vm.reading import Wanted, nbd_targets, one_at_a_time
from xbfs_engine.ingest.vm.stream_disk import StreamDisk

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

SIZE = 256 * KIB
DATA = SeededRandom(3).token(SIZE)


class Bytes(io.BytesIO):
    """A transfer."""

    def readinto(self, view: memoryview) -> int:  # type: ignore[override]
        return super().readinto(view)


def stream_disk(data: bytes = DATA, size: int = SIZE) -> tuple[StreamDisk, list[str]]:
    ended: list[str] = []
    return StreamDisk(Bytes(data), size, None, lambda: ended.append("end")), ended


def read(disk: StreamDisk, offset: int, length: int) -> bytes:
    buffer = bytearray(length)
    disk.read_into(offset, memoryview(buffer))
    return bytes(buffer)


@given(st.lists(st.tuples(st.integers(0, 8 * KIB), st.integers(1, 8 * KIB)), min_size=1, max_size=20), st.data())
def test_reads_in_almost_the_announced_order(gaps: list[tuple[int, int]], data: st.DataObject) -> None:
    reads, at = [], 0
    for gap, length in gaps:
        reads.append((at + gap, length))
        at += gap + length
    reads = [read for read in reads if sum(read) <= SIZE]
    disk, ended = stream_disk()
    disk.read_ahead(iter(reads))
    for offset, length in data.draw(st.permutations(reads)):
        assert read(disk, offset, length) == DATA[offset : offset + length]
    assert ended == (["end"] if reads else []), "the sender's verdict is asked for once, after the last byte"


def test_many_threads_get_their_bytes() -> None:
    reads = [(at, 4 * KIB) for at in range(0, SIZE, 8 * KIB)]
    disk, ended = stream_disk()
    disk.read_ahead(iter(reads))
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda extent: read(disk, *extent), reads))
    assert found == [DATA[offset : offset + length] for offset, length in reads]
    assert ended == ["end"]


def test_a_stream_that_ends_early_or_late_is_an_error() -> None:
    for data in (DATA[:-1], DATA + b"x"):
        disk, ended = stream_disk(data)
        disk.read_ahead(iter([(0, 4 * KIB)]))
        with pytest.raises(TransferFailed):
            read(disk, 0, 4 * KIB)
        assert ended == []


def test_the_verdict_of_the_sender_fails_the_read() -> None:
    def refuse() -> None:
        raise TransferFailed("VDI_IO_ERROR")

    disk = StreamDisk(Bytes(DATA), SIZE, None, refuse)
    disk.read_ahead(iter([(0, 512), (512, 512)]))
    read(disk, 0, 512)
    with pytest.raises(TransferFailed, match="VDI_IO_ERROR"):
        read(disk, 512, 512)


def test_what_was_not_announced_can_not_be_read() -> None:
    disk, _ = stream_disk()
    disk.read_ahead(iter([(0, 512)]))
    with pytest.raises(SourceUnreadable):
        read(disk, 512, 512)


async def test_disks_are_opened_when_they_are_read_and_closed_before_the_next() -> None:
    events: list[str] = []

    @asynccontextmanager
    async def way(wanted: Wanted) -> AsyncIterator[MemorySource]:
        events.append(f"open {wanted.vdi_ref}")
        yield MemorySource.of(DATA)
        events.append(f"close {wanted.vdi_ref}")

    async with one_at_a_time() as shelf:
        disks = [shelf.disk(Wanted(name, SIZE, None), way) for name in ("a", "b")]
        assert list(disks[0].data_extents()) == [(0, SIZE)]
        assert events == []
        for disk in disks:
            disk.read_ahead(iter([(0, 512)]))
            buffer = bytearray(512)
            async with trio.open_nursery() as nursery:
                for _ in range(3):
                    nursery.start_soon(trio.to_thread.run_sync, partial(disk.read_into, 0, memoryview(buffer)))
            assert buffer == DATA[:512]
    assert events == ["open a", "close a", "open b", "close b"]


async def test_a_disk_that_can_not_be_opened_fails_its_readers() -> None:
    @asynccontextmanager
    async def way(_: Wanted) -> AsyncIterator[MemorySource]:
        raise TransferFailed("refused")
        yield

    async def work() -> None:
        async with one_at_a_time() as shelf:
            disk = shelf.disk(Wanted("a", SIZE, None), way)
            await trio.to_thread.run_sync(partial(disk.read_into, 0, memoryview(bytearray(512))))

    with pytest.raises(TransferFailed, match="refused"):
        await work()


class Answers:
    """A pool that answers get_nbd_info."""

    def __init__(self, answer: object) -> None:
        self.answer = answer

    async def call(self, method: str, *_: object, timeout_s: float = 1.0) -> object:
        del method, timeout_s
        return self.answer


GOOD = {"address": "10.0.0.1", "port": "10809", "exportname": "/x?session_id=s", "cert": "PEM", "subject": "host1"}


async def test_nbd_targets_prefer_ipv4_and_hide_the_export() -> None:
    found = await nbd_targets(Answers([GOOD | {"address": "fe80::1"}, GOOD]), "ref")  # type: ignore[arg-type]
    assert [target.host for target in found] == ["10.0.0.1", "fe80::1"]
    assert "session" not in repr(found)


@given(
    st.one_of(
        st.text(max_size=3),
        st.lists(
            st.one_of(
                st.integers(),
                st.dictionaries(st.sampled_from(sorted(GOOD)), st.one_of(st.text(max_size=4), st.integers())),
            ),
            min_size=1,
            max_size=3,
        ),
    )
)
@settings(max_examples=50)
def test_garbage_for_targets_is_a_typed_error(answer: object) -> None:
    async def ask() -> None:
        try:
            await nbd_targets(Answers(answer), "ref")  # type: ignore[arg-type]
        except PoolError:
            return
        assert isinstance(answer, list)

    trio.run(ask)
