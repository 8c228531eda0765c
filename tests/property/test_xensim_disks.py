"""Disks of the simulator: whatever layers are split and merged, a disk has its bytes and its log tells the changes.

Against a model of plain bytes in any order of steps, and with a guest and the coalescer as threads.
"""

from __future__ import annotations

import tempfile
import threading
import uuid as uuids
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import ClassVar

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from tools.xensim.failures import Failure
from tools.xensim.storage import coalesce
from tools.xensim.storage.store import DiskStore

KIB = 1024
BLOCK = 64 * KIB


def test_snapshots_hold_still_while_guest_and_coalescer_work(tmp_path: Path) -> None:
    """Threads in earnest: what a snapshot read at first it reads at last, and no change goes untold."""
    store, size, over = DiskStore(tmp_path), 64 * BLOCK, threading.Event()
    disk = str(uuids.UUID(int=1))
    store.create(disk, "sr", size)
    store.tracking.enable(disk, size, attached=True)

    def guest() -> None:
        number = 0
        while not over.is_set():
            number += 1
            store.write(disk, number * 7919 % (size - 9000), number.to_bytes(8, "little") * (1 + number % 1000))

    def collector() -> None:
        while not over.is_set():
            coalesce.step(store, lambda node: True)

    with ThreadPoolExecutor() as pool:
        work = [pool.submit(guest), pool.submit(collector)]
        try:
            taken = []
            for number in range(2, 62):
                taken.append((str(uuids.UUID(int=number)), b""))
                store.snapshot(disk, taken[-1][0], tracked=True)
                taken[-1] = (taken[-1][0], store.read(taken[-1][0], 0, size))
                if len(taken) > 10:
                    store.destroy(taken.pop(number * 5 % len(taken))[0])
        finally:
            over.set()
        for task in work:
            task.result()
    while coalesce.step(store, lambda node: True):
        pass
    for (older, before), (newer, after) in pairwise(taken):
        assert store.read(newer, 0, size) == after
        bits = store.tracking.changes(older, newer)
        for block in range(size // BLOCK):
            same = before[block * BLOCK :][:BLOCK] == after[block * BLOCK :][:BLOCK]
            assert same or bits[block // 8] & (0x80 >> block % 8)


class Disks(RuleBasedStateMachine):
    """Writes, snapshots, clones, growth and destruction in any order, with the coalescer at work."""

    REST: ClassVar = ("drop", "restart", "grow", "merge", "merge")
    SIZES: ClassVar = (640 * KIB, 704 * KIB, 1088 * KIB)

    def __init__(self) -> None:
        super().__init__()
        self.made = 1
        self.place = tempfile.TemporaryDirectory()
        self.store = DiskStore(Path(self.place.name))
        self.content: dict[str, bytearray] = {}  # also of disks whose data are destroyed
        self.leaves: list[str] = []  # disks that are written
        self.lines: list[
            list[tuple[str, set[int]]]
        ] = []  # tracked VDIs, oldest first, and the blocks written before each

    def teardown(self) -> None:
        self.place.cleanup()

    @initialize()
    def begin(self) -> None:
        uuid = str(uuids.UUID(int=self.made))
        self.store.create(uuid, "sr", self.SIZES[0])
        self.leaves.append(uuid)
        self.content[uuid] = bytearray(self.SIZES[0])
        self.enable(uuid)

    def pick(self, data: st.DataObject, among: list[str]) -> str:
        return data.draw(st.sampled_from(among))

    def line(self, uuid: str) -> tuple[list[tuple[str, set[int]]], int] | None:
        for line in self.lines:
            for number, (member, _) in enumerate(line):
                if member == uuid:
                    return line, number
        return None

    def enable(self, uuid: str) -> None:
        self.store.tracking.enable(uuid, len(self.content[uuid]), attached=False)
        self.lines.append([(uuid, set())])

    @rule(data=st.data(), kind=st.sampled_from([*["write", "split"] * 2, "write", "clone", "destroy", *REST]))
    def step(self, data: st.DataObject, kind: str) -> None:
        """One rule for all, so that swarms of hypothesis leave nothing out."""
        kept = [one for one in self.content if self.store.find(one)]
        tracked = [one for one in kept if one not in self.leaves and self.line(one)]
        match kind:
            case "write":
                self.write(self.pick(data, self.leaves), data)
            case "split" | "clone" if len(self.content) < 12:
                self.split(self.pick(data, kept if kind == "clone" else self.leaves), tracked=kind == "split")
            case "destroy":
                self.destroy(self.pick(data, list(self.content)))
            case "drop" if tracked:
                self.store.drop_data(self.pick(data, tracked))
            case "restart":
                self.restart(self.pick(data, self.leaves))
            case "grow":
                self.grow(self.pick(data, self.leaves), data.draw(st.sampled_from(self.SIZES)))
            case "merge":
                self.coalesce(data.draw(st.integers(1, 20)))

    def write(self, uuid: str, data: st.DataObject) -> None:
        content = self.content[uuid]
        offset = data.draw(st.integers(0, len(content) - 1))
        length = min(data.draw(st.integers(1, 100_000)), len(content) - offset)
        piece = bytes([data.draw(st.integers(0, 255))]) * length
        self.store.write(uuid, offset, piece)
        content[offset : offset + length] = piece
        if found := self.line(uuid):
            found[0][found[1]][1].update(range(offset // BLOCK, (offset + length - 1) // BLOCK + 1))

    def split(self, uuid: str, *, tracked: bool) -> None:
        self.made += 1
        new = str(uuids.UUID(int=self.made))
        self.store.snapshot(uuid, new, tracked=tracked)
        self.content[new] = bytearray(self.content[uuid])
        if not tracked:
            self.leaves.append(new)
        elif found := self.line(uuid):
            line, number = found
            line[number:] = [(new, line[number][1]), (uuid, set())]

    def destroy(self, uuid: str) -> None:
        if uuid in self.leaves and len(self.leaves) == 1:
            return
        self.store.destroy(uuid)
        del self.content[uuid]
        if uuid in self.leaves:
            self.leaves.remove(uuid)
        if found := self.line(uuid):
            line, number = found
            if number + 1 < len(line):
                line[number + 1][1].update(line[number][1])
            del line[number]

    def restart(self, uuid: str) -> None:
        self.store.tracking.disable(uuid)
        if found := self.line(uuid):
            found[0].pop(found[1])
        self.enable(uuid)

    def grow(self, uuid: str, size: int) -> None:
        more = size - len(self.content[uuid])
        if more > 0:
            self.store.resize(uuid, size)
            self.content[uuid] += bytes(more)

    def coalesce(self, steps: int) -> None:
        for _ in range(steps):
            if coalesce.step(self.store, lambda node: True) is None:
                hidden = [node for node in self.store.nodes.values() if node.hidden]
                assert all(len(self.store.children(node)) > 1 for node in hidden)
                break

    @invariant()
    def every_disk_has_its_bytes(self) -> None:
        for uuid, content in self.content.items():
            if self.store.find(uuid):
                assert self.store.read(uuid, 0, len(content)) == content

    @invariant()
    def changes_are_the_blocks_written(self) -> None:
        for line in self.lines:
            for older in range(len(line)):
                for newer in range(len(line)):
                    self.compare(line, older, newer)

    def compare(self, line: list[tuple[str, set[int]]], older: int, newer: int) -> None:
        source, target = line[older][0], line[newer][0]
        if older >= newer:
            with pytest.raises(Failure, match="460"):
                self.store.tracking.changes(source, target)
            return
        bitmap = self.store.tracking.changes(source, target)
        told = {i for i in range(len(bitmap) * 8) if bitmap[i // 8] & (0x80 >> i % 8)}
        assert told == set().union(*(blocks for _, blocks in line[older + 1 : newer + 1]))
        before, after = self.content[source], self.content[target]
        assert len(bitmap) == (-(-len(after) // BLOCK) + 7) // 8
        before = before + bytes(len(after) - len(before))
        for start in range(0, len(after), BLOCK):
            if before[start : start + BLOCK] != after[start : start + BLOCK]:
                assert start // BLOCK in told


Disks.TestCase.settings = settings(max_examples=30, stateful_step_count=40, deadline=None)
TestDisks = Disks.TestCase
