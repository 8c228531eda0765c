"""Rewinding against a pool in memory: what is written, and what is read for it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.support.fake_pool import Fault
from tests.support.rewind_lab import RewindLab
from xbfs_engine.core.errors import (
    TransferFailed,
    UsageError,
    VmNotReady,
    XapiFailure,
)
from xbfs_engine.core.limits import KIB, MIB
from xbfs_engine.restore.rewind.report import Way

if TYPE_CHECKING:
    from pathlib import Path

BLOCK = 64 * KIB


@pytest.fixture
def lab(tmp_path: Path) -> RewindLab:
    return RewindLab(tmp_path)


def test_only_what_differs_is_written_and_the_next_increment_is_exact(lab: RewindLab) -> None:
    vm = lab.halted_vm()
    vdi = lab.pool.disk(vm, 0, content=b"first" * 50000)
    first = lab.backup(vm).point
    before = bytes(lab.pool.content[vdi])
    lab.pool.write(vdi, 10 * BLOCK, b"second" * 1000)
    lab.backup(vm)
    lab.pool.write(vdi, 20 * BLOCK, b"third")
    lab.pool.write(vdi, 3 * BLOCK, before[3 * BLOCK : 3 * BLOCK + 5])
    report = lab.rewind(vm, first)
    assert bytes(lab.pool.content[vdi]) == before
    (disk,) = report.disks
    assert (disk.way, disk.read_bytes, disk.differing_bytes) == (Way.CHANGED_BLOCKS, 2 * BLOCK, 2 * BLOCK)
    assert [(offset, length) for _, offset, length in lab.disks.written] == [
        (10 * BLOCK, BLOCK),
        (20 * BLOCK, BLOCK),
    ]
    assert lab.pool.blocked(vm) == {}
    assert lab.noted() == []
    after = lab.backup(vm).point
    assert after.disks[0].method == "cbt"
    lab.check_point(after, {0: before})


def test_after_a_safety_point_nothing_is_read_but_for_verification(lab: RewindLab) -> None:
    vm = lab.halted_vm()
    vdi = lab.pool.disk(vm, 0, content=b"first" * 50000)
    other = lab.pool.disk(vm, 2, content=b"same")
    first = lab.backup(vm).point
    before = bytes(lab.pool.content[vdi])
    lab.pool.write(vdi, 7 * BLOCK, b"x" * BLOCK)
    present = bytes(lab.pool.content[vdi])
    report = lab.rewind(vm, first, safety=True)
    assert report.safety_point is not None
    assert report.safety_point.parent == first.id
    lab.check_point(report.safety_point, {0: present, 2: bytes(lab.pool.content[other])})
    assert [disk.way for disk in report.disks] == [Way.MAPS, Way.MAPS]
    assert [disk.read_bytes for disk in report.disks] == [0, 0]
    assert lab.disks.read_bytes == BLOCK
    assert bytes(lab.pool.content[vdi]) == before
    back = lab.rewind(vm, report.safety_point)
    assert bytes(lab.pool.content[vdi]) == present
    assert back.written


def test_zeros_are_written_too(lab: RewindLab) -> None:
    vm = lab.halted_vm()
    vdi = lab.pool.disk(vm, 0, size_bytes=2 * MIB)
    first = lab.backup(vm).point
    lab.pool.write(vdi, BLOCK, b"data" * 100)
    lab.rewind(vm, first, safety=True)
    assert bytes(lab.pool.content[vdi]) == bytes(2 * MIB)


@pytest.mark.parametrize("size", [MIB, MIB + 1000 * 512, MIB + 512])
def test_a_disk_that_has_grown_keeps_its_size_and_ends_in_zeros(lab: RewindLab, size: int) -> None:
    vm = lab.halted_vm()
    vdi = lab.pool.disk(vm, 0, size_bytes=size, content=b"a" * size)
    first = lab.backup(vm).point
    lab.pool.grow(vdi, 2 * MIB)
    lab.pool.write(vdi, size - 100, b"b" * 300)
    lab.pool.write(vdi, 2 * MIB - 10, b"end")
    report = lab.rewind(vm, first, safety=True)
    assert bytes(lab.pool.content[vdi]) == b"a" * size + bytes(2 * MIB - size)
    assert (report.disks[0].size_bytes, report.disks[0].point_size_bytes) == (2 * MIB, size)
    after = lab.backup(vm).point
    lab.check_point(after, {0: b"a" * size + bytes(2 * MIB - size)})


@pytest.mark.parametrize("full_compare", [False, True])
def test_what_lies_behind_the_end_of_the_point_in_its_last_chunk_is_seen(lab: RewindLab, *, full_compare: bool) -> None:
    vm = lab.halted_vm()
    vdi = lab.pool.disk(vm, 0, size_bytes=MIB + 512, content=b"a" * (MIB + 512))
    first = lab.backup(vm).point
    lab.pool.grow(vdi, 2 * MIB)
    lab.pool.write(vdi, MIB + 1000, b"behind")
    (disk,) = lab.rewind(vm, first, full_compare=full_compare).disks
    assert disk.differing_bytes == BLOCK
    assert bytes(lab.pool.content[vdi]) == b"a" * (MIB + 512) + bytes(MIB - 512)


@pytest.mark.parametrize("doubt", ["no base", "other pool", "log gone", "list fails", "not tracked", "asked"])
def test_any_doubt_reads_and_compares_all_of_the_disk(lab: RewindLab, doubt: str) -> None:
    vm = lab.halted_vm()
    vdi = lab.pool.disk(vm, 0, content=b"first" * 50000)
    first = lab.backup(vm).point
    before = bytes(lab.pool.content[vdi])
    lab.pool.write(vdi, 10 * BLOCK, b"second")
    (base,) = lab.pool.snapshot_vdis()
    if doubt == "no base":
        lab.pool.VDI_destroy(base)
    elif doubt == "other pool":
        lab.pool.db.set(lab.pool.pool, uuid="11111111-1111-4111-8111-111111111111")
    elif doubt == "log gone":
        lab.pool.db.set(base, cbt_enabled=False)
    elif doubt == "list fails":
        lab.pool.VDI_disable_cbt(vdi)
        lab.pool.VDI_enable_cbt(vdi)
    elif doubt == "not tracked":
        lab.pool.VDI_disable_cbt(vdi)
    (disk,) = lab.rewind(vm, first, full_compare=doubt == "asked").disks
    assert (disk.way, disk.read_bytes, disk.differing_bytes) == (Way.FULL, 4 * MIB, BLOCK)
    assert disk.reason
    assert bytes(lab.pool.content[vdi]) == before
    assert len(lab.disks.written) == 1


def test_a_dry_run_says_what_would_be_written_and_touches_nothing(lab: RewindLab) -> None:
    vm = lab.halted_vm()
    vdi = lab.pool.disk(vm, 0, content=b"first" * 50000)
    first = lab.backup(vm).point
    lab.pool.write(vdi, 10 * BLOCK, b"second")
    state = lab.state()
    lab.pool.diary.clear()
    report = lab.rewind(vm, first, safety=True, dry_run=True)
    assert (report.disks[0].differing_bytes, report.disks[0].exact, report.written) == (BLOCK, True, False)
    assert lab.told.plans == [list(report.disks)]
    assert lab.state() == state
    assert lab.pool.diary == []
    assert lab.noted() == []


def test_the_dry_run_of_a_running_vm_does_not_pretend_to_know(lab: RewindLab) -> None:
    vm = lab.pool.vm("web")
    vdi = lab.pool.disk(vm, 0, content=b"first" * 50000)
    first = lab.backup(vm).point
    lab.pool.write(vdi, 10 * BLOCK, b"second")
    lab.backup(vm)
    report = lab.rewind(vm, first, dry_run=True)
    assert (report.disks[0].differing_bytes, report.disks[0].exact) == (BLOCK, False)
    assert lab.disks.reads == []


def test_nothing_to_write_blocks_nothing_for_long(lab: RewindLab) -> None:
    vm = lab.halted_vm()
    lab.pool.disk(vm, 0, content=b"first")
    first = lab.backup(vm).point
    report = lab.rewind(vm, first)
    assert not report.written
    assert lab.disks.written == []
    assert lab.pool.blocked(vm) == {}


def test_a_running_vm_is_stopped_and_started_when_told_so(lab: RewindLab) -> None:
    vm = lab.pool.vm("web")
    vdi = lab.pool.disk(vm, 0, content=b"first")
    first = lab.backup(vm).point
    before = bytes(lab.pool.content[vdi])
    lab.pool.write(vdi, 0, b"second")
    with pytest.raises(VmNotReady, match="runs"):
        lab.rewind(vm, first)
    report = lab.rewind(vm, first, stop=True, start=True, safety=True)
    assert report.started
    assert lab.pool.db.text(vm, "power_state") == "Running"
    assert bytes(lab.pool.content[vdi]) == before
    methods = lab.pool.methods()
    assert methods.index("VM.clean_shutdown") < methods.index("VM.snapshot", methods.index("VM.clean_shutdown"))
    assert methods[-1] == "VM.start"


def test_a_guest_that_does_not_stop_is_left_alone(lab: RewindLab) -> None:
    vm = lab.pool.vm("web")
    vdi = lab.pool.disk(vm, 0, content=b"first")
    first = lab.backup(vm).point
    lab.pool.write(vdi, 0, b"second")
    lab.pool.deaf_guest = True
    with pytest.raises(VmNotReady, match="did not shut down") as caught:
        lab.rewind(vm, first, stop=True, start=True)
    assert "never switched off hard" in caught.value.hint
    assert lab.pool.blocked(vm) == {}
    assert "VM.start" not in lab.pool.methods()


def test_a_vm_that_we_stopped_runs_again_when_nothing_came_of_it(lab: RewindLab) -> None:
    vm = lab.pool.vm("web")
    lab.pool.disk(vm, 0, content=b"first")
    first = lab.backup(vm).point
    lab.pool.faults += [Fault("VM.snapshot", "SR_FULL")]
    with pytest.raises(XapiFailure):
        lab.rewind(vm, first, safety=True, stop=True, start=True)
    assert lab.pool.db.text(vm, "power_state") == "Running"
    assert lab.pool.blocked(vm) == {}


@pytest.mark.parametrize("state", ["Suspended", "Paused"])
def test_a_vm_with_memory_is_refused(lab: RewindLab, state: str) -> None:
    vm = lab.halted_vm()
    lab.pool.disk(vm, 0, content=b"first")
    first = lab.backup(vm).point
    lab.pool.db.set(vm, power_state=state)
    with pytest.raises(VmNotReady, match=state.lower()):
        lab.rewind(vm, first, stop=True)


def test_disks_that_are_gone_are_refused_and_added_ones_stay_and_are_named(lab: RewindLab) -> None:
    vm = lab.halted_vm()
    vdi = lab.pool.disk(vm, 0, content=b"first")
    first = lab.backup(vm).point
    added = lab.pool.disk(vm, 5, content=b"added", name_label="added since")
    lab.pool.write(vdi, 0, b"second")
    report = lab.rewind(vm, first)
    assert report.untouched == ["disk 5 (added since)"]
    assert lab.pool.content[added][:5] == b"added"
    (vbd,) = [vbd for vbd in lab.pool.db.refs(vm, "VBDs") if lab.pool.db.text(vbd, "VDI") == vdi]
    lab.pool.db.destroy(vbd)
    with pytest.raises(VmNotReady, match="no longer has these disks") as caught:
        lab.rewind(vm, first)
    assert "xbfs restore" in caught.value.hint


def test_a_reverted_vm_is_rewound_by_position_only_when_asked(lab: RewindLab) -> None:
    vm = lab.halted_vm()
    vdi = lab.pool.disk(vm, 0, content=b"first" * 50000)
    first = lab.backup(vm).point
    before = bytes(lab.pool.content[vdi])
    lab.pool.write(vdi, 10 * BLOCK, b"second")
    lab.pool.revert(vm)
    with pytest.raises(VmNotReady) as caught:
        lab.rewind(vm, first)
    assert "--full-compare" in caught.value.hint
    (disk,) = lab.rewind(vm, first, full_compare=True).disks
    assert disk.way is Way.FULL
    assert [bytes(data) for ref, data in lab.pool.content.items() if lab.pool.uuid(ref) == disk.vdi_uuid] == [before]


def test_a_point_of_another_vm_and_a_disk_in_use_elsewhere_are_refused(lab: RewindLab) -> None:
    vm, other = lab.halted_vm(), lab.pool.vm("other")
    vdi = lab.pool.disk(vm, 0, content=b"first")
    first = lab.backup(vm).point
    with pytest.raises(UsageError, match="is of VM 'web'"):
        lab.rewind(other, first)
    lab.pool.vbd(other, vdi, 3, currently_attached=True)
    with pytest.raises(VmNotReady, match="attached to 'other'"):
        lab.rewind(vm, first)


def test_what_nbd_can_not_read_comes_over_https(lab: RewindLab) -> None:
    vm = lab.halted_vm()
    vdi = lab.pool.disk(vm, 0, content=b"first")
    first = lab.backup(vm).point
    lab.pool.write(vdi, 0, b"second")
    lab.disks.nbd_error = TransferFailed("hung up")
    lab.rewind(vm, first)
    assert {way for way, _ in lab.disks.reads} == {"stream"}
    assert lab.pool.content[vdi][:6] == b"first\0"
