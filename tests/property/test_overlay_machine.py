"""An overlay against plain bytes: whatever a guest does to it, and however often it is opened again."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from threading import Event

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from tests.support.disks import CHUNK, MemoryDisk
from xbfs.view.overlay import Layer, Overlay, create_overlay, open_overlay
from xbfs_engine.core.runtime import SystemClock

UNIT = 4096
SIZE_MAX = 5 * CHUNK
offsets = st.one_of(
    st.integers(0, SIZE_MAX),
    st.builds(lambda unit, more: max(0, unit * UNIT + more), st.integers(0, SIZE_MAX // UNIT), st.integers(-2, 2)),
)
lengths = st.one_of(st.integers(0, 3 * UNIT), st.integers(0, 40).map(lambda units: units * UNIT))


class OverlayMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.directory = Path(tempfile.mkdtemp(prefix="overlay-"))

    @initialize(size=st.one_of(st.just(3 * CHUNK), offsets), chunks=st.sets(st.integers(0, 4)))
    def begin(self, size: int, chunks: set[int]) -> None:
        self.base = MemoryDisk.holding(size, [number for number in chunks if number * CHUNK < size])
        self.original = self.base.read_at(0, size)
        self.overlay: Overlay = create_overlay(self.directory / "o", self.base, identity=b"disk 1")
        self.content = bytearray(self.original)
        self.limit = size

    def range(self, offset: int, length: int) -> tuple[int, int]:
        offset = min(offset, len(self.content))
        return offset, min(length, len(self.content) - offset)

    @rule(offset=offsets, length=lengths, fill=st.integers(1, 255), cut=st.integers(0, UNIT))
    def write(self, offset: int, length: int, fill: int, cut: int) -> None:
        offset, length = self.range(offset, length)
        data = bytes((fill + at // 100) % 256 for at in range(length))
        self.overlay.write_at(offset, [data[:cut], memoryview(data)[cut:]])
        self.content[offset : offset + length] = data

    @rule(offset=offsets, length=lengths, discard=st.booleans())
    def zero(self, offset: int, length: int, discard: bool) -> None:
        offset, length = self.range(offset, length)
        (self.overlay.discard if discard else self.overlay.write_zeroes)(offset, length)
        self.content[offset : offset + length] = bytes(length)

    @rule(size=offsets)
    def resize(self, size: int) -> None:
        self.overlay.resize(size)
        self.limit = min(self.limit, size)
        self.content = self.content[:size].ljust(size, b"\0")

    @rule(share=st.one_of(st.none(), st.integers(1, 5)))
    def hydrate(self, share: int | None) -> None:
        """All of the base, or until some of it was copied."""
        stop = Event()

        def on_progress(done: int, total: int) -> None:
            assert done <= total
            if share is not None and done * 5 >= total * share:
                stop.set()

        self.overlay.hydrate(rate_bytes_s=None, clock=SystemClock(), stop=stop, on_progress=on_progress)
        assert self.overlay.is_hydrated or share is not None

    @rule()
    def flush(self) -> None:
        self.overlay.flush()

    @rule()
    def reopen(self) -> None:
        self.overlay.close()
        self.overlay = open_overlay(self.directory / "o", self.base, identity=b"disk 1")

    @rule(offset=offsets, length=lengths)
    def read(self, offset: int, length: int) -> None:
        expected = self.content[offset : offset + length]
        assert self.overlay.read_at(offset, length) == expected
        assert b"".join(self.overlay.parts_at(offset, length)) == expected
        cached = self.overlay.read_cached(offset, length)
        assert cached is None or bytes(cached) == expected

    @rule(offset=offsets, length=lengths)
    def ask_for_extents(self, offset: int, length: int) -> None:
        at, before = offset, None
        for extent in self.overlay.extents(offset, length):
            assert extent.offset == at
            assert extent.length > 0
            assert extent.is_data is not before
            if not extent.is_data:
                assert not any(self.content[at : at + extent.length])
            at, before = at + extent.length, extent.is_data
        assert at == max(offset, min(offset + length, len(self.content)))

    @invariant()
    def regions_tell_the_truth(self) -> None:
        at, before = 0, None
        for offset, length, layer in self.overlay.regions(0, 1 << 40):
            assert offset == at
            assert layer is not before
            piece = self.content[at : at + length]
            if layer is Layer.ZERO:
                assert not any(piece)
            elif layer is Layer.BASE:
                assert at + length <= self.limit
                assert piece == self.original[at : at + length]
            at, before = at + length, layer
        assert at == self.overlay.size_bytes == len(self.content)

    def teardown(self) -> None:
        try:
            if hasattr(self, "overlay"):
                self.check_all()
                self.overlay.close()
        finally:
            shutil.rmtree(self.directory)

    def check_all(self) -> None:
        assert self.overlay.read_at(0, 1 << 40) == self.content
        changed = list(self.overlay.changed_extents())
        assert changed == [r for r in self.overlay.regions(0, 1 << 40) if r.layer is not Layer.BASE]
        in_data = sum(-(-r.length // UNIT) for r in changed if r.layer is Layer.DATA) * UNIT
        assert self.overlay.data_bytes == in_data <= self.overlay.dirty_bytes
        assert self.base.read_at(0, 1 << 40) == self.original


TestOverlayMachine = OverlayMachine.TestCase
TestOverlayMachine.settings = settings(
    max_examples=60, stateful_step_count=30, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
