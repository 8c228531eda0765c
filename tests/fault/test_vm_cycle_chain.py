"""Every way a chain of changed blocks breaks: the point is right all the same, says why, and the next is a delta."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.support.fake_pool import FakePool, Fault
from tests.support.vm_lab import Lab
from xbfs_engine.core.errors import VmNotReady
from xbfs_engine.core.limits import KIB, MIB

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from xbfs_engine.catalog.restore_point import DiskRecord

BLOCK = 64 * KIB


class Chain:
    """A VM that has a first point, and a write since."""

    def __init__(self, directory: Path) -> None:
        self.lab = Lab(directory)
        self.pool = self.lab.pool
        self.vm = self.pool.vm("web")
        self.vdi = self.pool.disk(self.vm, 0, content=b"first" * 40_000)
        self.lab.backup(self.vm)
        (self.base,) = self.pool.snapshot_vdis()
        self.pool.write(self.vdi, MIB, b"since")

    def next(self) -> DiskRecord:
        report = self.lab.backup(self.vm)
        vdi = self.pool.db.text(self.pool.db.refs(self.vm, "VBDs")[0], "VDI")
        self.vdi = vdi
        self.lab.check_point(report.point, {0: bytes(self.pool.content[vdi])})
        assert self.pool.leftovers() == []
        return report.point.disks[0]


@pytest.fixture
def chain(tmp_path: Path) -> Chain:
    return Chain(tmp_path)


def unrelated(chain: Chain) -> None:
    """Somebody switched tracking off and on again."""
    chain.pool.VDI_disable_cbt(chain.vdi)
    chain.pool.VDI_enable_cbt(chain.vdi)


def host_crash(chain: Chain) -> None:
    """SM deletes the log that is not consistent and switches tracking off."""
    chain.pool.VDI_disable_cbt(chain.vdi)


def base_destroyed(chain: Chain) -> None:
    chain.pool.VDI_destroy(chain.base)


def base_untracked(chain: Chain) -> None:
    chain.pool.db.set(chain.base, cbt_enabled=False)


def base_of_odd_type(chain: Chain) -> None:
    chain.pool.db.set(chain.base, type="suspend")


def base_of_other_size(chain: Chain) -> None:
    chain.pool.db.set(chain.base, virtual_size=2 * MIB)


def reverted(chain: Chain) -> None:
    chain.pool.revert(chain.vm)


def bitmap_garbage(chain: Chain) -> None:
    chain.pool.VDI_list_changed_blocks = lambda *_: "not base64!"  # type: ignore[method-assign]


def bitmap_short(chain: Chain) -> None:
    chain.pool.VDI_list_changed_blocks = lambda *_: "AAAA"  # type: ignore[method-assign]


def listing_fails(code: str) -> Callable[[Chain], None]:
    def spoil(chain: Chain) -> None:
        chain.pool.faults.append(Fault("VDI.list_changed_blocks", code, nth=0))

    spoil.__name__ = code
    return spoil


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (unrelated, "SR_BACKEND_FAILURE_460"),
        (host_crash, "SR_BACKEND_FAILURE_460"),
        (base_destroyed, "UUID_INVALID"),
        (base_untracked, "no changed-block log"),
        (base_of_odd_type, "of type suspend"),
        (base_of_other_size, "2097152 bytes, the point 4194304"),
        (reverted, "another VDI"),
        (bitmap_garbage, "not base64"),
        (bitmap_short, "the changed-block bitmap has 3 bytes"),
        (listing_fails("HANDLE_INVALID"), "HANDLE_INVALID"),
        (listing_fails("VDI_IN_USE"), "VDI_IN_USE"),
        (listing_fails("SR_BACKEND_FAILURE_1200"), "SR_BACKEND_FAILURE_1200"),
        (listing_fails("INTERNAL_ERROR"), "INTERNAL_ERROR"),
        (listing_fails("UNREACHABLE"), "the connection broke"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_broken_chain_means_a_full_read_with_its_reason_and_a_new_chain(
    chain: Chain, spoil: Callable[[Chain], None], reason: str
) -> None:
    spoil(chain)
    disk = chain.next()
    assert disk.method == "full"
    assert reason in disk.reason
    assert disk.statistics.new_bytes <= BLOCK, "what was read again is not stored again"
    chain.pool.faults.clear()
    chain.pool.__dict__.pop("VDI_list_changed_blocks", None)
    chain.pool.write(chain.vdi, 2 * MIB, b"later")
    assert chain.next().method == "cbt"
    assert len(chain.pool.snapshot_vdis()) == 1, "stale changed-block metadata of ours is purged"


def test_contradicting_logs_are_thrown_away_and_tracking_begins_anew(chain: Chain) -> None:
    chain.pool.faults.append(Fault("VDI.list_changed_blocks", "SR_BACKEND_FAILURE_459"))
    disk = chain.next()
    assert (disk.method, "SR_BACKEND_FAILURE_459" in disk.reason) == ("full", True)
    assert chain.pool.snapshot_vdis() == []
    assert not chain.pool.db.flag(chain.vdi, "cbt_enabled")
    disk = chain.next()
    assert (disk.method, disk.reason) == ("full", "the last point left no snapshot to compare with")
    assert chain.next().method == "cbt"


def test_a_disk_replaced_by_a_smaller_one_begins_a_new_chain(chain: Chain) -> None:
    (vbd,) = chain.pool.db.refs(chain.vm, "VBDs")
    chain.pool.db.destroy(vbd)
    chain.pool.disk(chain.vm, 0, size_bytes=2 * MIB, content=b"small")
    disk = chain.next()
    assert (disk.method, disk.size_bytes) == ("full", 2 * MIB)
    assert "smaller" in disk.reason


def test_a_point_of_another_pool_is_no_base(chain: Chain) -> None:
    chain.pool.db.set(chain.pool.pool, uuid="11111111-2222-3333-4444-555555555555")
    assert "another pool" in chain.next().reason


def test_without_a_licence_every_read_is_full_and_stores_nothing_twice(tmp_path: Path) -> None:
    pool = FakePool(licensed=False)
    lab = Lab(tmp_path, pool)
    vm = pool.vm("web")
    vdi = pool.disk(vm, 0, content=b"data" * 100_000)
    lab.backup(vm)
    for _ in range(2):
        pool.write(vdi, 0, b"other")
        report = lab.backup(vm)
        lab.check_point(report.point, {0: bytes(pool.content[vdi])})
        assert report.point.disks[0].statistics.new_bytes <= BLOCK
        assert pool.snapshot_vdis() == [], "a snapshot that is no base is of no use"
        assert pool.leftovers() == []
        assert "LICENCE_RESTRICTION" in report.point.disks[0].reason


@pytest.mark.parametrize("code", ["SR_BACKEND_FAILURE_457", "SR_BACKEND_FAILURE_44", "VDI_INCOMPATIBLE_TYPE"])
def test_tracking_that_can_not_be_switched_on_is_no_reason_to_go_without_a_backup(tmp_path: Path, code: str) -> None:
    lab = Lab(tmp_path)
    vm = lab.pool.vm("web")
    vdi = lab.pool.disk(vm, 0, content=b"data")
    lab.pool.faults.append(Fault("VDI.enable_cbt", code, nth=0))
    report = lab.backup(vm)
    lab.check_point(report.point, {0: bytes(lab.pool.content[vdi])})
    assert lab.pool.snapshot_vdis() == []
    lab.pool.faults.clear()
    lab.backup(vm)
    assert lab.backup(vm).point.disks[0].method == "cbt"


def test_an_sr_that_does_not_track_is_not_asked(tmp_path: Path) -> None:
    lab = Lab(tmp_path)
    sr = lab.pool.db.create("SR", name_label="plain", type="ext", allowed_operations=["vdi_snapshot"])
    vm = lab.pool.vm("web")
    lab.pool.disk(vm, 0, SR=sr)
    lab.backup(vm)
    report = lab.backup(vm)
    assert "VDI.enable_cbt" not in lab.pool.methods()
    assert report.point.disks[0].method == "full"
    assert lab.pool.leftovers() == []


def test_during_a_rolling_upgrade_the_backup_is_postponed(tmp_path: Path) -> None:
    lab = Lab(tmp_path)
    vm = lab.pool.vm("web")
    lab.pool.disk(vm, 0)
    lab.pool.faults.append(Fault("VDI.enable_cbt", "NOT_SUPPORTED_DURING_UPGRADE", nth=0))
    with pytest.raises(VmNotReady):
        lab.backup(vm)
    assert lab.pool.leftovers() == []
    assert "VM.snapshot" not in lab.pool.methods()
