"""Several VMs in one run: the sweep before, two at a time, one failure beside successes, chains that are waited for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from tests.support.fake_pool import Fault
from tests.support.vm_lab import NODE, FakeRecorder, Lab
from xbfs_engine.core.errors import ObjectNotFound, StorageFull, VmNotReady, XapiFailure
from xbfs_engine.core.limits import MIB
from xbfs_engine.ingest.vm.cycle import Target, Wishes
from xbfs_engine.ingest.vm.job import JobReport, PoolSide, back_up_vms
from xbfs_engine.ingest.vm.run import RunWishes

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    return Lab(tmp_path)


async def job(lab: Lab, *patterns: str, wait_s: float = 300.0) -> JobReport:
    lab.clock.advance(60)
    lab.engine.clock.advance(60)
    target = Target(lab.engine.repository, lab.engine.catalog, lab.engine.index, NODE, "xbfs test")
    side = PoolSide(lab.pool, lab.access, FakeRecorder(lab.pool), lab.ledgers, lab.runtime.random)
    wishes = RunWishes(Wishes(), coalesce_wait_s=wait_s)
    return await back_up_vms(side, target, patterns, wishes, lab.heard)


def run(lab: Lab, *patterns: str, wait_s: float = 300.0) -> JobReport:
    report = lab.run(lambda: job(lab, *patterns, wait_s=wait_s))
    assert isinstance(report, JobReport)
    return report


def three(lab: Lab) -> list[str]:
    vms = [lab.pool.vm(name) for name in ("a", "b", "c")]
    for vm in vms:
        lab.pool.disk(vm, 0, size_bytes=2 * MIB, content=vm.encode())
    return vms


def test_all_that_are_named_get_a_point_and_no_more_than_two_have_a_snapshot(lab: Lab) -> None:
    vms = three(lab)
    most = 0

    async def count(_: int, __: str) -> None:
        nonlocal most
        most = max(most, len(lab.pool.db.where("VM", is_a_snapshot=True)))

    lab.pool.before_call = count
    report = run(lab, "*")
    assert set(report.outcome.reports) == {lab.pool.uuid(vm) for vm in vms}
    assert most == 2
    assert lab.pool.leftovers() == []


def test_an_sr_takes_one_snapshot_at_a_time(lab: Lab) -> None:
    three(lab)
    order: list[str] = []
    original = lab.pool.run_task

    async def slowly(method: str, *arguments: Any, timeout_s: float, progress: Any = None) -> str:
        order.append("begin")
        result = await original(method, *arguments, timeout_s=timeout_s, progress=progress)
        order.append("end")
        return result

    lab.pool.run_task = slowly  # type: ignore[method-assign]
    run(lab, "*")
    assert order == ["begin", "end"] * 3


def test_one_failure_does_not_stop_the_others(lab: Lab) -> None:
    three(lab)
    lab.pool.faults.append(Fault("VM.snapshot", "SR_BACKEND_FAILURE_44", nth=2))
    report = run(lab, "*")
    assert len(report.outcome.reports) == 2
    (failure,) = report.outcome.failures.values()
    assert isinstance(failure, XapiFailure)
    assert any("failed" in step for step in lab.heard.steps)
    assert lab.pool.leftovers() == []


def test_a_vm_that_another_run_of_this_node_is_at_is_left_to_it(lab: Lab) -> None:
    held = lab.pool.uuid(three(lab)[1])

    async def beside_another() -> JobReport:
        async with lab.ledgers.turn(held) as is_ours:
            assert is_ours
            return await job(lab, "*")

    report = lab.run(beside_another)
    assert set(report.outcome.failures) == {held}
    assert isinstance(report.outcome.failures[held], VmNotReady)
    assert len(report.outcome.reports) == 2
    assert set(run(lab, "*").outcome.reports) > {held}


def test_trouble_of_the_repository_ends_the_run(lab: Lab) -> None:
    three(lab)

    def full(*_: object) -> None:
        raise StorageFull("no room")

    lab.engine.storage.put = full  # type: ignore[method-assign,assignment]
    with pytest.raises(StorageFull):
        run(lab, "*")
    assert lab.pool.leftovers() == []
    assert lab.pool.snapshot_vdis() == []


def test_what_a_dead_run_left_is_swept_before(lab: Lab) -> None:
    (vm, *_) = three(lab)
    lab.pool.faults += [
        Fault("VM.snapshot", "UNREACHABLE", after=True),
        Fault("VM.get_by_name_label", "INTERNAL_ERROR"),
    ]
    run(lab, "a")
    assert len(lab.pool.db.where("VM", is_a_snapshot=True)) == 1, "the undoing failed too"
    report = run(lab, "a")
    assert report.swept.done
    assert lab.pool.leftovers() == []
    assert set(report.outcome.reports) == {lab.pool.uuid(vm)}


def test_a_chain_that_is_coalesced_in_time_is_waited_for(lab: Lab) -> None:
    vm = lab.pool.vm("web")
    base = [lab.pool.disk(vm, 9, managed=False) for _ in range(2)]
    for vbd in lab.pool.db.refs(vm, "VBDs"):
        lab.pool.db.destroy(vbd)
    lab.pool.db.set(base[1], sm_config={"vhd-parent": lab.pool.uuid(base[0])})
    vdi = lab.pool.disk(vm, 0, sm_config={"vhd-parent": lab.pool.uuid(base[1])})
    looks = 0

    async def coalesce(_: int, method: str) -> None:
        nonlocal looks
        if method == "VDI.get_all_records":
            looks += 1
            if looks == 8:
                lab.pool.db.set(vdi, sm_config={})

    lab.pool.before_call = coalesce
    report = run(lab, "web", wait_s=0)
    (failure,) = report.outcome.failures.values()
    assert isinstance(failure, VmNotReady)
    assert "1 VHD waits to be coalesced" in failure.message
    report = run(lab, "web")
    assert len(report.outcome.reports) == 1
    assert any("waiting for the SR" in step for step in lab.heard.steps)


def test_tagged_vms_are_skipped_and_unknown_names_refused(lab: Lab) -> None:
    three(lab)
    lab.pool.disk(lab.pool.vm("scratch", tags=["xo:no-bak"]), 0)
    report = run(lab, "*")
    assert [skipped.vm.name for skipped in report.skipped] == ["scratch"]
    with pytest.raises(ObjectNotFound):
        run(lab, "nobody")


@pytest.mark.parametrize("code", ["VDI_IN_USE", "OTHER_OPERATION_IN_PROGRESS", "INTERNAL_ERROR"])
def test_a_snapshot_that_a_host_made_and_said_it_had_not_goes_with_the_run(lab: Lab, code: str) -> None:
    vms = three(lab)[:1]
    lab.pool.faults.append(Fault("VM.snapshot", code, after=True))
    report = run(lab, "a")
    assert set(report.outcome.reports) | set(report.outcome.failures) == {lab.pool.uuid(vm) for vm in vms}
    assert lab.pool.leftovers() == []
    assert len(lab.pool.snapshot_vdis()) == len(report.outcome.reports)
