"""The window: buffers never overlap while somebody may write or read them, memory is bounded, nothing is lost."""

from __future__ import annotations

from collections import deque
from random import Random  # noqa: TID251 - the seed decides
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xbfs_engine.core.errors import TransferFailed
from xbfs_engine.source.nbd.window import PIECE_SIZE, Fetch, Window

if TYPE_CHECKING:
    from xbfs_engine.source.base import Extent

KIB = 1 << 10
RING = PIECE_SIZE + KIB
SIZE = 64 * PIECE_SIZE
_EVENTS = ["claim", "take", "arrive", "read", "break", "other"]
_WEIGHTS = [4, 4, 4, 4, 1, 1]


@st.composite
def piece_lists(draw: st.DrawFn) -> list[Extent]:
    offset, pieces = 0, []
    for _ in range(draw(st.integers(0, 40))):
        offset += draw(st.sampled_from([0, 1, 512, 5000]))
        length = draw(st.one_of(st.integers(1, 64 * KIB), st.integers(1, PIECE_SIZE)))
        pieces.append((offset, length))
        offset += length
    return pieces


@settings(max_examples=80, deadline=None)
@given(piece_lists(), st.integers(0, 1 << 32))
def test_any_order_of_events(pieces: list[Extent], seed: int) -> None:
    """Connections fetch in any order and break now and then; readers come late, early, or unannounced."""
    chance = Random(seed)
    wakes = 0

    def wake() -> None:
        nonlocal wakes
        wakes += 1

    window = Window(SIZE, RING, wake)
    window.announce(iter(pieces))
    unread, flying = deque(pieces), list[Fetch]()
    reading: list[tuple[Extent, Fetch]] = []
    asleep = False
    while unread or reading:
        what = chance.choices(_EVENTS, _WEIGHTS)[0]
        if what == "claim" and unread and len(reading) < 4:
            # Mostly in order; sometimes the reader behind is faster.
            at = chance.randint(0, min(2, len(unread) - 1))
            piece = unread[at]
            del unread[at]
            reading.append((piece, window.claim([piece])[0]))
        elif what == "other":
            piece = (chance.randint(0, SIZE - KIB), 512)
            if piece not in pieces:
                reading.append((piece, window.claim([piece])[0]))
        elif what == "take" and not asleep:
            wakes = 0
            fetch = window.take(idle=True)
            asleep = fetch is None
            if fetch is not None:
                flying.append(fetch)
        elif what == "arrive" and flying:
            fetch = flying.pop(chance.randrange(len(flying)))
            fetch.buffer[:] = _content(fetch.start, len(fetch.buffer))
            window.arrived(fetch)
        elif what == "break":
            window.put_back(flying)
            flying = []
        elif what == "read":
            for piece, fetch in [each for each in reading if each[1].wait(0)]:
                assert bytes(fetch.wanted) == _content(*piece)
                reading.remove((piece, fetch))
                window.release(fetch)
        if asleep and wakes:
            asleep = False
        awaited = any(fetch in window._queue for _, fetch in reading)
        queued_bytes = sum(len(fetch.buffer) for fetch in window._queue)
        assert window._queue_bytes == queued_bytes
        assert not (asleep and (awaited or queued_bytes >= RING // 4)), "work, and nobody was woken"
        assert wakes <= 1, "one sleeper is woken once"
    assert window._ring is None or not pieces


def _content(offset: int, length: int) -> bytes:
    """Different at every place: eight bytes say where they are."""
    first = offset // 8
    words = np.arange(first, (offset + length) // 8 + 1, dtype="<u8").tobytes()
    return words[offset - first * 8 :][:length]


def test_the_ring_holds_no_more_than_it_has() -> None:
    window = Window(SIZE, RING, lambda: None)
    window.announce((offset, 64 * KIB) for offset in range(0, SIZE, 64 * KIB))
    taken = []
    while (fetch := window.take(idle=False)) is not None:
        taken.append(fetch)
    assert len(taken) == RING // (64 * KIB)
    window.arrived(taken[0])
    window.release(window.claim([(0, 64 * KIB)])[0])
    assert window.take(idle=False) is not None
    assert window.take(idle=False) is None


def test_small_pieces_are_fetched_in_batches_but_nobody_waits_for_a_batch() -> None:
    rung: list[None] = []
    window = Window(SIZE, RING, lambda: rung.append(None))
    pieces = [(offset, 64 * KIB) for offset in range(0, SIZE, 64 * KIB)]
    window.announce(iter(pieces))
    while (fetch := window.take(idle=True)) is not None:
        window.arrived(fetch)
    assert window.take(idle=True) is None
    free = 0
    for piece in pieces:
        window.release(window.claim([piece])[0])
        free += 64 * KIB
        if rung:
            break
    assert free - 64 * KIB < RING // 4 <= free
    assert rung == [None], "two sleep, and there is work for one"
    rung.clear()
    queued = [fetch for fetch in iter(lambda: window.take(idle=False), None)]
    window.put_back(queued[-1:])
    assert not rung
    window.claim([pieces[pieces.index((queued[-1].start, 64 * KIB))]])
    assert rung == [None]


def test_a_failure_wakes_all_who_sleep() -> None:
    rung: list[None] = []
    window = Window(SIZE, RING, lambda: rung.append(None))
    assert (window.take(idle=True), window.take(idle=True), window.take(idle=False)) == (None, None, None)
    window.fail(TransferFailed("over"))
    assert len(rung) == 2
    assert window.take(idle=True) is None
    assert window.failed
    window.fail(TransferFailed("again"))
    assert len(rung) == 2, "who comes later does not sleep"


def test_a_failure_reaches_all_who_wait_and_all_who_come() -> None:
    window = Window(SIZE, RING, lambda: None)
    window.announce(iter([(0, 512)]))
    waiting = window.claim([(0, 512), (4096, 512)])
    window.fail(TransferFailed("first"))
    window.fail(TransferFailed("second"))
    assert all(fetch.wait(0) for fetch in waiting)
    for call in (window.check, lambda: window.claim([(0, 512)])):
        with pytest.raises(TransferFailed, match="first"):
            call()
    assert window.take(idle=False) is None
