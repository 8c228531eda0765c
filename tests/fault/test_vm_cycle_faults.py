"""Faults of a pool during the cycle: each is handled as stated, and a failure or a cancellation leaves nothing."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

import pytest
import trio

from tests.support.fake_pool import FakePool, Fault
from tests.support.vm_lab import NODE, Lab
from xbfs_engine.core.errors import CertificateRejected, PoolError, TransferFailed, VmNotReady, XapiFailure, XbfsError
from xbfs_engine.core.limits import MIB
from xbfs_engine.source.xapi.sweep import sweep

if TYPE_CHECKING:
    from pathlib import Path

TWO = 2


class Started:
    """A VM of two disks with a first point and a write since."""

    def __init__(self, directory: Path, pool: FakePool | None = None) -> None:
        self.lab = Lab(directory, pool)
        self.pool = self.lab.pool
        self.vm = self.pool.vm("web")
        self.vdis = [self.pool.disk(self.vm, number, size_bytes=2 * MIB) for number in range(TWO)]
        self.pool.write(self.vdis[0], 0, b"first")
        self.first = self.lab.backup(self.vm).point
        self.pool.write(self.vdis[1], MIB, b"since")

    @property
    def contents(self) -> dict[int, bytes]:
        return {number: bytes(self.pool.content[vdi]) for number, vdi in enumerate(self.vdis)}

    def fails(self, *faults: Fault) -> XbfsError:
        self.pool.faults += faults
        with pytest.raises(XbfsError) as caught:
            self.lab.backup(self.vm)
        self.pool.faults.clear()
        return caught.value

    def works(self, *faults: Fault) -> list[str]:
        """A run that makes a right point; its warnings."""
        self.pool.faults += faults
        report = self.lab.backup(self.vm)
        self.pool.faults.clear()
        self.lab.check_point(report.point, self.contents)
        return list(report.warnings)

    def sweep(self) -> None:
        self.lab.run(lambda: sweep(self.pool, self.lab.ledgers, node=NODE, dry_run=False))


@pytest.fixture
def web(tmp_path: Path) -> Started:
    return Started(tmp_path)


@pytest.mark.parametrize(
    "code",
    ["SR_BACKEND_FAILURE_44", "SR_FULL", "SR_BACKEND_FAILURE_109", "OPERATION_BLOCKED", "SR_BACKEND_FAILURE_181"],
)
def test_a_snapshot_that_is_refused_fails_the_vm_and_leaves_nothing(web: Started, code: str) -> None:
    tries: list[str] = []

    async def count(_: int, method: str) -> None:
        tries.append(method)

    web.pool.before_call = count
    error = web.fails(Fault("VM.snapshot", code, nth=0))
    assert isinstance(error, XapiFailure)
    assert (error.code, bool(error.hint)) == (code, True)
    assert tries.count("VM.snapshot") == 1, "not tried again"
    assert web.pool.leftovers() == []
    assert web.works() == []
    assert web.lab.engine.points()[-1].disks[1].method == "cbt"


@pytest.mark.parametrize(
    "code", ["OTHER_OPERATION_IN_PROGRESS", "TOO_MANY_PENDING_TASKS", "TOO_BUSY", "SR_BACKEND_FAILURE_82"]
)
@pytest.mark.parametrize("method", ["VM.add_to_blocked_operations", "VM.snapshot", "VM.destroy", "VDI.data_destroy"])
def test_what_is_busy_is_waited_for(web: Started, method: str, code: str) -> None:
    assert web.works(Fault(method, code), Fault(method, code)) == []
    assert web.pool.leftovers() == []


@pytest.mark.parametrize("code", ["SR_BACKEND_FAILURE_40", "SR_BACKEND_FAILURE_47", "SR_BACKEND_FAILURE_1200"])
def test_host_trouble_that_passes_is_survived(web: Started, code: str) -> None:
    assert web.works(Fault("VM.snapshot", code)) == []


def test_an_object_that_is_busy_for_ever_fails_the_vm(web: Started) -> None:
    error = web.fails(Fault("VM.snapshot", "OTHER_OPERATION_IN_PROGRESS", nth=0))
    assert isinstance(error, XapiFailure)
    assert web.pool.leftovers() == []


def test_a_snapshot_whose_answer_was_lost_is_found_by_its_name_and_removed(web: Started) -> None:
    assert web.fails(Fault("VM.snapshot", "UNREACHABLE", after=True)).retryable
    assert web.pool.leftovers() == []
    assert len(web.pool.snapshot_vdis()) == TWO, "the bases of the last point"
    assert web.works() == []


def test_a_missing_role_fails_with_the_role_that_is_needed(web: Started) -> None:
    error = web.fails(Fault("VM.snapshot", "RBAC_PERMISSION_DENIED", ("vm.snapshot", "")))
    assert "vm-power-admin" in error.hint
    assert web.pool.leftovers() == []


@pytest.mark.parametrize("times", [1, 5])
def test_data_that_is_still_attached_is_waited_for(web: Started, times: int) -> None:
    faults = [Fault("VDI.data_destroy", "VDI_IN_USE", ("OpaqueRef:1", "data_destroy"), nth=1) for _ in range(times)]
    assert web.works(*faults) == []
    assert web.pool.leftovers() == []


def test_a_leaked_vbd_of_dom0_is_unplugged(web: Started) -> None:
    leaked: list[str] = []

    async def leak(_: int, method: str) -> None:
        if method == "VDI.data_destroy" and not leaked:
            ref = next(r for r in web.pool.snapshot_vdis() if web.pool.db.text(r, "type") == "user")
            leaked.append(web.pool.vbd(web.pool.dom0, ref, "autodetect", currently_attached=True))

    web.pool.before_call = leak
    assert web.works() == []
    assert leaked
    assert web.pool.leftovers() == []


def test_data_that_never_goes_is_a_warning_and_still_a_base(web: Started) -> None:
    (warning, other) = web.works(Fault("VDI.data_destroy", "VDI_IN_USE", nth=0))
    assert "VDI_IN_USE" in warning
    assert "VDI_IN_USE" in other
    web.pool.write(web.vdis[0], MIB, b"later")
    assert web.works() == []
    assert [disk.method for disk in web.lab.engine.points()[-1].disks] == ["cbt", "cbt"]
    assert len(web.pool.snapshot_vdis()) == TWO
    assert web.pool.leftovers() == []


@pytest.mark.parametrize(
    "method", ["VM.destroy", "VDI.data_destroy", "VDI.destroy", "VM.remove_from_blocked_operations"]
)
@pytest.mark.parametrize("after", [False, True])
def test_what_fails_after_the_commit_never_fails_the_backup(web: Started, method: str, *, after: bool) -> None:
    web.works(Fault(method, "INTERNAL_ERROR", nth=0, after=after))
    web.sweep()
    web.pool.write(web.vdis[0], MIB, b"later")
    assert web.works() == []
    assert [disk.method for disk in web.lab.engine.points()[-1].disks] == ["cbt", "cbt"]
    web.sweep()
    assert web.pool.leftovers() == []
    assert len(web.pool.snapshot_vdis()) == TWO


@pytest.mark.parametrize("error", [TransferFailed("broke"), CertificateRejected("another"), None])
def test_another_transport_is_taken_when_nbd_fails(web: Started, error: Exception | None) -> None:
    web.lab.access.nbd_error = error
    web.lab.access.nbd_offered = error is not None
    web.works()
    assert {way for way, _, _ in web.lab.access.sources[-1:]} == {"stream"}
    assert "over HTTPS" in web.lab.engine.points()[-1].disks[1].reason


def test_allocation_that_can_not_be_learnt_means_all_of_the_disk(tmp_path: Path) -> None:
    lab = Lab(tmp_path)
    vm = lab.pool.vm("web")
    vdi = lab.pool.disk(vm, 0, content=b"data")
    lab.access.allocation_error = TransferFailed("no VHD")
    report = lab.backup(vm)
    assert report.point.disks[0].statistics.source_bytes == 4 * MIB
    lab.check_point(report.point, {0: bytes(lab.pool.content[vdi])})


def test_an_old_pool_leaves_out_no_disk(tmp_path: Path) -> None:
    lab = Lab(tmp_path, FakePool(takes_ignore_vdis=False))
    vm = lab.pool.vm("web")
    lab.pool.disk(vm, 0)
    lab.pool.disk(vm, 1)
    lab.backup(vm, exclude=[1])
    assert lab.pool.leftovers() == []
    assert len(lab.pool.snapshot_vdis()) == 1, "the snapshot of the excluded disk is gone"
    lab.pool.disk(vm, 2, sharable=True)
    with pytest.raises(VmNotReady, match="disk 2"):
        lab.backup(vm)
    assert lab.pool.leftovers() == []


def test_a_vm_without_disks_is_not_ready(tmp_path: Path) -> None:
    lab = Lab(tmp_path)
    vm = lab.pool.vm("empty")
    with pytest.raises(VmNotReady):
        lab.backup(vm)
    assert lab.pool.methods() == []


def calls_of_a_run(directory: Path) -> int:
    web = Started(directory)
    web.pool.calls = 0
    web.works()
    return web.pool.calls


@pytest.mark.parametrize("kind", ["error before", "error after", "cancel"])
def test_whatever_call_fails_the_chain_goes_on_and_the_sweep_finds_all_that_is_left(tmp_path: Path, kind: str) -> None:
    """Fail the n-th call for every n."""
    total = calls_of_a_run(tmp_path / "count")
    assert total > 30
    web = Started(tmp_path / "runs")
    for number in range(1, total + 1):
        web.pool.calls = 0
        scope = trio.CancelScope()

        async def disturb(call: int, method: str, number: int = number, scope: trio.CancelScope = scope) -> None:
            if call == number:
                if kind == "cancel":
                    scope.cancel()
                    return
                web.pool.faults.append(Fault(method, "INTERNAL_ERROR", after=kind == "error after"))

        async def work(scope: trio.CancelScope = scope) -> None:
            with scope:
                await web.lab.cycle(web.vm)

        web.pool.before_call = disturb
        with suppress(PoolError):
            web.lab.run(work)
        web.pool.before_call = None
        web.pool.faults.clear()
        web.sweep()
        assert web.pool.leftovers() == [], f"call {number}"
        web.pool.write(web.vdis[number % TWO], number * 512, b"on")
    web.works()
    assert [disk.method for disk in web.lab.engine.points()[-1].disks] == ["cbt", "cbt"]
    web.sweep()
    assert len(web.pool.snapshot_vdis()) == TWO
    assert set(web.lab.kept()) == {web.pool.uuid(ref) for ref in web.pool.snapshot_vdis()}
    assert web.lab.noted() == []
