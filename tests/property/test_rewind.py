"""Rewinds of random VMs: after each the disks equal the point, byte by byte, and the next increment is exact."""

from __future__ import annotations

import tempfile
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from tests.support.rewind_lab import RewindLab
from xbfs_engine.core.errors import TransferFailed, VmNotReady, XapiFailure
from xbfs_engine.core.limits import KIB, MIB
from xbfs_engine.restore.rewind.guard import half_written
from xbfs_engine.restore.rewind.marks import ChunkMarks

if TYPE_CHECKING:
    from xbfs_engine.catalog.restore_point import RestorePoint

CHUNK = 64 * KIB
DISKS = 2
SIZE_MAX = 3 * MIB
STARTS = [b"", b"a" * (MIB // 2)]
SETS = st.sets(st.integers(0, 40))


class Rewinds(RuleBasedStateMachine):
    """One VM, its points and its way back and forth between them."""

    @initialize()
    def begin(self) -> None:
        self.directory = tempfile.TemporaryDirectory(dir="/dev/shm")
        self.lab = RewindLab(Path(self.directory.name))
        self.pool = self.lab.pool
        self.vm = self.lab.halted_vm()
        for number in range(DISKS):
            self.pool.disk(self.vm, number, size_bytes=MIB + number * 512, content=STARTS[number])
        self.points: list[tuple[RestorePoint, dict[int, bytes]]] = []
        self.back_up()

    def vdis(self) -> list[str]:
        return [self.pool.db.text(vbd, "VDI") for vbd in self.pool.db.refs(self.vm, "VBDs")]

    def contents(self) -> dict[int, bytes]:
        return {number: bytes(self.pool.content[vdi]) for number, vdi in enumerate(self.vdis())}

    @rule(disk=st.integers(0, DISKS - 1), at=st.integers(0, SIZE_MAX - 1), data=st.binary(min_size=1, max_size=200))
    def write(self, disk: int, at: int, data: bytes) -> None:
        vdi = self.vdis()[disk]
        self.pool.write(vdi, at % (len(self.pool.content[vdi]) - len(data)), data)

    @rule(disk=st.integers(0, DISKS - 1), chunk=st.integers(0, 15), chunks=st.integers(1, 3))
    def wipe(self, disk: int, chunk: int, chunks: int) -> None:
        size = len(self.pool.content[self.vdis()[disk]])
        end = min((chunk + chunks) * CHUNK, size)
        self.pool.write(self.vdis()[disk], chunk * CHUNK, bytes(end - chunk * CHUNK))

    @rule(disk=st.integers(0, DISKS - 1), kib=st.integers(1, 600))
    def grow(self, disk: int, kib: int) -> None:
        vdi = self.vdis()[disk]
        size = len(self.pool.content[vdi]) + kib * KIB
        if size <= SIZE_MAX:
            self.pool.grow(vdi, size)

    @rule(disk=st.integers(0, DISKS - 1), on=st.booleans())
    def switch_tracking(self, disk: int, *, on: bool) -> None:
        self.pool.VDI_disable_cbt(self.vdis()[disk])
        if on:
            self.pool.VDI_enable_cbt(self.vdis()[disk])

    @rule(which=st.integers(0, DISKS - 1))
    def lose_a_base(self, which: int) -> None:
        bases = self.pool.snapshot_vdis()
        if which < len(bases):
            self.pool.VDI_destroy(bases[which])

    @rule()
    def back_up(self) -> None:
        if half_written(self.pool.blocked(self.vm)) is None:
            point = self.lab.backup(self.vm).point
            self.lab.check_point(point, self.contents())
            self.points.append((point, self.contents()))

    @rule(which=st.integers(0, 9), safety=st.booleans(), full_compare=st.booleans(), nbd=st.booleans())
    def rewind(self, which: int, *, safety: bool, full_compare: bool, nbd: bool) -> None:
        self.lab.disks.nbd_offered = nbd
        point, wanted = self.points[which % len(self.points)]
        present = self.contents()
        was_half = half_written(self.pool.blocked(self.vm)) is not None
        written = len(self.lab.disks.written)
        report = self.lab.rewind(self.vm, point, safety=safety, full_compare=full_compare)
        grown = {n: content + bytes(len(present[n]) - len(content)) for n, content in wanted.items()}
        assert self.contents() == grown
        assert self.pool.blocked(self.vm) == {}
        assert self.lab.noted() == []
        if report.safety_point is not None:
            assert safety
            assert not was_half
            self.lab.check_point(report.safety_point, present)
            self.points.append((report.safety_point, present))
        for _, offset, length in self.lab.disks.written[written:]:
            assert length
            assert offset % CHUNK == 0
        if grown == present and full_compare:
            assert len(self.lab.disks.written) == written
        self.back_up()

    @rule(which=st.integers(0, 9), safety=st.booleans(), write=st.integers(0, 4))
    def rewind_that_breaks(self, which: int, write: int, *, safety: bool) -> None:
        point, wanted = self.points[which % len(self.points)]
        present, left = self.contents(), write

        def break_off() -> None:
            nonlocal left
            if not left:
                raise TransferFailed("hung up")
            left -= 1

        self.lab.disks.before_write = break_off
        with suppress(TransferFailed):
            self.lab.rewind(self.vm, point, safety=safety)
        self.lab.disks.before_write = lambda: None
        grown = {n: content + bytes(len(present[n]) - len(content)) for n, content in wanted.items()}
        if self.contents() not in (present, grown):
            assert half_written(self.pool.blocked(self.vm)) is not None
            with pytest.raises(XapiFailure, match="OPERATION_BLOCKED"):
                self.lab.backup(self.vm)

    @rule(which=st.integers(0, 9))
    def dry_run(self, which: int) -> None:
        state = self.lab.state()
        point, _ = self.points[which % len(self.points)]
        with suppress(VmNotReady):
            self.lab.rewind(self.vm, point, dry_run=True, safety=True)
        assert self.lab.state() == state

    def teardown(self) -> None:
        if hasattr(self, "directory"):
            self.directory.cleanup()


TestRewinds = Rewinds.TestCase
TestRewinds.settings = settings(
    max_examples=12, stateful_step_count=14, deadline=None, suppress_health_check=list(HealthCheck)
)


@given(SETS, st.integers(1, 40 * CHUNK), st.integers(1, 9))
def test_marks_are_a_set(marked: set[int], size: int, most: int) -> None:
    count = -(-size // CHUNK)
    marks = ChunkMarks(size, CHUNK)
    inside = {position for position in marked if position < count}
    for position in inside:
        marks.add(position, position + 1)
    runs = list(marks.runs())
    assert [position for first, end in runs for position in range(first, end)] == sorted(inside)
    assert all(end < after for (_, end), (after, _) in pairwise(runs))
    batches = list(marks.batches(most))
    assert [position for runs in batches for first, end in runs for position in range(first, end)] == sorted(inside)
    assert all(sum(end - first for first, end in runs) == most for runs in batches[:-1])
    assert all(0 < sum(end - first for first, end in runs) <= most for runs in batches[-1:])
    extents = [marks.extent(first, end) for first, end in marks.runs()]
    assert sum(length for _, length in extents) == marks.marked_bytes
    assert all(offset + length <= size for offset, length in extents)
    assert ChunkMarks(size, CHUNK, full=True).marked_bytes == size


@given(SETS, SETS, SETS)
def test_replacing_marks_where_others_know_better(known: set[int], where: set[int], by: set[int]) -> None:
    marks, places, better = (ChunkMarks(41 * CHUNK, CHUNK) for _ in range(3))
    for target, positions in ((marks, known), (places, where), (better, by)):
        for position in positions:
            target.add(position, position + 1)
    marks.replace(places, better)
    found = {position for first, end in marks.runs() for position in range(first, end)}
    assert found == (known - where) | (by & where)
