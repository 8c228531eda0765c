"""What each error code of a pool means to a run: tried again, waited for, another way, or told (a pool in memory)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from tests.support.fake_pool import FakePool, Fault
from tests.support.vm_lab import NODE, FakeRecorder, Lab
from xbfs_engine.core.errors import StorageFull, TransferFailed, VmNotReady, XapiFailure
from xbfs_engine.core.limits import GIB, MIB
from xbfs_engine.ingest.vm.base import known_bases
from xbfs_engine.ingest.vm.cycle import Target, Wishes
from xbfs_engine.ingest.vm.job import JobReport, PoolSide, back_up_vms
from xbfs_engine.ingest.vm.run import RunWishes
from xbfs_engine.source.xapi.failures import failure
from xbfs_engine.source.xapi.sweep import SweepReport, sweep

if TYPE_CHECKING:
    from pathlib import Path

    from xbfs_engine.catalog.restore_point import RestorePoint


class Web:
    """A VM of one disk with a first point, and a write since."""

    def __init__(self, directory: Path) -> None:
        self.lab = Lab(directory)
        self.pool = self.lab.pool
        self.vm = self.pool.vm("web")
        self.vdi = self.pool.disk(self.vm, 0, content=b"first")
        self.lab.backup(self.vm)
        self.pool.write(self.vdi, MIB, b"since")
        self.tries: list[str] = []

        async def count(_: int, method: str) -> None:
            self.tries.append(method)

        self.pool.before_call = count

    def fails(self, *faults: Fault) -> XapiFailure:
        self.pool.faults += faults
        with pytest.raises(XapiFailure) as caught:
            self.lab.backup(self.vm)
        self.pool.faults.clear()
        assert self.pool.leftovers() == []
        return caught.value

    def works(self, *faults: Fault) -> None:
        self.pool.faults += faults
        report = self.lab.backup(self.vm)
        self.pool.faults.clear()
        assert list(report.warnings) == []
        self.lab.check_point(report.point, {0: bytes(self.pool.content[self.vdi])})
        assert report.point.disks[0].method == "cbt"
        assert self.pool.leftovers() == []
        assert len(self.pool.snapshot_vdis()) == 1

    def job(self, *, wait_s: float = 300.0) -> JobReport:
        self.lab.clock.advance(60)
        self.lab.engine.clock.advance(60)
        engine = self.lab.engine
        target = Target(engine.repository, engine.catalog, engine.index, NODE, "xbfs test")
        side = PoolSide(self.pool, self.lab.access, FakeRecorder(self.pool), self.lab.ledgers, self.lab.runtime.random)
        wishes = RunWishes(Wishes(), coalesce_wait_s=wait_s)
        report = self.lab.run(lambda: back_up_vms(side, target, ["web"], wishes, self.lab.heard))
        assert isinstance(report, JobReport)
        return report

    def skipped(self, **wishes: Any) -> str:
        """The VM is not even blocked; why."""
        self.pool.diary.clear()
        (error,) = self.job(**wishes).outcome.failures.values()
        assert isinstance(error, VmNotReady)
        assert self.pool.methods() == []
        return error.message

    def chain(self, count: int) -> None:
        """Put a chain of so many VHDs below the disk: all but the last wait to be coalesced."""
        for vdi in self.pool.db.where("VDI", name_label="base copy"):
            self.pool.db.destroy(vdi)
        parent: dict[str, str] = {}
        for _ in range(count):
            ref = self.pool.db.create("VDI", name_label="base copy", SR=self.pool.sr, managed=False, sm_config=parent)
            parent = {"vhd-parent": self.pool.uuid(ref)}
        self.pool.db.set(self.vdi, sm_config={"vdi_type": "vhd", **parent})

    def managed_chain(self, count: int) -> None:
        """As many VHDs, each with a snapshot of somebody's: nothing to coalesce."""
        self.chain(count)
        for ref in self.pool.db.where("VDI", name_label="base copy"):
            parent = {"vhd-parent": self.pool.uuid(ref)}
            self.pool.db.create("VDI", name_label="by hand", SR=self.pool.sr, managed=True, sm_config=parent)

    def sweep(self, *, ask: bool) -> SweepReport:
        bases = known_bases(self.lab.engine.catalog, self.lab.engine.repository.id) if ask else None
        report = self.lab.run(lambda: sweep(self.pool, self.lab.ledgers, node=NODE, dry_run=False, bases=bases))
        assert isinstance(report, SweepReport)
        return report


@pytest.fixture
def web(tmp_path: Path) -> Web:
    return Web(tmp_path)


@pytest.mark.parametrize("number", [40, 46, 47, 65])
def test_disks_that_sm_does_not_see_are_scanned_for(web: Web, number: int) -> None:
    code = f"SR_BACKEND_FAILURE_{number}"
    web.works(Fault("VM.snapshot", code))
    assert web.tries.count("SR.scan") == 1
    assert web.tries.index("SR.scan") > web.tries.index("VM.snapshot")
    error = web.fails(Fault("VM.snapshot", code, nth=0))
    assert error.code == code
    assert error.hint
    assert web.tries.count("VM.snapshot") == 5, "three times"


def test_a_scan_that_fails_is_no_reason_not_to_try(web: Web) -> None:
    web.works(Fault("VM.snapshot", "SR_BACKEND_FAILURE_46"), Fault("SR.scan", "SR_BACKEND_FAILURE_40", nth=0))


@pytest.mark.parametrize(
    "code",
    [
        "SR_BACKEND_FAILURE_1200",
        "HOST_OFFLINE",
        "CANNOT_CONTACT_HOST",
        "HOST_STILL_BOOTING",
        "NO_HOSTS_AVAILABLE",
        "VM_BAD_POWER_STATE",
    ],
)
def test_trouble_that_passes_is_tried_again_and_told_when_it_stays(web: Web, code: str) -> None:
    web.works(Fault("VM.snapshot", code))
    error = web.fails(Fault("VM.snapshot", code, nth=0))
    assert error.code == code
    assert web.tries.count("VM.snapshot") <= 5


@pytest.mark.parametrize(
    "code",
    [
        "SR_BACKEND_FAILURE_180",
        "SR_BACKEND_FAILURE_181",
        "SR_BACKEND_FAILURE_109",
        "SR_BACKEND_FAILURE_44",
        "SR_FULL",
        "SR_BACKEND_FAILURE",
        "OPERATION_NOT_ALLOWED",
        "OPERATION_BLOCKED",
        "HANDLE_INVALID",
        "TASK_CANCELLED",
        "VDI_IS_SHARABLE",
    ],
)
def test_what_is_refused_is_told_at_once(web: Web, code: str) -> None:
    assert web.fails(Fault("VM.snapshot", code, nth=0)).code == code
    assert web.tries.count("VM.snapshot") == 1
    web.works()


@pytest.mark.parametrize("code", ["DEVICE_ALREADY_DETACHED", "DEVICE_DETACH_REJECTED", "DEVICE_DETACH_TIMEOUT"])
def test_a_race_for_a_vbd_of_dom0(web: Web, code: str) -> None:
    """The list of VBDs is read again before each try."""
    leaked: list[str] = []

    async def leak(_: int, method: str) -> None:
        if method == "VDI.data_destroy" and not leaked:
            ref = next(r for r in web.pool.snapshot_vdis() if web.pool.db.text(r, "type") == "user")
            leaked.append(web.pool.vbd(web.pool.dom0, ref, "autodetect", currently_attached=True))

    web.pool.before_call = leak
    web.works(Fault("VBD.unplug_force", code), Fault("VBD.destroy", "OPERATION_NOT_ALLOWED"))
    assert leaked


def test_a_disk_that_the_host_can_not_read_by_any_transport_is_told(web: Web) -> None:
    web.lab.access.nbd_error = TransferFailed("error 5")
    ways = iter([TransferFailed("broke off"), failure("export", ["VDI_IO_ERROR", "Device I/O errors"])])

    def stream(_: object) -> None:
        raise next(ways)

    web.lab.access.stream = stream  # type: ignore[method-assign,assignment]
    assert web.fails().code == "VDI_IO_ERROR"
    assert next(ways, None) is None, "every way was tried"
    del web.lab.access.stream
    web.works()
    assert "over HTTPS: error 5" in web.lab.engine.points()[-1].disks[0].reason


def test_a_disk_that_became_raw_is_read_in_full(web: Web) -> None:
    """enable_cbt seems to work, but the snapshot has no log."""
    web.pool.VDI_disable_cbt(web.vdi)
    web.pool.VDI_enable_cbt = lambda vdi: None  # type: ignore[method-assign]
    report = web.lab.backup(web.vm)
    assert report.point.disks[0].reason == "the snapshot has no changed-block log"
    web.lab.check_point(report.point, {0: bytes(web.pool.content[web.vdi])})
    assert web.pool.leftovers() == []


# room, chains


def test_a_thick_sr_without_room_is_not_tried(web: Web) -> None:
    web.pool.db.set(web.pool.sr, type="lvmoiscsi", physical_size=10 * GIB, physical_utilisation=10 * GIB - 4 * MIB + 1)
    assert "a snapshot needs 0.004 GiB on SR nfs, which is thick and has 0.004 GiB free" in web.skipped()
    web.pool.db.set(web.pool.sr, other_config={"xbfs:check-room": "false"})
    assert web.job().outcome.failures == {}, "the SR decides"
    web.pool.db.set(web.pool.sr, other_config={}, physical_utilisation=10 * GIB - 4 * MIB)
    assert web.job().outcome.failures == {}


@pytest.mark.parametrize(("vhds", "refused"), [(26, False), (27, True), (40, True)])
def test_a_chain_that_is_nearly_full_is_not_snapshotted(web: Web, vhds: int, *, refused: bool) -> None:
    web.managed_chain(vhds)
    if refused:
        assert f"its chain has {vhds + 1} VHDs" in web.skipped()
    else:
        assert web.job().outcome.failures == {}


def test_a_backlog_is_waited_for_while_it_falls(web: Web) -> None:
    """Far longer than --wait in all, but never so long without a VHD less."""
    looks = 0
    web.chain(22)

    async def coalesce(_: int, method: str) -> None:
        nonlocal looks
        if method == "VDI.get_all_records":
            looks += 1
            if looks % 4 == 0:
                web.chain(max(0, 22 - looks // 2))

    web.pool.before_call = coalesce
    assert web.job(wait_s=90).outcome.failures == {}
    assert looks > 40


def test_a_backlog_that_does_not_fall_is_named(web: Web) -> None:
    web.chain(4)
    looks = 0

    async def look(_: int, method: str) -> None:
        nonlocal looks
        looks += method == "VDI.get_all_records"

    web.pool.before_call = look
    assert "disk 0: 3 VHDs wait to be coalesced" in web.skipped(wait_s=60)
    assert 3 <= looks <= 8


# the base of the next delta


def test_a_run_that_dies_while_reading_leaves_nothing_that_a_sweep_keeps(web: Web) -> None:
    """Nor does a sweep need the repository for that: a base is noted right before the commit."""
    (old,) = web.lab.kept()
    web.pool.write(web.vdi, 0, b"more")

    async def dead(_: int, method: str) -> None:
        if reading:
            web.pool.faults.append(Fault(method, "UNREACHABLE"))

    def die(*_: object) -> None:
        reading.append(True)
        raise StorageFull("as good as dead")

    reading: list[bool] = []
    web.pool.before_call = dead
    web.lab.access._open = die  # type: ignore[method-assign,assignment]
    with pytest.raises(StorageFull):
        web.lab.backup(web.vm)
    web.pool.before_call = None
    web.pool.faults.clear()
    del web.lab.access._open
    assert len(web.pool.snapshot_vdis()) == 2
    assert web.lab.kept() == [old]
    web.sweep(ask=False)
    assert [web.pool.uuid(ref) for ref in web.pool.snapshot_vdis()] == [old]
    web.works()


@pytest.mark.parametrize("ask", [False, True])
@pytest.mark.parametrize("committed", [False, True])
def test_sweeps_after_a_death_around_the_commit(web: Web, *, ask: bool, committed: bool) -> None:
    """Without the repository no base goes that a point may need; with it exactly the needless one goes."""
    catalog = web.lab.engine.catalog
    commit = type(catalog).commit
    (old,) = web.pool.snapshot_vdis()

    def die(point: RestorePoint) -> RestorePoint:
        died.append(True)
        if committed:
            commit(catalog, point)
        raise StorageFull("as good as dead")

    async def dead(_: int, method: str) -> None:
        if died:
            web.pool.faults.append(Fault(method, "UNREACHABLE"))

    died: list[bool] = []
    catalog.commit = die  # type: ignore[method-assign]
    web.pool.before_call = dead
    with pytest.raises(StorageFull):
        web.lab.backup(web.vm)
    web.pool.before_call = None
    web.pool.faults.clear()
    del catalog.commit
    web.sweep(ask=ask)
    bases = set(web.pool.snapshot_vdis())
    assert (old in bases) == (not ask or not committed)
    assert len(bases) == (1 if ask else 2)
    assert web.pool.leftovers() == []
    web.works()


def test_what_no_point_of_the_repository_needs_goes(tmp_path: Path) -> None:
    """A first run that died before its commit: only the repository knows that there is no point."""
    lab = Lab(tmp_path, FakePool())
    vm = lab.pool.vm("web")
    vdi = lab.pool.disk(vm, 0)

    async def leave() -> None:
        async with lab.ledgers.begin(NODE) as ledger:
            lab.pool.VDI_enable_cbt(vdi)
            ref = lab.pool._snapshot_vdi(vdi)
            from xbfs_engine.source.xapi.ledger import Kind
            from xbfs_engine.source.xapi.markers import slot_of

            item = await ledger.intend(Kind.VDI, uuid=lab.pool.uuid(ref))
            await ledger.keep(item, slot_of(lab.engine.repository.id, lab.pool.uuid(vm), 0))

    lab.run(leave)
    lab.run(lambda: sweep(lab.pool, lab.ledgers, node=NODE, dry_run=False))
    assert len(lab.pool.snapshot_vdis()) == 1
    bases = known_bases(lab.engine.catalog, lab.engine.repository.id)
    lab.run(lambda: sweep(lab.pool, lab.ledgers, node=NODE, dry_run=False, bases=bases))
    assert lab.pool.snapshot_vdis() == []
