"""The cycle against a pool in memory: the order of its calls, what is read, and what is left on the pool."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.support.engine import CHEAP_KDF, PASSPHRASE, SMALL, Engine
from tests.support.runtime import test_runtime
from tests.support.vm_lab import Lab
from xbfs_engine.core.limits import KIB, MIB
from xbfs_engine.ingest.vm.base import base_of
from xbfs_engine.ingest.vm.cycle import Wishes
from xbfs_engine.storage.memory import MemoryStorage
from xbfs_engine.store.repository import create_repository

if TYPE_CHECKING:
    from pathlib import Path

BLOCK = 64 * KIB


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    return Lab(tmp_path)


def content(lab: Lab, *vdis: str) -> dict[int, bytes]:
    return {number: bytes(lab.pool.content[vdi]) for number, vdi in enumerate(vdis)}


def methods_of_note(lab: Lab) -> list[str]:
    return [method for method in lab.pool.methods() if "other_config" not in method]


def test_a_first_full_then_a_delta_in_the_order_of_the_contract(lab: Lab) -> None:
    vm = lab.pool.vm("web")
    vdi = lab.pool.disk(vm, 0, content=b"first" * 1000)
    first = lab.backup(vm)
    lab.check_point(first.point, content(lab, vdi))
    assert methods_of_note(lab) == [
        "VM.add_to_blocked_operations",
        "VM.add_to_blocked_operations",
        "VDI.enable_cbt",
        "VM.snapshot",
        "VM.destroy",
        "VDI.data_destroy",
        "VM.remove_from_blocked_operations",
        "VM.remove_from_blocked_operations",
    ]
    lab.pool.write(vdi, 3 * BLOCK, b"second")
    lab.pool.diary.clear()
    second = lab.backup(vm)
    lab.check_point(second.point, content(lab, vdi))
    assert methods_of_note(lab) == [
        "VM.add_to_blocked_operations",
        "VM.add_to_blocked_operations",
        "VM.snapshot",
        "VM.destroy",
        "VDI.data_destroy",
        "VDI.destroy",
        "VM.remove_from_blocked_operations",
        "VM.remove_from_blocked_operations",
    ]
    disk = second.point.disks[0]
    assert (disk.method, disk.statistics.source_bytes) == ("cbt", BLOCK)
    assert disk.reason == f"changed blocks since {first.point.id[:12]}"
    assert disk.vdi_uuid == lab.pool.uuid(vdi)
    assert second.point.parent == first.point.id
    assert lab.pool.leftovers() == []
    assert second.warnings == []


def test_after_each_run_one_base_is_left_and_the_ledger_keeps_it(lab: Lab) -> None:
    vm = lab.pool.vm("web")
    lab.pool.disk(vm, 0)
    lab.pool.disk(vm, 1, size_bytes=2 * MIB)
    for _ in range(3):
        report = lab.backup(vm)
        bases = {lab.pool.uuid(ref) for ref in lab.pool.snapshot_vdis()}
        xen = base_of(report.point.vm)
        assert xen is not None
        assert set(xen.snapshots.values()) == bases
        assert bases <= set(lab.kept())
        assert lab.noted() == []


def test_a_first_full_reads_what_the_host_says_is_allocated(lab: Lab) -> None:
    vm = lab.pool.vm("web")
    vdi = lab.pool.disk(vm, 0, size_bytes=20 * MIB)
    lab.pool.write(vdi, 7 * MIB, b"data")
    report = lab.backup(vm)
    assert report.point.disks[0].statistics.source_bytes == 2 * MIB
    lab.check_point(report.point, content(lab, vdi))


def test_a_disk_that_grew_is_a_delta(lab: Lab) -> None:
    vm = lab.pool.vm("web")
    vdi = lab.pool.disk(vm, 0, content=b"old")
    lab.backup(vm)
    lab.pool.grow(vdi, 8 * MIB)
    lab.pool.write(vdi, 7 * MIB, b"new")
    report = lab.backup(vm)
    assert report.point.disks[0].method == "cbt"
    assert report.point.disks[0].statistics.source_bytes == BLOCK
    lab.check_point(report.point, content(lab, vdi))


def test_disks_that_are_left_out_are_ignored_by_the_snapshot_and_named_in_the_point(lab: Lab) -> None:
    vm = lab.pool.vm("web")
    lab.pool.disk(vm, 0)
    shared = lab.pool.disk(vm, 1, sharable=True)
    unwanted = lab.pool.disk(vm, 2)
    report = lab.backup(vm, exclude=[2])
    (snapshot,) = [arguments for method, arguments in lab.pool.diary if method == "VM.snapshot"]
    assert set(snapshot[2]) == {shared, unwanted}
    assert [disk.number for disk in report.point.disks] == [0]
    xen = base_of(report.point.vm)
    assert xen is not None
    assert xen.left_out == {1: "shared between VMs: it can not be snapshotted", 2: "excluded on request"}
    assert len(lab.pool.snapshot_vdis()) == 1


def test_keeping_data_leaves_whole_snapshots_as_bases(lab: Lab) -> None:
    vm = lab.pool.vm("web")
    vdi = lab.pool.disk(vm, 0)
    lab.backup(vm, Wishes(keep_data=True))
    (base,) = lab.pool.snapshot_vdis()
    assert lab.pool.db.text(base, "type") == "user"
    lab.pool.write(vdi, 0, b"x")
    report = lab.backup(vm)
    assert report.point.disks[0].method == "cbt"
    assert not lab.pool.db.exists(base)


def test_a_full_read_on_request_still_makes_a_base(lab: Lab) -> None:
    vm = lab.pool.vm("web")
    vdi = lab.pool.disk(vm, 0, content=b"data")
    lab.backup(vm)
    report = lab.backup(vm, Wishes(full=True))
    disk = report.point.disks[0]
    assert (disk.method, disk.reason) == ("full", "a full read was asked for")
    assert disk.statistics.new_bytes == 0
    lab.pool.write(vdi, 0, b"x")
    assert lab.backup(vm).point.disks[0].method == "cbt"


def test_the_marker_is_on_everything_made_and_names_the_object(lab: Lab) -> None:
    vm = lab.pool.vm("web", other_config={"xbfs:run": "of somebody"})
    lab.pool.disk(vm, 0)
    marks: list[dict[str, str]] = []
    names: list[str] = []

    async def look(_: int, method: str) -> None:
        if method == "VDI.get_record":
            for ref in lab.pool.db.where("VM", is_a_snapshot=True):
                marks.append(lab.pool.db.mapping(ref, "other_config"))
                names.append(lab.pool.uuid(ref))

    lab.pool.before_call = look
    lab.backup(vm)
    assert marks[-1]["xbfs:self"] == names[-1]
    (base,) = lab.pool.snapshot_vdis()
    marker = lab.pool.db.mapping(base, "other_config")
    assert marker["xbfs:self"] == lab.pool.uuid(base)
    assert marker["xbfs:slot"] == f"{lab.engine.repository.id}/{lab.pool.uuid(vm)}/0"
    assert marker["xbfs:node"] == "test"


def test_foreign_blocks_stay_and_ours_go(lab: Lab) -> None:
    vm = lab.pool.vm("web", blocked_operations={"pool_migrate": "because I say so"})
    lab.pool.disk(vm, 0)
    lab.backup(vm)
    assert lab.pool.blocked(vm) == {"pool_migrate": "because I say so"}


def test_two_repositories_keep_a_base_each(lab: Lab, tmp_path: Path) -> None:
    vm = lab.pool.vm("web")
    vdi = lab.pool.disk(vm, 0)
    storage = MemoryStorage()
    create_repository(storage, test_runtime(2), passphrase=PASSPHRASE, label="other", parameters=SMALL, kdf=CHEAP_KDF)
    other = Lab(tmp_path / "other", pool=lab.pool, engine=Engine(storage, tmp_path / "other-cache"))
    lab.backup(vm)
    lab.pool.write(vdi, 0, b"x")
    other.backup(vm)
    lab.pool.write(vdi, MIB, b"y")
    for one in (lab, other):
        report = one.backup(vm)
        assert report.point.disks[0].method == "cbt"
        one.check_point(report.point, content(lab, vdi))
    assert len(lab.pool.snapshot_vdis()) == 2
