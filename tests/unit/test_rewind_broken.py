"""Rewinds that break, are given up or replace a disk, against a pool in memory: what is left, and what it says."""

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
    VmNotReady,
    XapiFailure,
)
from xbfs_engine.core.limits import KIB, MIB
from xbfs_engine.restore.rewind.guard import half_written
from xbfs_engine.source.xapi.sweep import sweep

if TYPE_CHECKING:
    from pathlib import Path

BLOCK = 64 * KIB


@pytest.fixture
def lab(tmp_path: Path) -> RewindLab:
    return RewindLab(tmp_path)


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
