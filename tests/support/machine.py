"""The whole engine against a dictionary of bytes: backups of growing disks with crashes, errors and several writers.

Every committed point reads back exactly, always; a run that failed is visible only if its manifest had been put.
"""

from __future__ import annotations

import base64
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import mkdtemp
from typing import TYPE_CHECKING

import trio
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.support.engine import CHUNK, LEAF, Engine, MemorySource, make_repository, pattern
from tests.support.faulty_storage import Fault, FaultyStorage, Kind, Mode, SimulatedCrash
from tests.support.runtime import FixedClock
from xbfs_engine.core.errors import StorageError
from xbfs_engine.core.limits import GIB, KIB
from xbfs_engine.maintain.verify import verify
from xbfs_engine.source.cbt import parse_changed
from xbfs_engine.storage.memory import MemoryStorage

if TYPE_CHECKING:
    from collections.abc import Iterable

    from xbfs_engine.core.ids import PointId
    from xbfs_engine.ingest.backup import BackupRun
    from xbfs_engine.source.base import Extent

VMS = ("vm-a", "vm-b")
DISKS = (0, 3)
Chunks = dict[int, bytes]
Content = dict[int, tuple[int, Chunks]]
"""Disk number to size and chunks that are not zero."""

_SIZES = st.sampled_from([2 * CHUNK + 5, LEAF - 1, LEAF, 2 * LEAF + 777, 3 * CHUNK, 0, 1, GIB - 1, GIB + CHUNK + 1])
_GROWTHS = st.sampled_from([1, 100, CHUNK, LEAF - 3, GIB])
_POSITIONS = st.sampled_from([0, 1, -1, 2, 63, 64, 16384])
"""The first chunks, the last one, and both sides of what ends a leaf and an inner node; modulo the disk's size."""
_CONTENTS = st.integers(0, 12)
_PUT_FAULTS = st.sampled_from(
    [Mode.BEFORE, Mode.AFTER, Mode.TORN, Mode.TRUNCATED, Mode.CRASH_BEFORE, Mode.CRASH_AFTER, Mode.LATENCY]
)
_WRITES = st.lists(st.tuples(st.sampled_from(DISKS), _POSITIONS, _CONTENTS), max_size=8)
_VM = st.sampled_from(VMS)
_SOME_DISKS = st.sets(st.sampled_from(DISKS), min_size=1)
_BOTH = st.booleans()


@dataclass
class ModelDisk:
    """A virtual disk. ``dirty``: chunks written since the VM's newest point; None if that point lacks the disk."""

    size: int
    chunks: Chunks = field(default_factory=dict)
    dirty: set[int] | None = None

    @property
    def count(self) -> int:
        return -(-self.size // CHUNK)

    def write(self, position: int, data: bytes) -> None:
        if not self.size:
            return
        position %= self.count
        data = data[: self.size - position * CHUNK]
        self.chunks.pop(position, None)
        if any(data):
            self.chunks[position] = data
        if self.dirty is not None:
            self.dirty.add(position)

    def grow(self, by: int) -> None:
        """What is new reads as zero, and no bitmap marks it."""
        last = self.size // CHUNK
        self.size += by
        if last in self.chunks:
            self.chunks[last] = self.chunks[last].ljust(min(CHUNK, self.size - last * CHUNK), b"\0")

    def source(self, *, everything: bool) -> MemorySource:
        """As an image; ``everything``: one that can not say where its holes are."""
        extents = [(0, self.size)] if everything and self.size <= 3 * LEAF else None
        return MemorySource(self.size, {at * CHUNK: data for at, data in self.chunks.items()}, extents)

    def bitmap(self, more: Iterable[int]) -> list[Extent]:
        """The changed blocks as XAPI tells them, and those of ``more`` besides."""
        assert self.dirty is not None
        bits = bytearray(-(-self.count // 8))
        for position in [*self.dirty, *(each % self.count for each in more if self.count)]:
            bits[position // 8] |= 0x80 >> position % 8
        return parse_changed(base64.encodebytes(bits), self.size)


def _bytes_of(number: int) -> bytes:
    """Thirteen contents, so that duplicates abound: zeros, compressible, nearly zero, random."""
    if number == 0:
        return bytes(CHUNK)
    if number < 4:
        return bytes([number]) * CHUNK
    if number == 4:
        return bytes(CHUNK - 1) + b"\1"
    return pattern(number)


class EngineMachine(RuleBasedStateMachine):
    """Two processes, two VMs with two disks each, one storage."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(mkdtemp(prefix="xbfs-machine-"))
        self.storage = MemoryStorage()
        make_repository(self.storage)
        self.clock = FixedClock()
        self.engines = [self.process(number) for number in range(2)]
        self.points: dict[PointId, Content] = {}
        self.torn: set[PointId] = set()
        self.vms: dict[str, dict[int, ModelDisk]] = {}

    def process(self, number: int, *faults: Fault) -> Engine:
        """A process. The first two have a cache each; a third shares the first's."""
        return Engine(FaultyStorage(self.storage, faults), self.folder / f"cache-{number % 2}", clock=self.clock)

    def teardown(self) -> None:
        cold = Engine(self.storage, self.folder / "cold", clock=self.clock)
        self.check_points(cold)
        assert {hit.point for hit in verify(cold.repository).points_hit} == self.torn
        shutil.rmtree(self.folder)

    @initialize(sizes=st.lists(_SIZES, min_size=4, max_size=4))
    def make_disks(self, sizes: list[int]) -> None:
        left = iter(sizes)
        self.vms = {vm: {number: ModelDisk(next(left)) for number in DISKS} for vm in VMS}

    @rule(vm=_VM, number=st.sampled_from(DISKS), first=_POSITIONS, count=st.integers(1, 70), content=_CONTENTS)
    def fill(self, vm: str, number: int, first: int, count: int, content: int) -> None:
        """A long stretch: random data fills several packs, zeros empty whole leaves."""
        disk = self.vms[vm][number]
        for at in range(first, first + count):
            disk.write(at, pattern(1000 + at) if content > 6 else _bytes_of(content))

    @rule(vm=_VM, number=st.sampled_from(DISKS), by=_GROWTHS)
    def grow(self, vm: str, number: int, by: int) -> None:
        if self.vms[vm][number].size < 4 * GIB:
            self.vms[vm][number].grow(by)

    @rule(
        vm=_VM,
        numbers=_SOME_DISKS,
        writes=_WRITES,
        process=st.integers(0, 1),
        threads=st.integers(1, 3),
        everything=_BOTH,
        new=_BOTH,
    )
    def full_backup(
        self,
        vm: str,
        numbers: set[int],
        writes: list[tuple[int, int, int]],
        process: int,
        threads: int,
        *,
        everything: bool,
        new: bool,
    ) -> None:
        self.write(vm, writes)
        disks = {n: (self.vms[vm][n].source(everything=everything), None) for n in numbers}
        run = self.engines[process].run(disks, vm_uuid=vm, threads=threads, new_chain=new)
        self.committed(trio.run(run.run).id, vm, self.content(vm, numbers))

    @rule(vm=_VM, numbers=_SOME_DISKS, writes=_WRITES, process=st.integers(0, 1), more=st.lists(_POSITIONS, max_size=4))
    def incremental_backup(
        self, vm: str, numbers: set[int], writes: list[tuple[int, int, int]], process: int, more: list[int]
    ) -> None:
        self.write(vm, writes)
        run = self.incremental(self.engines[process], vm, numbers, more)
        self.committed(trio.run(run.run).id, vm, self.content(vm, numbers))

    @rule(vms=st.tuples(_VM, _VM), numbers=_SOME_DISKS, writes=_WRITES, shared_cache=_BOTH)
    def two_writers(
        self, vms: tuple[str, str], numbers: set[int], writes: list[tuple[int, int, int]], *, shared_cache: bool
    ) -> None:
        for vm in vms:
            self.write(vm, writes)
        writers = [self.engines[0], self.process(2) if shared_cache else self.engines[1]]
        runs = [self.incremental(engine, vm, numbers, []) for engine, vm in zip(writers, vms, strict=True)]
        contents = [self.content(vm, numbers) for vm in vms]

        async def both() -> list[PointId]:
            found: dict[int, PointId] = {}

            async def one(number: int) -> None:
                found[number] = (await runs[number].run()).id

            async with trio.open_nursery() as nursery:
                nursery.start_soon(one, 0)
                nursery.start_soon(one, 1)
            return [found[0], found[1]]

        for point_id, vm, content in zip(trio.run(both), vms, contents, strict=True):
            self.committed(point_id, vm, content)

    @rule(
        vm=_VM,
        numbers=_SOME_DISKS,
        writes=_WRITES,
        process=st.integers(0, 1),
        mode=_PUT_FAULTS,
        nth=st.integers(1, 7),
        full=_BOTH,
    )
    def failing_backup(
        self,
        vm: str,
        numbers: set[int],
        writes: list[tuple[int, int, int]],
        process: int,
        mode: Mode,
        nth: int,
        *,
        full: bool,
    ) -> None:
        """The nth put fails or is the last thing that this process does."""
        self.write(vm, writes)
        fault = Fault(mode, Kind.PUT, nth, delay_s=0.001)
        self.engines[process] = engine = self.process(process, fault)
        content = self.content(vm, numbers)
        disks = {n: (self.vms[vm][n].source(everything=False), None) for n in numbers}
        run = engine.run(disks, vm_uuid=vm) if full else self.incremental(engine, vm, numbers, [])
        try:
            point_id = trio.run(run.run).id
        except SimulatedCrash:
            assert mode in {Mode.CRASH_BEFORE, Mode.CRASH_AFTER}
            self.engines[process] = self.process(process)
        except StorageError:
            assert mode in {Mode.BEFORE, Mode.AFTER, Mode.TORN, Mode.TRUNCATED}
        else:
            self.engines[process] = self.process(process)  # whose fault does not wait for a later run
            self.committed(point_id, vm, content)
            return
        reader = self.process(1)
        new = {point.id for point in reader.points()} - self.points.keys()
        if mode is Mode.TRUNCATED:  # half a manifest is no point, and is reported as what it is
            self.torn |= {damaged.id for damaged in reader.catalog.damaged()}
        assert not new or mode in {Mode.AFTER, Mode.CRASH_AFTER}, "a failed run made a point visible"
        for point_id in new:
            self.committed(point_id, vm, content)

    @rule(process=st.integers(0, 1), cold=_BOTH)
    def reopen(self, process: int, *, cold: bool) -> None:
        if cold:
            shutil.rmtree(self.folder / f"cache-{process}", ignore_errors=True)
        self.engines[process] = self.process(process)

    @rule(process=st.integers(0, 1), seed=st.integers(0, 1 << 30))
    def damage_cache(self, process: int, seed: int) -> None:
        """A bit of each file of the index cache flips while nobody has it open."""
        for path in sorted((self.folder / f"cache-{process}").glob("*")):
            data = bytearray(path.read_bytes())
            data[seed % len(data)] ^= 1 << seed % 8
            path.unlink()
            path.write_bytes(data)
        self.engines[process] = self.process(process)

    @precondition(lambda self: self.points)
    @rule(process=st.integers(0, 1))
    def read_back(self, process: int) -> None:
        self.check_points(self.engines[process])

    @invariant()
    def exactly_the_committed_points_are_listed(self) -> None:
        for engine in self.engines:
            assert {point.id for point in engine.points()} == self.points.keys()

    def write(self, vm: str, writes: Iterable[tuple[int, int, int]]) -> None:
        for number, position, content in writes:
            self.vms[vm][number].write(position, _bytes_of(content))

    def incremental(self, engine: Engine, vm: str, numbers: set[int], more: list[int]) -> BackupRun:
        """By bitmap where the newest point has the disk, else in full."""
        disks = {}
        for number in numbers:
            disk = self.vms[vm][number]
            source = disk.source(everything=False)
            disks[number] = (source, None if disk.dirty is None else disk.bitmap(more))
        return engine.run(disks, vm_uuid=vm)

    def content(self, vm: str, numbers: set[int]) -> Content:
        return {number: (self.vms[vm][number].size, dict(self.vms[vm][number].chunks)) for number in numbers}

    def committed(self, point_id: PointId, vm: str, content: Content) -> None:
        assert point_id not in self.points
        self.points[point_id] = content
        for number, disk in self.vms[vm].items():
            disk.dirty = set() if number in content else None

    def check_points(self, engine: Engine) -> None:
        points = engine.points()
        assert {point.id for point in points} == self.points.keys()
        for point in points:
            content = self.points[point.id]
            assert {disk.number for disk in point.disks} == content.keys()
            for disk in point.disks:
                size, chunks = content[disk.number]
                assert disk.size_bytes == size
                assert engine.chunks(disk) == chunks
                mibs = {at * 64 * KIB >> 20 for at in chunks}
                packed = disk.data_map.bits()
                bits = {n for n in range(8 * len(packed)) if packed[n // 8] & 0x80 >> n % 8}
                assert bits == mibs, "the data map tells exactly where data is"
