"""A restore point of a real repository under sessions: whatever guests do and commits add, it stays as it is.

Two sessions lie over the same point through the layers that a live server has, raw and VHD. Not a byte that was in the
repository before may change or go, and who opens the repository anew reads what was backed up.
"""

from __future__ import annotations

import shutil

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, invariant, rule

from tests.property.test_overlay_machine import OverlayMachine, lengths, offsets
from tests.support.disks import CHUNK, MemoryDisk
from tests.support.engine import Engine, MemorySource, blobs
from xbfs.instant.bases import Bases
from xbfs.instant.session import DiskFormat, Export, Session, SessionDisk
from xbfs.view.overlay import Overlay, create_overlay

SIZE = 3 * CHUNK


class PointMachine(OverlayMachine):
    """The inherited machine is the first session's guest; ``self.content`` is what it has written."""

    @initialize(chunks=st.sets(st.integers(0, 2), min_size=1))
    def begin(self, chunks: set[int]) -> None:  # type: ignore[override]
        engine = self.engine = Engine.fresh(self.directory / "cache")
        disk = MemoryDisk.holding(SIZE, sorted(chunks))
        self.original = disk.read_at(0, SIZE)
        self.point = engine.backup(self.original)
        self.blobs = blobs(engine.storage)
        self.committed_size = SIZE
        bases = Bases(engine.repository, engine.catalog, engine.index)
        self.base = bases.of(self.session(DiskFormat.RAW))["0"]
        self.overlay: Overlay = create_overlay(self.directory / "o", self.base, identity=b"disk 1")
        self.content = bytearray(self.original)
        self.limit = SIZE
        other = bases.of(self.session(DiskFormat.VHD))["0"]
        self.other: Overlay = create_overlay(self.directory / "other", other, identity=b"disk 1")
        self.other_content = bytearray(other.read_at(0, 1 << 40))

    def session(self, disk_format: DiskFormat) -> Session:
        disk = SessionDisk(0, disk_format, "0")
        return Session("s", self.point.id, "vm", 0, Export.FILE, (disk,))

    @rule(offset=offsets, length=lengths, fill=st.integers(1, 255))
    def write_other(self, offset: int, length: int, fill: int) -> None:
        offset = min(offset, len(self.other_content))
        data = bytes([fill]) * min(length, len(self.other_content) - offset)
        self.other.write_at(offset, [data])
        self.other_content[offset : offset + len(data)] = data

    @rule()
    def commit(self) -> None:
        """What the first guest's disk is becomes a point, unless it is smaller than the last one: maps only grow."""
        if len(self.content) < self.committed_size:
            return
        self.committed_size = len(self.content)
        changed = [(region.offset, region.length) for region in self.overlay.changed_extents()]
        made = self.engine.backup(MemorySource(len(self.content), {0: bytes(self.content)}), changed=changed)
        assert made.id != self.point.id
        assert self.engine.read(made.disks[0]) == self.content

    @invariant()
    def what_was_there_stays(self) -> None:
        now = blobs(self.engine.storage)
        assert {name: now.get(name) for name in self.blobs} == self.blobs

    def check_all(self) -> None:
        super().check_all()
        assert self.other.read_at(0, 1 << 40) == self.other_content
        again = Engine(self.engine.storage, self.directory / "again")
        again.catalog.refresh()
        assert again.read(again.catalog.find(self.point.id).disks[0]) == self.original

    def teardown(self) -> None:
        try:
            super().teardown()
        finally:
            if hasattr(self, "other"):
                self.other.close()
            shutil.rmtree(self.directory, ignore_errors=True)


TestPointMachine = PointMachine.TestCase
TestPointMachine.settings = settings(
    max_examples=15, stateful_step_count=25, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
