"""Rewinding against a pool in memory: what is written, what is read for it, and what is left on the pool."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import trio

from tests.support.fake_pool import Fault
from tests.support.rewind_lab import RewindLab
from xbfs_engine.core.errors import (
    IntegrityError,
    SourceUnreadable,
    TransferFailed,
    UsageError,
    VmNotReady,
    XapiFailure,
)
from xbfs_engine.core.limits import KIB, MIB
from xbfs_engine.restore.rewind.guard import half_written
from xbfs_engine.restore.rewind.report import Way
from xbfs_engine.source.xapi.sweep import sweep

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


def test_a_write_that_broke_is_done_again(lab: RewindLab) -> None:
    vm = lab.halted_vm()
    vdi = lab.pool.disk(vm, 0, content=b"a" * MIB)
    first = lab.backup(vm).point
    lab.pool.write(vdi, 0, b"b")
    lab.pool.write(vdi, 8 * BLOCK, b"b")
    lab.disks.break_write_at, lab.disks.error_of_break = 1, TransferFailed("hung up")
    lab.rewind(vm, first)
    assert [offset for _, offset, _ in lab.disks.written] == [0, 0, 8 * BLOCK]
    assert bytes(lab.pool.content[vdi][:MIB]) == b"a" * MIB


def test_a_write_that_is_lost_is_found_and_the_vm_stays_blocked(lab: RewindLab) -> None:
    vm = lab.halted_vm()
    vdi = lab.pool.disk(vm, 0, content=b"a" * MIB)
    first = lab.backup(vm).point
    lab.pool.write(vdi, 0, b"b")
    lab.pool.write(vdi, 8 * BLOCK, b"b")
    lab.disks.loses_write_at = 1
    with pytest.raises(IntegrityError, match=rf"disk 0 .* at byte {8 * BLOCK} "):
        lab.rewind(vm, first, start=True, safety=True)
    assert lab.pool.db.text(vm, "power_state") == "Halted"
    assert set(lab.pool.blocked(vm)) == {"start", "start_on", "snapshot", "pool_migrate", "migrate_send"}
    assert "half-written" in lab.told.warnings[-1]
    safety = lab.engine.points()[-1]
    assert all(f"(safety point {safety.id[:16]})" in reason for reason in lab.pool.blocked(vm).values())
    # No sweep takes the mark away; it tells it.
    report = lab.run(lambda: sweep(lab.pool, lab.ledgers, node="test", dry_run=False))
    assert set(lab.pool.blocked(vm)) == {"start", "start_on", "snapshot", "pool_migrate", "migrate_send"}
    assert any("rewinding to restore point" in note.reason for note in report.notes)
    # Nobody can make a point of it; running it again ends it.
    with pytest.raises(XapiFailure, match="OPERATION_BLOCKED"):
        lab.backup(vm)
    assert lab.rewind(vm, first, safety=True).safety_point is None
    assert bytes(lab.pool.content[vdi][:MIB]) == b"a" * MIB
    assert lab.pool.blocked(vm) == {}
    lab.check_point(lab.backup(vm).point, {0: bytes(lab.pool.content[vdi])})


def test_a_second_rewind_that_fails_early_leaves_the_mark_of_the_first(lab: RewindLab) -> None:
    vm = lab.halted_vm()
    vdi = lab.pool.disk(vm, 0, content=b"a" * MIB)
    first = lab.backup(vm).point
    lab.pool.write(vdi, 0, b"b")
    lab.pool.write(vdi, 8 * BLOCK, b"b")
    lab.disks.loses_write_at = 1
    with pytest.raises(IntegrityError):
        lab.rewind(vm, first)
    for method in ("VM.set_blocked_operations", "VM.get_power_state"):
        for after in (False, True):
            lab.pool.faults += [Fault(method, "INTERNAL_ERROR", after=after)]
            with pytest.raises(XapiFailure, match="INTERNAL_ERROR"):
                lab.rewind(vm, first)
            blocked = lab.pool.blocked(vm)
            assert set(blocked) == {"start", "start_on", "snapshot", "pool_migrate", "migrate_send"}
            assert half_written(blocked) is not None
    lab.rewind(vm, first)
    assert lab.pool.blocked(vm) == {}


def test_half_written_disks_can_be_given_up(lab: RewindLab) -> None:
    vm = lab.halted_vm()
    vdi = lab.pool.disk(vm, 0, content=b"a" * MIB)
    first = lab.backup(vm).point
    lab.pool.write(vdi, 0, b"b")
    lab.pool.db.set(vm, blocked_operations={"destroy": "somebody's", "start": "theirs"})
    lab.disks.loses_write_at = 0
    with pytest.raises(IntegrityError):
        lab.rewind(vm, first)
    left = lab.abandon(vm)
    assert left is not None
    assert (left.node, left.point, left.safety) == ("test", first.id[:16], "")
    assert lab.pool.blocked(vm) == {"destroy": "somebody's", "start": "theirs"}
    assert lab.abandon(vm) is None


def test_a_mixture_that_somebody_started_is_not_overwritten_without_a_safety_point(lab: RewindLab) -> None:
    vm = lab.halted_vm()
    vdi = lab.pool.disk(vm, 0, content=b"a" * MIB)
    first = lab.backup(vm).point
    lab.pool.write(vdi, 0, b"b")
    lab.disks.loses_write_at = 0
    with pytest.raises(IntegrityError):
        lab.rewind(vm, first)
    lab.pool.db.set(vm, power_state="Running")
    with pytest.raises(VmNotReady, match="half-written") as caught:
        lab.rewind(vm, first, safety=True, stop=True)
    assert "--abandon" in caught.value.hint
    lab.abandon(vm)
    assert lab.rewind(vm, first, safety=True, stop=True).safety_point is not None


def test_a_rewind_of_another_node_is_not_interfered_with(lab: RewindLab) -> None:
    vm = lab.halted_vm()
    vdi = lab.pool.disk(vm, 0, content=b"a" * MIB)
    first = lab.backup(vm).point
    lab.pool.write(vdi, 0, b"b")
    lab.disks.loses_write_at = 0
    with pytest.raises(IntegrityError):
        lab.rewind(vm, first)
    reasons = {key: text.replace("of node test", "of node far") for key, text in lab.pool.blocked(vm).items()}
    lab.pool.db.set(vm, blocked_operations=reasons)
    with pytest.raises(VmNotReady, match="node far") as caught:
        lab.rewind(vm, first)
    assert "--abandon" in caught.value.hint
    assert lab.pool.blocked(vm) == reasons


@pytest.mark.parametrize("code", ["NOT_IMPLEMENTED", "VDI_READONLY", "UNIMPLEMENTED_IN_SM_BACKEND"])
def test_a_vdi_that_can_not_be_written_is_replaced_and_kept(lab: RewindLab, code: str) -> None:
    vm = lab.halted_vm()
    vdi = lab.pool.disk(vm, 3, content=b"first" * 50000)
    first = lab.backup(vm).point
    before = bytes(lab.pool.content[vdi])
    lab.pool.write(vdi, 10 * BLOCK, b"second")
    present = bytes(lab.pool.content[vdi])
    lab.disks.refuses_patch = code
    (disk,) = lab.rewind(vm, first).disks
    (vbd,) = lab.pool.db.refs(vm, "VBDs")
    new = lab.pool.db.text(vbd, "VDI")
    assert disk.replaced_by == lab.pool.uuid(new)
    assert lab.pool.db.text(vbd, "userdevice") == "3"
    assert bytes(lab.pool.content[new]) == before
    assert lab.pool.db.mapping(new, "other_config") == {}
    assert bytes(lab.pool.content[vdi]) == present
    assert lab.pool.db.text(vdi, "name_label").endswith("(before rewind)")
    assert lab.noted() == []
    lab.check_point(lab.backup(vm).point, {3: before})


def test_a_replacement_that_fails_leaves_the_old_disk_attached(lab: RewindLab) -> None:
    vm = lab.halted_vm()
    vdi = lab.pool.disk(vm, 3, content=b"first" * 50000)
    first = lab.backup(vm).point
    lab.pool.write(vdi, 10 * BLOCK, b"second")
    lab.disks.refuses_patch = "NOT_IMPLEMENTED"
    lab.pool.faults += [Fault("VBD.create", "INTERNAL_ERROR")]
    disks = set(lab.pool.content)
    with pytest.raises(XapiFailure, match="INTERNAL_ERROR"):
        lab.rewind(vm, first)
    (vbd,) = lab.pool.db.refs(vm, "VBDs")
    assert lab.pool.db.text(vbd, "VDI") == vdi
    assert set(lab.pool.content) == disks


def test_a_point_that_can_not_be_read_overwrites_nothing(lab: RewindLab) -> None:
    vm = lab.halted_vm()
    vdi = lab.pool.disk(vm, 0, content=b"first" * 50000)
    first = lab.backup(vm).point
    lab.pool.write(vdi, 0, b"second")
    for blob in list(lab.engine.storage.list_blobs("data/")):
        lab.engine.storage.delete(blob.name)
    with pytest.raises(IntegrityError):
        lab.rewind(vm, first)
    assert lab.pool.content[vdi][:6] == b"second"
    assert lab.pool.blocked(vm) == {}


def test_cancelling_while_disks_are_written_leaves_the_mark(lab: RewindLab) -> None:
    vm = lab.halted_vm()
    vdi = lab.pool.disk(vm, 0, content=b"a" * MIB)
    first = lab.backup(vm).point
    lab.pool.write(vdi, 0, b"b")

    async def cancelled() -> None:
        with trio.CancelScope() as scope:
            lab.told.progress = lambda what, *_: scope.cancel() if "writing" in what else None  # type: ignore[method-assign]
            await lab.rewinding(vm, first)
        assert scope.cancelled_caught

    lab.run(cancelled)
    assert "start" in lab.pool.blocked(vm)
    lab.told.progress = lambda *_: None  # type: ignore[method-assign]
    lab.rewind(vm, first)
    assert bytes(lab.pool.content[vdi][:MIB]) == b"a" * MIB


def test_nobody_reads_a_disk_that_is_unreadable_both_ways(lab: RewindLab) -> None:
    vm = lab.halted_vm()
    vdi = lab.pool.disk(vm, 0, content=b"a" * MIB)
    first = lab.backup(vm).point
    lab.pool.write(vdi, 0, b"b")
    lab.disks.nbd_offered = False
    lab.pool.db.set(vdi, type="cbt_metadata")
    with pytest.raises(SourceUnreadable):
        lab.rewind(vm, first)
    assert lab.disks.written == []
    assert lab.pool.blocked(vm) == {}
