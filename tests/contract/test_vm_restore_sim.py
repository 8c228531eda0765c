"""VMs and disks restored onto simulated pools: by archive and by records, as copies and as themselves, elsewhere."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import trio

from tests.support.engine import pattern
from tests.support.restore_lab import RestoreLab, content, parts, state_of
from tests.support.xensim import GIB, MIB, XenSim, default_world, running_sim
from xbfs_engine.core.errors import BlobLost, ObjectNotFound, UsageError, VmNotReady, XapiFailure
from xbfs_engine.source.xapi.markers import PREFIX
from xbfs_engine.source.xapi.vm_record import ARCHIVE_KEY, vm_record_of

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from xbfs_engine.catalog.restore_point import RestorePoint
    from xbfs_engine.restore.vm.job import RestoredVm

ALLOWED = {"name": "lab", "restrictions": {"restrict_cbt": "false", "restrict_vtpm": "false"}}
OF_A_VM_ITSELF = {
    *("uuid", "name_label", "other_config", "VBDs", "VIFs", "VTPMs", "metrics", "guest_metrics", "allowed_operations"),
    *("snapshots", "children", "power_state", "domid", "resident_on", "affinity", "parent"),
    *("snapshot_info", "snapshot_time", "version", "generation_id", "ha_always_run", "is_a_template", "consoles"),
}


class Site:
    """A pool, and points of its VMs."""

    big: RestorePoint

    def __init__(self, sim: XenSim, lab: RestoreLab) -> None:
        self.sim = sim
        self.lab = lab
        root, data = sim.disks("web")
        sim.guest_write(root, 64 << 10, pattern(1, 3 * MIB + 5))
        sim.guest_write(root, 8 * MIB - 3, b"end")
        sim.guest_write(data, 4 * MIB + 7, b"some")
        sim.guest_write(sim.disks("db")[0], 0, pattern(2, MIB))
        self.web = trio.run(lab.back_up, sim, "web")
        self.db = trio.run(lab.back_up, sim, "db")

    def restore(self, point: RestorePoint, **wishes: Any) -> RestoredVm:
        return trio.run(lambda: self.lab.restore(self.sim, point, **wishes))

    def record(self, uuid: str) -> dict[str, Any]:
        return next(vm for vm in self.sim.dump("VM")["VM"] if vm["uuid"] == uuid)

    def check_disks(self, point: RestorePoint, done: Any) -> None:
        assert [disk.made.plan.number for disk in done.disks] == [disk.number for disk in point.disks]
        for disk, made in zip(point.disks, done.disks, strict=True):
            read = content(self.sim, made.made.uuid)
            assert read[: disk.size_bytes] == self.lab.engine.read(disk)
            assert not any(read[disk.size_bytes :])

    def remove(self, done: RestoredVm) -> None:
        """Delete what was restored."""
        vm = f"uuid:VM:{done.made.uuid}"
        if self.record(done.made.uuid)["power_state"] == "Running":
            self.sim.call("VM.hard_shutdown", vm)
        self.sim.call("VM.destroy", vm)
        for disk in done.disks:
            self.sim.call("VDI.destroy", f"uuid:VDI:{disk.made.uuid}")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    directory = tmp_path_factory.mktemp("restore")
    world = default_world(pool=ALLOWED)
    world["srs"] = [*world["srs"], {"name": "hba", "type": "hba", "size": 4 * GIB}]
    world["vms"] = [*world["vms"], {"name": "big", "disks": [{"name": "big", "sr": "nfs", "size": 32 * MIB}]}]
    with running_sim(world, directory / "sim") as sim:
        site = Site(sim, RestoreLab(directory))
        # More than a network takes before a host says no.
        sim.guest_write(sim.disks("big")[0], MIB, pattern(3, 20 * MIB))
        site.big = trio.run(site.lab.back_up, sim, "big")
        yield site


@pytest.fixture(autouse=True)
def _nothing_is_left(site: Site) -> Iterator[None]:
    before = state_of(site.sim)
    yield
    site.sim.clear()
    assert state_of(site.sim) == before
    assert trio.run(site.lab.noted) == []


def without_archive(point: RestorePoint) -> RestorePoint:
    return replace(point, vm={key: value for key, value in point.vm.items() if key != ARCHIVE_KEY})


def spoilt(point: RestorePoint) -> RestorePoint:
    return replace(point, vm={**point.vm, ARCHIVE_KEY: b"this is no tar"})


@pytest.mark.parametrize("way", ["archive", "records"])
def test_a_copy_has_everything_but_the_identity(site: Site, way: str) -> None:
    sim, point = site.sim, site.web if way == "archive" else without_archive(site.web)
    done = site.restore(point, name="copy")
    try:
        assert (done.made.way, done.warnings, done.started) == (way, (), False)
        site.check_disks(point, done)
        assert [(disk.format, disk.reason) for disk in done.disks] == [("vhd", "")] * 2
        made, old = sim.vm("copy"), sim.vm("web")
        assert made["uuid"] == done.made.uuid != old["uuid"]
        assert {k: v for k, v in made.items() if k not in OF_A_VM_ITSELF} == {
            k: v for k, v in old.items() if k not in OF_A_VM_ITSELF
        }
        assert (made["power_state"], made["is_a_template"], made["blocked_operations"]) == ("Halted", False, {})
        assert made["other_config"].pop("xbfs:restored-from") == point.id
        assert made["other_config"].pop("mac_seed") != old["other_config"]["mac_seed"]
        assert not [key for key in made["other_config"] if key.startswith(PREFIX)]
        for cls, own in (
            ("VBD", {"uuid", "VM", "VDI", "device", "currently_attached", "metrics", "allowed_operations"}),
            ("VIF", {"uuid", "VM", "MAC", "MAC_autogenerated", "currently_attached", "metrics", "allowed_operations"}),
        ):
            news, olds = parts(sim, cls, made["uuid"]), parts(sim, cls, old["uuid"])
            assert [{k: v for k, v in one.items() if k not in own} for one in news] == [
                {k: v for k, v in one.items() if k not in own} for one in olds
            ], cls
        assert parts(sim, "VIF", made["uuid"])[0]["MAC"] != parts(sim, "VIF", old["uuid"])[0]["MAC"]
        vdis = {vdi["uuid"]: vdi for vdi in sim.dump("VDI")["VDI"]}
        assert [vdis[disk.made.uuid]["name_label"] for disk in done.disks] == ["web-root", "web-data"]
        assert all(vdis[disk.made.uuid]["other_config"] == {"xbfs:restored-from": point.id} for disk in done.disks)
        # A sweep takes nothing of it.
        before = state_of(sim)
        assert trio.run(site.lab.sweep, sim).done == ()
        assert state_of(sim) == before
    finally:
        site.remove(done)


@pytest.mark.parametrize("way", ["archive", "records"])
def test_firmware_bios_and_tpm_come_back(site: Site, way: str) -> None:
    sim, point = site.sim, site.db if way == "archive" else without_archive(site.db)
    done = site.restore(point, name="again", sr="lvm")
    try:
        assert done.made.way == way
        site.check_disks(point, done)
        made, old = sim.vm("again"), sim.vm("db")
        for field in ("NVRAM", "bios_strings", "platform", "HVM_boot_params", "memory_static_max"):
            assert made[field] == old[field] != {}, field
        (vtpm,) = parts(sim, "VTPM", made["uuid"])
        contents = sim.call("VTPM.get_contents", f"uuid:VTPM:{vtpm['uuid']}")
        assert contents == ("c3RhdGUgb2YgYSBUUE0=" if way == "archive" else "")
        assert ("content of the vTPM: only the metadata archive holds it" in done.lost) == (way == "records")
    finally:
        site.remove(done)


def test_identity_is_not_taken_from_a_vm_that_is_there(site: Site) -> None:
    with pytest.raises(VmNotReady, match="holds a VM with the uuid") as caught:
        site.restore(site.db, keep_identity=True)
    assert "without --keep-identity" in caught.value.hint


def test_identity_is_kept_when_it_is_asked_for_and_free(tmp_path: Path) -> None:
    with running_sim(default_world(), tmp_path / "sim") as sim:
        site = Site(sim, RestoreLab(tmp_path))
        old = sim.vm("db")
        macs = [vif["MAC"] for vif in parts(sim, "VIF", old["uuid"])]
        sim.call("VM.destroy", f"uuid:VM:{old['uuid']}")
        for point, way in ((site.db, "archive"), (without_archive(site.db), "records")):
            done = site.restore(point, name="self", keep_identity=True)
            assert done.made.way == way
            assert [vif["MAC"] for vif in parts(sim, "VIF", done.made.uuid)] == macs
            assert (done.made.uuid == old["uuid"]) == (way == "archive")
            assert any(lost.startswith("uuid: ") for lost in done.lost) == (way == "records")
            assert sim.vm("self")["other_config"]["mac_seed"] == old["other_config"]["mac_seed"]
            site.remove(done)
        # Another VM has the seed that the VM's MACs are made of.
        web = f"uuid:VM:{sim.vm('web')['uuid']}"
        sim.call("VM.remove_from_other_config", web, "mac_seed")
        sim.call("VM.add_to_other_config", web, "mac_seed", old["other_config"]["mac_seed"])
        before = state_of(sim)
        with pytest.raises(VmNotReady, match="MAC"):
            site.restore(site.db, keep_identity=True)
        assert state_of(sim) == before
        # What the repository lost is no zeros, and half a disk is none.
        for blob in list(site.lab.engine.storage.list_blobs("data/")):
            site.lab.engine.storage.delete(blob.name)
        with pytest.raises(BlobLost, match="disk 0 of restore point"):
            site.restore(site.db)
        assert state_of(sim) == before


@pytest.mark.parametrize("code", ["VM_TO_IMPORT_IS_NOT_NEWER_VERSION", "VM_BAD_POWER_STATE"])
def test_a_vm_that_came_meanwhile_is_not_replaced(site: Site, code: str) -> None:
    site.sim.fault("PUT /import_metadata", "fail", code=code, params=["OpaqueRef:x", "1", "1"])
    with pytest.raises(VmNotReady, match="already"):
        site.restore(site.web, name="copy")


@pytest.mark.parametrize(
    "code",
    ["IMPORT_INCOMPATIBLE_VERSION", "VDI_LOCATION_MISSING", "VDI_CONTENT_ID_MISSING", "IMPORT_ERROR", "UNHEARD_OF"],
)
def test_a_refused_archive_gives_way_to_the_records(site: Site, code: str) -> None:
    site.sim.fault("PUT /import_metadata", "fail", code=code)
    done = site.restore(site.web, name="copy")
    assert done.made.way == "records"
    assert code in done.made.reason
    site.check_disks(site.web, done)
    site.remove(done)


def test_an_archive_that_can_not_be_read_gives_way_to_the_records(site: Site) -> None:
    done = site.restore(spoilt(site.web), name="copy")
    assert (done.made.way, done.made.reason) == ("records", "the metadata archive is no tar that can be read")
    site.remove(done)


def test_a_point_without_a_record_gives_back_only_disks(site: Site) -> None:
    bare = replace(site.web, vm={})
    with pytest.raises(VmNotReady, match="nothing else of the VM"):
        site.restore(bare)
    done = trio.run(site.lab.restore_disks, site.sim, bare, 1)
    (disk,) = done.disks
    assert content(site.sim, disk.made.uuid) == site.lab.engine.read(bare.disks[1])
    site.sim.call("VDI.destroy", f"uuid:VDI:{disk.made.uuid}")


def test_some_disks_only(site: Site) -> None:
    for point in (site.web, without_archive(site.web)):
        done = site.restore(point, name="half", disks=frozenset({0}))
        vbds = parts(site.sim, "VBD", done.made.uuid)
        assert [(vbd["userdevice"], vbd["type"], vbd["bootable"]) for vbd in vbds] == [
            ("0", "Disk", True),
            ("3", "CD", False),
        ]
        assert "disk 1: it was not asked for" in done.lost
        site.remove(done)
    with pytest.raises(UsageError, match="no disk 7"):
        site.restore(site.web, disks=frozenset({7}))


def test_it_is_started_in_the_end(site: Site) -> None:
    done = site.restore(site.web, name="copy", start=True)
    assert done.started
    assert site.sim.vm("copy")["power_state"] == "Running"
    site.remove(done)
    site.sim.fault("VM.start", "fail", code="HOST_NOT_ENOUGH_FREE_MEMORY", params=["1", "0"])
    done = site.restore(site.web, name="copy", start=True)
    assert not done.started
    assert "not started" in done.warnings[0]
    site.remove(done)


def test_disks_by_themselves_are_named_after_vm_and_time(site: Site) -> None:
    done = trio.run(site.lab.restore_disks, site.sim, site.web, 0, 1)
    site.check_disks(site.web, done)
    names = {vdi["uuid"]: vdi["name_label"] for vdi in site.sim.dump("VDI")["VDI"]}
    first, second = (names[disk.made.uuid] for disk in done.disks)
    assert first.startswith("web disk 0 20")
    assert second.startswith("web disk 1 20")
    for disk in done.disks:
        site.sim.call("VDI.destroy", f"uuid:VDI:{disk.made.uuid}")


@pytest.mark.parametrize("name", ["web", "db"])
def test_disks_are_attached_to_a_vm_also_to_a_running_one(site: Site, name: str) -> None:
    sim, vm = site.sim, site.sim.vm(name)
    before = {vbd["uuid"] for vbd in parts(sim, "VBD", vm["uuid"])}
    done = trio.run(lambda: site.lab.restore_disks(sim, site.web, 1, attach=vm["uuid"]))
    (disk,) = done.disks
    assert done.warnings == ()
    (vbd,) = (vbd for vbd in parts(sim, "VBD", vm["uuid"]) if vbd["uuid"] not in before)
    assert (vbd["VDI"], vbd["mode"], vbd["bootable"]) == (disk.made.uuid, "RW", False)
    assert vbd["currently_attached"] == (vm["power_state"] == "Running")
    if vbd["currently_attached"]:
        sim.call("VBD.unplug", f"uuid:VBD:{vbd['uuid']}")
    sim.call("VBD.destroy", f"uuid:VBD:{vbd['uuid']}")
    sim.call("VDI.destroy", f"uuid:VDI:{disk.made.uuid}")


def test_what_is_refused_before_anything_is_made(site: Site) -> None:
    with pytest.raises(ObjectNotFound, match="no SR 'nowhere'") as caught:
        site.restore(site.web, sr="nowhere")
    assert "lvm, nfs" in caught.value.hint
    with pytest.raises(ObjectNotFound, match="no network 'moon'"):
        site.restore(site.web, networks={"lan": "moon"})
    with pytest.raises(UsageError, match="the VM was in no such network"):
        site.restore(site.web, networks={"moon": "lan"})
    huge = replace(site.web, disks=(replace(site.web.disks[0], size_bytes=5 * GIB),))
    with pytest.raises(VmNotReady, match="GiB free"):
        site.restore(huge, sr="lvm")


def test_a_disk_that_no_vhd_can_hold(site: Site) -> None:
    disk = replace(site.web.disks[0], size_bytes=2041 * GIB)
    with pytest.raises(VmNotReady, match=r"disk 0 has 2041 GiB, and SR nfs takes at most 2040 GiB"):
        site.restore(replace(site.web, disks=(disk,)))


def test_a_busy_sr_is_waited_for(site: Site) -> None:
    site.sim.fault("VDI.create", "fail", code="OTHER_OPERATION_IN_PROGRESS", params=["SR", "x", "scan", "y"], times=2)
    site.sim.fault("VM.set_name_label", "drop")
    done = site.restore(site.db, name="copy")
    site.check_disks(site.db, done)
    site.remove(done)


def test_a_tpm_that_is_refused_does_not_stop_a_restore(site: Site) -> None:
    site.sim.fault("VTPM.create", "fail", code="LICENCE_RESTRICTION", params=["VTPM"])
    done = site.restore(without_archive(site.db), name="copy")
    assert any(lost.startswith("vTPM: ") for lost in done.lost)
    site.remove(done)


def test_a_stream_that_breaks_off_is_sent_again(site: Site) -> None:
    site.sim.fault("import.body", "fail_late", params=[str(9 * MIB)])
    done = site.restore(site.big, name="copy")
    site.check_disks(site.big, done)
    assert [(disk.format, disk.reason) for disk in done.disks] == [("vhd", "")]
    site.remove(done)


@pytest.mark.parametrize("times", [1, 2])
def test_where_no_vhd_is_taken_the_disk_is_sent_raw(site: Site, times: int) -> None:
    site.sim.fault("import.body", "fail_late", params=["1"], times=times)
    done = site.restore(site.db, name="copy")
    site.check_disks(site.db, done)
    assert done.disks[0].format == "raw"
    assert "not take it as VHD" in done.disks[0].reason
    site.remove(done)


def test_an_sr_of_raw_disks(site: Site) -> None:
    done = trio.run(lambda: site.lab.restore_disks(site.sim, site.web, 0, 1, sr="hba"))
    site.check_disks(site.web, done)
    assert [(disk.format, disk.made.size_bytes) for disk in done.disks] == [("raw", 8 * MIB)] * 2
    for disk in done.disks:
        site.sim.call("VDI.destroy", f"uuid:VDI:{disk.made.uuid}")


def test_a_disk_that_the_host_can_not_write_fails_the_restore(site: Site) -> None:
    site.sim.fault("import.body", "fail_late", params=["100"], times=100)
    with pytest.raises(XapiFailure) as caught:
        site.restore(site.web, name="copy")
    assert caught.value.code == "VDI_IO_ERROR"


def test_networks_of_one_name_are_told_apart(site: Site) -> None:
    sim = site.sim
    nets = {network["name_label"]: network["uuid"] for network in sim.dump("network")["network"]}
    sim.do("set", cls="network", uuid=nets["lab"], fields={"name_label": "lan"})
    try:
        done = site.restore(site.web, name="copy", networks={"lan": nets["lab"]})
        assert done.made.way == "archive"
        assert [vif["network"] for vif in parts(sim, "VIF", done.made.uuid)] == [nets["lab"]]
        site.remove(done)
        with pytest.raises(ObjectNotFound, match="2 networks"):
            site.restore(site.web, networks={"lan": "lan"})
    finally:
        sim.do("set", cls="network", uuid=nets["lab"], fields={"name_label": "lab"})


@pytest.mark.parametrize("release", ["8.3", "8.2"])
def test_another_pool_that_never_saw_the_vm(site: Site, tmp_path: Path, release: str) -> None:
    world = default_world(
        vms=[],
        networks=[{"name": "dr", "bridge": "xenbr0"}, {"name": "dr lab", "bridge": "xenbr7"}],
        pool={"name": "dr", "restrictions": {"restrict_vtpm": "true"}},
    )
    with running_sim(world, tmp_path / "sim", release=release) as sim:
        elsewhere = Site.__new__(Site)
        elsewhere.sim, elsewhere.lab = sim, site.lab
        empty = state_of(sim)
        with pytest.raises(ObjectNotFound, match=r"'lab' \(there is none\)") as caught:
            elsewhere.restore(site.db)
        assert "--network" in caught.value.hint
        assert state_of(sim) == empty
        done = elsewhere.restore(site.db, networks={"lan": "dr", "lab": "dr lab"}, keep_identity=True)
        elsewhere.check_disks(site.db, done)
        # An older release refuses the archive of a newer one.
        assert done.made.way == ("archive" if release == "8.3" else "records"), done.made.reason
        assert "vTPM: the pool's licence does not include it" in done.lost
        assert parts(sim, "VTPM", done.made.uuid) == []
        names = {network["uuid"]: network["name_label"] for network in sim.dump("network")["network"]}
        assert sorted(names.values()) == ["dr", "dr lab"]
        vifs = parts(sim, "VIF", done.made.uuid)
        assert [names[vif["network"]] for vif in vifs] == ["dr", "dr lab"]
        recorded = [shape.vif["MAC"] for shape in vm_record_of(site.db.vm).vifs]
        assert [vif["MAC"] for vif in vifs] == recorded
        sim.call("VM.start", f"uuid:VM:{done.made.uuid}", False, False)
