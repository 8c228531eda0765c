"""Disks of the simulator: what VDI, SR and PBD calls do, and that no shuffling of layers ever changes a byte."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from tests.support.xensim import BACKUP_USER, GIB, MIB, XenSim, default_world, running_sim
from tests.support.xensim_client import Api, login

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

OPERATOR = {"name": "operator", "password": "operator-password", "role": "pool-operator"}


@pytest.fixture(scope="module")
def sim(tmp_path_factory: pytest.TempPathFactory) -> Iterator[XenSim]:
    disks = [{"sr": "nfs", "size": 4 * MIB}, {"sr": "lvm", "size": 4 * MIB}]
    vms = [{"name": "vm", "power_state": "Running", "disks": disks}]
    world = default_world(vms=vms, users=[BACKUP_USER, OPERATOR])
    with running_sim(world, tmp_path_factory.mktemp("sim"), time_scale=0.01) as running:
        running.fault("storage.gc", "fail", times=1 << 30)
        yield running


@pytest.fixture
def api(sim: XenSim) -> Iterator[Api]:
    session = login(sim, str(OPERATOR["name"]), str(OPERATOR["password"]))
    yield session
    session.logout()


def sr_named(api: Api, name: str) -> str:
    (found,) = api.SR.get_by_name_label(name)
    return str(found)


def create(api: Api, sr: str, size: int, **more: Any) -> str:
    record = {
        "name_label": "made",
        "name_description": "",
        "SR": sr,
        "virtual_size": str(size),
        "type": "user",
        "sharable": False,
        "read_only": False,
        "other_config": {},
        "xenstore_data": {},
        "sm_config": {},
        "tags": [],
    }
    return str(api.VDI.create(record | more))


@pytest.fixture
def vdi(api: Api) -> Iterator[str]:
    made = create(api, sr_named(api, "nfs"), 4 * MIB)
    yield made
    for snapshot in api.VDI.get_snapshots(made):
        api.VDI.destroy(snapshot)
    api.VDI.destroy(made)


def bases(sim: XenSim) -> dict[str, str]:
    """Unmanaged VDIs and their parents."""
    return {v["uuid"]: v["sm_config"].get("vhd-parent", "") for v in sim.dump("VDI")["VDI"] if not v["managed"]}


def test_sizes_are_rounded_to_two_mebibytes_and_end_at_2040_gibibytes(api: Api) -> None:
    sr = sr_named(api, "nfs")
    for asked, got in ((0, 2 * MIB), (2 * MIB + 1, 4 * MIB), (2040 * GIB, 2040 * GIB)):
        vdi = create(api, sr, asked)
        assert int(api.VDI.get_virtual_size(vdi)) == got
        api.VDI.destroy(vdi)
    with pytest.raises(api.Failure, match="VDI_TOO_LARGE"):
        create(api, sr, 2040 * GIB + 1)


def test_a_snapshot_leaves_a_hidden_base_with_two_leaves(sim: XenSim, api: Api, vdi: str) -> None:
    before = bases(sim)
    uuid = api.VDI.get_uuid(vdi)
    api.VDI.set_name_label(vdi, "data")
    api.VDI.add_to_other_config(vdi, "mark", "mine")
    sim.guest_write(uuid, 4097, b"before")
    snapshot = api.VDI.get_record(api.VDI.snapshot(vdi, {}))
    sim.guest_write(uuid, 4098, b"AFTER")
    (base,) = set(bases(sim)) - set(before)
    parents = [snapshot["sm_config"]["vhd-parent"], api.VDI.get_sm_config(vdi)["vhd-parent"]]
    assert parents == [base, base]
    assert (snapshot["is_a_snapshot"], snapshot["snapshot_of"], snapshot["managed"]) == (True, vdi, True)
    assert (snapshot["name_label"], snapshot["other_config"]["mark"]) == ("data", "mine")
    assert sim.read(snapshot["uuid"], 4096, 8) == b"\0before\0"
    assert sim.read(uuid, 4096, 8) == b"\0bAFTER\0"


def test_bases_with_one_child_are_merged_unless_the_sr_says_no(sim: XenSim, api: Api, vdi: str) -> None:
    sr, uuid, before = sr_named(api, "nfs"), api.VDI.get_uuid(vdi), set(bases(sim))
    snapshots = []
    for number in range(3):
        sim.guest_write(uuid, number * 8192, bytes([65 + number]) * 8192)
        snapshots.append(api.VDI.snapshot(vdi, {}))
    content = sim.read(uuid, 0, 4 * MIB)
    made = {base: parent for base, parent in bases(sim).items() if base not in before}
    assert len(made) == 3
    for snapshot in snapshots[:2]:
        api.VDI.destroy(snapshot)
    api.SR.add_to_other_config(sr, "gc", "false")
    sim.do("coalesce")
    assert {base for base in bases(sim) if base not in before} == set(made)
    api.SR.remove_from_other_config(sr, "gc")
    sim.do("coalesce")
    left = {base: parent for base, parent in bases(sim).items() if base not in before}
    assert list(left.values()) == [""]
    assert sim.read(uuid, 0, 4 * MIB) == sim.read(api.VDI.get_uuid(snapshots[2]), 0, 4 * MIB) == content
    api.VDI.destroy(snapshots[2])
    sim.do("coalesce")
    assert set(bases(sim)) <= before
    assert "vhd-parent" not in api.VDI.get_sm_config(vdi)
    assert sim.read(uuid, 0, 4 * MIB) == content


def test_a_chain_of_thirty_layers_takes_no_snapshot(sim: XenSim, api: Api, vdi: str) -> None:
    uuid = api.VDI.get_uuid(vdi)
    for number in range(29):
        sim.guest_write(uuid, number * 4096, b"layer")
        api.VDI.snapshot(vdi, {})
    with pytest.raises(api.Failure, match="SR_BACKEND_FAILURE_109"):
        api.VDI.snapshot(vdi, {})


def test_a_thick_sr_wants_room_for_a_whole_disk(sim: XenSim, api: Api) -> None:
    sr = sr_named(api, "lvm")
    free = int(api.SR.get_physical_size(sr)) - int(api.SR.get_physical_utilisation(sr))
    vdi = create(api, sr, free // 2 + 64 * MIB)
    assert int(api.SR.get_physical_utilisation(sr)) > free // 2
    with pytest.raises(api.Failure, match="SR_BACKEND_FAILURE_44"):
        api.VDI.snapshot(vdi, {})
    with pytest.raises(api.Failure, match="SR_FULL"):
        create(api, sr, free)
    api.VDI.destroy(vdi)


def test_disks_grow_and_never_shrink(sim: XenSim, api: Api, vdi: str) -> None:
    uuid = api.VDI.get_uuid(vdi)
    sim.guest_write(uuid, 4 * MIB - 5, b"tail!")
    api.VDI.snapshot(vdi, {})
    api.VDI.resize(vdi, str(6 * MIB - 7))
    assert int(api.VDI.get_virtual_size(vdi)) == 6 * MIB
    assert sim.read(uuid, 4 * MIB - 5, 10) == b"tail!\0\0\0\0\0"
    with pytest.raises(api.Failure, match="SR_BACKEND_FAILURE_79"):
        api.VDI.resize(vdi, str(2 * MIB))


def test_clones_and_copies_are_disks_of_their_own(sim: XenSim, api: Api, vdi: str) -> None:
    uuid = api.VDI.get_uuid(vdi)
    sim.guest_write(uuid, 12345, b"shared")
    clone = api.VDI.clone(vdi, {})
    copy = api.VDI.copy(vdi, sr_named(api, "lvm"))
    sim.guest_write(uuid, 12345, b"ORIGIN")
    for other in (clone, copy):
        record = api.VDI.get_record(other)
        assert (record["is_a_snapshot"], record["snapshot_of"]) == (False, "OpaqueRef:NULL")
        assert sim.read(record["uuid"], 12345, 6) == b"shared"
        api.VDI.destroy(other)
    assert "vhd-parent" in api.VDI.get_sm_config(vdi)


def test_what_is_attached_is_neither_destroyed_nor_resized_nor_unplugged(sim: XenSim, api: Api) -> None:
    used = api.VDI.get_by_uuid(sim.disks("vm")[0])
    assert "RW" in api.VDI.get_sm_config(used).values()
    with pytest.raises(api.Failure, match="VDI_IN_USE"):
        api.VDI.destroy(used)
    with pytest.raises(api.Failure, match="VDI_IN_USE"):
        api.VDI.resize(used, str(8 * MIB))
    (host,) = [host for host in api.host.get_all() if f"host_{host}" in api.VDI.get_sm_config(used)]
    (pbd,) = [pbd for pbd in api.SR.get_PBDs(sr_named(api, "nfs")) if api.PBD.get_host(pbd) == host]
    with pytest.raises(api.Failure, match="VDI_IN_USE"):
        api.PBD.unplug(pbd)


def test_raw_sharable_and_resetting_disks_refuse_snapshots(sim: XenSim, api: Api) -> None:
    sr = sr_named(api, "lvm")
    raw = create(api, sr, 2 * MIB, sm_config={"type": "raw"})
    shared = create(api, sr, 2 * MIB, sharable=True)
    reset = create(api, sr, 2 * MIB)
    api.VDI.set_on_boot(reset, "reset")
    expected = {raw: "UNIMPLEMENTED_IN_SM_BACKEND", shared: "VDI_IS_SHARABLE", reset: "VDI_ON_BOOT_MODE_INCOMPATIBLE"}
    for vdi, code in expected.items():
        with pytest.raises(api.Failure, match=code):
            api.VDI.snapshot(vdi, {})
        api.VDI.destroy(vdi)


def test_storage_moves_unless_it_is_tracked(sim: XenSim, api: Api) -> None:
    old = sim.disks("vm")[0]
    vdi, lvm = api.VDI.get_by_uuid(old), sr_named(api, "lvm")
    sim.guest_write(old, 777, b"moved")
    api.VDI.enable_cbt(vdi)
    with pytest.raises(api.Failure, match="VDI_CBT_ENABLED"):
        api.VDI.pool_migrate(vdi, lvm, {})
    api.VDI.disable_cbt(vdi)
    api.VDI.pool_migrate(vdi, lvm, {})
    new = sim.disks("vm")[0]
    assert new != old
    assert sim.read(new, 777, 5) == b"moved"
    with pytest.raises(api.Failure, match="UUID_INVALID"):
        api.VDI.get_by_uuid(old)


def test_srs_come_and_go(sim: XenSim, api: Api) -> None:
    host = api.host.get_all()[0]
    where = {"server": "127.0.0.1", "serverpath": "/export"}
    sr = api.SR.create(host, where, "0", "made", "", "nfs", "user", True, {})
    uuid = api.SR.get_uuid(sr)
    assert len(api.SR.get_PBDs(sr)) == 2
    vdi = create(api, sr, 2 * MIB)
    disk = api.VDI.get_uuid(vdi)
    sim.guest_write(disk, 0, b"kept")
    with pytest.raises(api.Failure, match="SR_HAS_PBD"):
        api.SR.forget(sr)
    with pytest.raises(api.Failure, match="SR_NOT_EMPTY"):
        api.SR.destroy(sr)
    for pbd in api.SR.get_PBDs(sr):
        api.PBD.unplug(pbd)
        api.PBD.destroy(pbd)
    with pytest.raises(api.Failure, match="SR_HAS_NO_PBDS"):
        create(api, sr, 2 * MIB)
    api.SR.forget(sr)
    again = api.SR.introduce(uuid, "again", "", "nfs", "user", True, {})
    pbd = api.PBD.create({"host": host, "SR": again, "device_config": where})
    with pytest.raises(api.Failure, match="SR_NOT_ATTACHED"):
        api.SR.scan(again)
    api.PBD.plug(pbd)
    api.SR.scan(again)
    assert sim.read(disk, 0, 4) == b"kept"
    api.VDI.destroy(api.VDI.get_by_uuid(disk))
    api.PBD.unplug(pbd)
    api.SR.destroy(again)
    with pytest.raises(api.Failure, match="SR_UNKNOWN_DRIVER"):
        api.SR.create(host, {}, "0", "odd", "", "floppy", "user", True, {})


def test_tracking_is_offered_by_the_sr_and_never_by_the_disk(sim: XenSim, api: Api, vdi: str) -> None:
    assert "vdi_enable_cbt" in api.SR.get_allowed_operations(sr_named(api, "nfs"))
    assert "snapshot" in api.VDI.get_allowed_operations(vdi)
    assert not {"enable_cbt", "data_destroy", "list_changed_blocks"} & set(api.VDI.get_allowed_operations(vdi))


def test_an_image_is_taken_in_with_its_holes(tmp_path: Path) -> None:
    image = tmp_path / "disk.raw"
    with image.open("wb") as file:
        file.seek(5 * MIB)
        file.write(b"five" * 1000)
        file.truncate(64 * GIB + 512)
    world = default_world(vms=[{"name": "vm", "disks": [{"sr": "nfs", "image": str(image)}]}])
    with running_sim(world, tmp_path / "sim") as sim:
        (record,) = sim.dump("VDI")["VDI"]
        assert int(record["virtual_size"]) == 64 * GIB + 2 * MIB
        assert int(record["physical_utilisation"]) < 3 * MIB
        assert sim.read(record["uuid"], 5 * MIB - 2, 6) == b"\0\0five"
