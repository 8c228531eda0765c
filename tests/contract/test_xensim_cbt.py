"""Changed block tracking of the simulator: bytes of the logs, errors, and the whole against a model of plain bytes."""

from __future__ import annotations

import base64
import struct
import tempfile
import threading
import uuid as uuids
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from tests.support.xensim import BACKUP_USER, MIB, XenSim, default_world, running_sim
from tests.support.xensim_client import Api, login
from tools.xensim.failures import Failure
from tools.xensim.storage import coalesce
from tools.xensim.storage.store import DiskStore

if TYPE_CHECKING:
    from collections.abc import Iterator

KIB = 1024
BLOCK = 64 * KIB


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sim")


@pytest.fixture(scope="module")
def sim(state: Path) -> Iterator[XenSim]:
    vms = [
        {"name": "vm", "disks": [{"sr": "nfs", "size": 6 * MIB}]},
        {"name": "raw", "disks": [{"sr": "lvm", "size": 4 * MIB, "sm_config": {"type": "raw"}}]},
    ]
    with running_sim(default_world(vms=vms, users=[BACKUP_USER]), state, time_scale=0.01) as running:
        running.fault("storage.gc", "fail", times=1 << 30)
        yield running


@pytest.fixture
def api(sim: XenSim) -> Iterator[Api]:
    session = login(sim)
    yield session
    session.logout()


@pytest.fixture
def vdi(sim: XenSim, api: Api) -> Iterator[str]:
    """A tracked disk of its own for each test."""
    made = str(api.VDI.copy(api.VDI.get_by_uuid(sim.disks("vm")[0]), api.SR.get_by_name_label("nfs")[0]))
    api.VDI.enable_cbt(made)
    yield made
    for one in [*api.VDI.get_snapshots(made), made]:
        api.VDI.destroy(one)


def changed(api: Api, older: str, newer: str) -> bytes:
    return base64.b64decode(api.VDI.list_changed_blocks(older, newer), validate=True)


def log_of(state: Path, uuid: str) -> Path:
    (found,) = state.glob(f"sr-*/{uuid}.cbtlog")
    return found


def test_logs_have_the_layout_of_cbt_util_and_go_with_the_snapshot(
    state: Path, sim: XenSim, api: Api, vdi: str
) -> None:
    uuid = api.VDI.get_uuid(vdi)
    sim.guest_write(uuid, 0, b"x")
    sim.guest_write(uuid, 9 * BLOCK - 1, b"xy")
    assert log_of(state, uuid).read_bytes() == (
        bytes(32) + b"\x01\0\0\0" + bytes(4) + struct.pack("<Q", 6 * MIB) + b"\x01\x03" + bytes(10)
    )
    snapshot = api.VDI.get_uuid(api.VDI.snapshot(vdi, {}))
    old, new = log_of(state, snapshot).read_bytes(), log_of(state, uuid).read_bytes()
    assert old[:32] == bytes(16) + uuids.UUID(uuid).bytes
    assert old[48:] == b"\x01\x03" + bytes(10)
    assert new[:32] == uuids.UUID(snapshot).bytes + bytes(16)
    assert new[48:] == bytes(12)


def test_the_bitmap_has_the_highest_bit_first_and_adds_up(sim: XenSim, api: Api, vdi: str) -> None:
    uuid = api.VDI.get_uuid(vdi)
    snapshots = [api.VDI.snapshot(vdi, {})]
    for block in (0, 9):
        sim.guest_write(uuid, block * BLOCK, b"x")
        snapshots.append(api.VDI.snapshot(vdi, {}))
    assert changed(api, snapshots[0], snapshots[1]) == b"\x80" + bytes(11)
    assert changed(api, snapshots[1], snapshots[2]) == b"\x00\x40" + bytes(10)
    assert changed(api, snapshots[0], snapshots[2]) == b"\x80\x40" + bytes(10)
    sim.guest_write(uuid, 95 * BLOCK, b"x")
    assert changed(api, snapshots[2], vdi) == bytes(11) + b"\x01"


def test_growth_lengthens_the_bitmap_and_marks_nothing(sim: XenSim, api: Api, vdi: str) -> None:
    first = api.VDI.snapshot(vdi, {})
    sim.guest_write(api.VDI.get_uuid(vdi), 0, b"x")
    api.VDI.resize(vdi, str(8 * MIB))
    second = api.VDI.snapshot(vdi, {})
    assert changed(api, first, second) == b"\x80" + bytes(15)


def test_metadata_keep_their_place_in_the_chain_and_pass_their_bits_on(sim: XenSim, api: Api, vdi: str) -> None:
    uuid, snapshots = api.VDI.get_uuid(vdi), []
    for block in range(3):
        sim.guest_write(uuid, block * BLOCK, b"x")
        snapshots.append(api.VDI.snapshot(vdi, {}))
    for _ in range(2):
        api.VDI.data_destroy(snapshots[0])
        assert api.VDI.get_type(snapshots[0]) == "cbt_metadata"
    assert changed(api, snapshots[0], snapshots[2])[0] == 0b01100000
    api.VDI.data_destroy(snapshots[1])
    api.VDI.destroy(snapshots[1])
    assert changed(api, snapshots[0], snapshots[2])[0] == 0b01100000
    with pytest.raises(api.Failure, match="VDI_INCOMPATIBLE_TYPE"):
        api.VDI.snapshot(snapshots[0], {})


def test_what_breaks_a_chain_is_an_error(sim: XenSim, api: Api, vdi: str) -> None:
    first = api.VDI.snapshot(vdi, {})
    with pytest.raises(api.Failure, match=r"SR_BACKEND_FAILURE_460.*same"):
        changed(api, first, first)
    clone = api.VDI.clone(first, {})
    with pytest.raises(api.Failure, match="VDI_NO_CBT_METADATA"):
        changed(api, first, clone)
    api.VDI.destroy(clone)
    api.VDI.disable_cbt(vdi)
    api.VDI.disable_cbt(vdi)
    with pytest.raises(api.Failure, match="VDI_NO_CBT_METADATA"):
        changed(api, first, vdi)
    api.VDI.enable_cbt(vdi)
    second = api.VDI.snapshot(vdi, {})
    for older, newer in ((first, second), (second, first)):
        with pytest.raises(api.Failure, match=r"SR_BACKEND_FAILURE_460.*unrelated"):
            changed(api, older, newer)
    api.VDI.destroy(first)
    with pytest.raises(api.Failure, match="HANDLE_INVALID"):
        changed(api, first, second)


@pytest.mark.parametrize("moment", ["snapshot", "resize"])
def test_a_log_that_cannot_follow_ends_with_a_message(sim: XenSim, api: Api, vdi: str, moment: str) -> None:
    first = api.VDI.snapshot(vdi, {})
    sim.fault(f"cbt.{moment}", "fail")
    if moment == "snapshot":
        assert not api.VDI.get_cbt_enabled(api.VDI.snapshot(vdi, {}))
    else:
        api.VDI.resize(vdi, str(8 * MIB))
    sim.clear()
    sim.fault("storage.gc", "fail", times=1 << 30)
    assert api.VDI.get_cbt_enabled(first)
    assert not api.VDI.get_cbt_enabled(vdi)
    message = sim.dump("message")["message"][-1]
    assert (message["name"], message["obj_uuid"]) == (f"VDI_CBT_{moment.upper()}_FAILED", api.VDI.get_uuid(vdi))


def test_a_log_of_the_wrong_size_is_inconsistent(state: Path, sim: XenSim, api: Api, vdi: str) -> None:
    first, second = api.VDI.snapshot(vdi, {}), api.VDI.snapshot(vdi, {})
    with log_of(state, api.VDI.get_uuid(second)).open("r+b") as file:
        file.seek(40)
        file.write(struct.pack("<Q", 4 * MIB))
    with pytest.raises(api.Failure, match="SR_BACKEND_FAILURE_459"):
        changed(api, first, second)


def test_refusals_of_enable_and_data_destroy(sim: XenSim, api: Api, vdi: str) -> None:
    snapshot = api.VDI.snapshot(vdi, {})
    with pytest.raises(api.Failure, match="OPERATION_NOT_ALLOWED"):
        api.VDI.enable_cbt(snapshot)
    with pytest.raises(api.Failure, match="OPERATION_NOT_ALLOWED"):
        api.VDI.data_destroy(vdi)
    with pytest.raises(api.Failure, match="SR_BACKEND_FAILURE_66"):
        api.VDI.enable_cbt(api.VDI.get_by_uuid(sim.disks("raw")[0]))
    pool = sim.dump("pool")["pool"][0]
    sim.do("set", cls="pool", uuid=pool["uuid"], fields={"restrictions": {"restrict_cbt": "true"}})
    with pytest.raises(api.Failure, match=r"LICENCE_RESTRICTION.*CBT"):
        api.VDI.enable_cbt(vdi)
    assert len(changed(api, snapshot, vdi)) == 12, "only enable_cbt is licensed"
    sim.do("set", cls="pool", uuid=pool["uuid"], fields={"restrictions": pool["restrictions"]})
    api.VDI.disable_cbt(vdi)
    untracked = api.VDI.snapshot(vdi, {})
    with pytest.raises(api.Failure, match="VDI_NO_CBT_METADATA"):
        api.VDI.data_destroy(untracked)


def test_data_destroy_waits_four_seconds_for_vbds(sim: XenSim, api: Api) -> None:
    """Seconds of the pool, that is: 0.04 of ours."""
    disk = api.VDI.get_by_uuid(sim.disks("vm")[0])
    api.VDI.enable_cbt(disk)
    vm = api.VM.snapshot(api.VM.get_by_name_label("vm")[0], "point", [])
    (vbd,) = api.VM.get_VBDs(vm)
    snapshot = api.VBD.get_VDI(vbd)
    assert api.VDI.get_snapshot_of(snapshot) == disk
    with pytest.raises(api.Failure, match=r"VDI_IN_USE.*data_destroy"):
        api.VDI.data_destroy(snapshot)
    api.VM.destroy(vm)
    api.VDI.data_destroy(snapshot)
    api.VDI.destroy(snapshot)
    api.VDI.disable_cbt(disk)


def test_a_crash_of_the_host_costs_the_log(tmp_path: Path) -> None:
    vms = [{"name": "vm", "power_state": "Running", "disks": [{"sr": "nfs", "size": 4 * MIB}]}]
    with running_sim(default_world(vms=vms, users=[BACKUP_USER]), tmp_path, time_scale=0.01) as sim:
        api = login(sim)
        vm, uuid = api.VM.get_by_name_label("vm")[0], sim.disks("vm")[0]
        vdi = api.VDI.get_by_uuid(uuid)
        api.VDI.enable_cbt(vdi)
        with pytest.raises(api.Failure, match=r"VDI_IN_USE.*list_changed_blocks"):
            changed(api, api.VDI.snapshot(vdi, {}), vdi)
        api.VM.hard_shutdown(vm)
        api.VM.start(vm, False, False)
        assert api.VDI.get_cbt_enabled(vdi), "a shutdown in good order keeps the log"
        sim.do("crash_host", host=api.host.get_name_label(api.VM.get_resident_on(vm)))
        assert api.VDI.get_cbt_enabled(vdi)
        assert log_of(tmp_path, uuid).read_bytes()[32] == 0
        api.VM.start(vm, False, False)
        assert not api.VDI.get_cbt_enabled(vdi)
        (message,) = sim.dump("message")["message"]
        assert (message["name"], message["obj_uuid"]) == ("VDI_CBT_METADATA_INCONSISTENT", uuid)
        assert not list(tmp_path.glob(f"sr-*/{uuid}.cbtlog"))
        api.logout()


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
