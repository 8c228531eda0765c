"""The map of an overlay with room for a few pages only, against a plain list: pages come, change, are kept and go."""

from __future__ import annotations

import tempfile
import threading
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from xbfs.view.overlay.files import make_files
from xbfs.view.overlay.unitmap import ABSENT, COPIED, DATA, PAGE_UNITS, ZERO, UnitMap

if TYPE_CHECKING:
    from collections.abc import Iterator

    from xbfs.view.overlay.files import StateFile

PAGES = 9
UNITS = PAGES * PAGE_UNITS - 100

units = st.one_of(
    st.integers(0, UNITS - 1),
    st.builds(lambda page, more: max(0, page * PAGE_UNITS + more), st.integers(0, PAGES - 1), st.integers(-5, 5)),
).map(lambda unit: min(unit, UNITS - 1))
spans = st.tuples(units, st.sampled_from([1, 1, 2, 50, PAGE_UNITS, 3 * PAGE_UNITS])).map(
    lambda span: (span[0], min(UNITS, span[0] + span[1]))
)
deeds = st.lists(
    st.one_of(
        st.tuples(st.just("mark"), spans, st.sampled_from([DATA, ZERO, COPIED])),
        st.tuples(st.just("read"), spans, st.just(0)),
        st.tuples(st.sampled_from(["flush", "fail", "take", "reopen"]), st.just((0, 0)), st.just(0)),
        st.tuples(st.just("cut"), spans, st.just(0)),
    ),
    max_size=25,
)


@contextmanager
def map_file() -> Iterator[StateFile]:
    with tempfile.TemporaryDirectory(prefix="overlay-") as directory:
        files = make_files(Path(directory) / "o")
        try:
            yield files.map
        finally:
            files.close()


def flush(states: UnitMap, *, fails: bool = False) -> None:
    pages = states.taken()
    states.write(dict(list(pages.items())[: len(pages) // 2 if fails else None]))
    (states.lost if fails else states.kept)()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(deeds)
def test_the_map_is_what_was_marked(lived: list[tuple[str, tuple[int, int], int]]) -> None:
    with map_file() as file:
        states, model = UnitMap(file, pages_max=4), bytearray(UNITS)
        underway: dict[int, bytes] = {}
        for deed, (first, last), state in lived:
            if underway and deed not in ("mark", "read"):
                states.write(underway)
                states.kept()
                underway = {}
            match deed:
                case "mark":
                    states.reserve(first, last)
                    states.mark(first, last, state)
                    model[first:last] = bytes([state]) * (last - first)
                case "read":
                    assert states.states(first, last) == model[first:last]
                    assert states.states_cached(first, last) in (None, model[first:last])
                    check_runs(states, model, first, last)
                case "take":
                    # The data's sync takes long: marks and reads go on meanwhile.
                    underway = states.taken()
                case "cut":
                    states.cut(first)
                    model[first:] = bytes(UNITS - first)
                    flush(states)
                    states.recount()
                case "reopen":
                    flush(states)
                    states = UnitMap(file, pages_max=4)
                    states.recount()
                case _:
                    flush(states, fails=deed == "fail")
            assert all(states.count(state) == model.count(state) for state in (DATA, ZERO, COPIED))
        check_runs(states, model, 0, UNITS)


def check_runs(states: UnitMap, model: bytearray, first: int, last: int) -> None:
    at = first
    for low, high, state in states.runs(first, last):
        assert low == at
        assert model[low:high] == bytes([state]) * (high - low)
        at = high
    assert at == last


def test_pages_go_when_they_can_and_only_then() -> None:
    with map_file() as file:
        states = UnitMap(file, pages_max=4)
        for page in range(8):
            states.mark(page * PAGE_UNITS, page * PAGE_UNITS + 1, DATA)
        assert states.is_crowded
        assert states.states_cached(0, 1) == bytes([DATA])
        flush(states)
        assert not states.is_crowded
        assert states.states(8 * PAGE_UNITS, 8 * PAGE_UNITS + 1) == bytes([ABSENT])
        assert states.states_cached(0, 1) is None
        assert states.states(0, 2) == bytes([DATA, ABSENT])


def test_pages_that_are_on_their_way_to_the_file_stay_until_they_are_there() -> None:
    with map_file() as file:
        states = UnitMap(file, pages_max=4)
        states.mark(0, 1, DATA)
        pages = states.taken()
        for page in range(1, 8):
            states.states(page * PAGE_UNITS, page * PAGE_UNITS + 1)
        assert states.states(0, 1) == bytes([DATA])
        states.write(pages)
        states.kept()
        for page in range(1, 8):
            states.states(page * PAGE_UNITS, page * PAGE_UNITS + 1)
        assert states.states_cached(0, 1) is None
        assert states.states(0, 1) == bytes([DATA])


def test_a_page_that_came_and_went_while_it_was_read_is_read_again() -> None:
    """A reader is held between the file and the memory; meanwhile the page is marked, flushed and leaves."""
    with map_file() as file:

        class HeldFile:
            def __getattr__(self, name: str) -> object:
                return getattr(file, name)

            def read_at(self, offset: int, length: int) -> bytes:
                content = file.read_at(offset, length)
                if threading.current_thread() is reader and not read.is_set():
                    read.set()
                    assert go_on.wait(10)
                return content

        states, read, go_on = UnitMap(HeldFile(), pages_max=4), threading.Event(), threading.Event()
        found: list[bytes] = []
        reader = threading.Thread(target=lambda: found.append(states.states(5, 6)))
        reader.start()
        assert read.wait(10)
        states.mark(5, 6, DATA)
        flush(states)
        for page in range(1, 6):
            states.states(page * PAGE_UNITS, page * PAGE_UNITS + 1)
        assert states.states_cached(5, 6) is None
        go_on.set()
        reader.join(10)
        assert found == [bytes([DATA])]
