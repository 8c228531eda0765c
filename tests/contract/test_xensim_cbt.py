"""Changed block tracking of the simulator: bytes of the logs, links between them, refusals and breaks."""

from __future__ import annotations

import base64
import struct
import uuid as uuids
from typing import TYPE_CHECKING

import pytest

from tests.support.xensim import BACKUP_USER, MIB, XenSim, default_world, running_sim
from tests.support.xensim_client import Api, login

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

BLOCK = 64 * 1024


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sim")


@pytest.fixture(scope="module")
def sim(state: Path) -> Iterator[XenSim]:
    vms = [
        {"name": "vm", "disks": [{"sr": "nfs", "size": 6 * MIB}]},
        {"name": "raw", "disks": [{"sr": "lvm", "size": 4 * MIB, "sm_config": {"type": "raw"}}]},
    ]
    with running_sim(default_world(vms=vms, users=[BACKUP_USER]), state, time_scale=0.01) as running:
        running.fault("storage.gc", "fail", times=1 << 30)
        yield running


@pytest.fixture
def api(sim: XenSim) -> Iterator[Api]:
    session = login(sim)
    yield session
    session.logout()


@pytest.fixture
def vdi(sim: XenSim, api: Api) -> Iterator[str]:
    """A tracked disk of its own for each test."""
    made = str(api.VDI.copy(api.VDI.get_by_uuid(sim.disks("vm")[0]), api.SR.get_by_name_label("nfs")[0]))
    api.VDI.enable_cbt(made)
    yield made
    for one in [*api.VDI.get_snapshots(made), made]:
        api.VDI.destroy(one)


def changed(api: Api, older: str, newer: str) -> bytes:
    return base64.b64decode(api.VDI.list_changed_blocks(older, newer), validate=True)


def log_of(state: Path, uuid: str) -> Path:
    (found,) = state.glob(f"sr-*/{uuid}.cbtlog")
    return found


def test_logs_have_the_layout_of_cbt_util_and_go_with_the_snapshot(
    state: Path, sim: XenSim, api: Api, vdi: str
) -> None:
    uuid = api.VDI.get_uuid(vdi)
    sim.guest_write(uuid, 0, b"x")
    sim.guest_write(uuid, 9 * BLOCK - 1, b"xy")
    assert log_of(state, uuid).read_bytes() == (
        bytes(32) + b"\x01\0\0\0" + bytes(4) + struct.pack("<Q", 6 * MIB) + b"\x01\x03" + bytes(10)
    )
    snapshot = api.VDI.get_uuid(api.VDI.snapshot(vdi, {}))
    old, new = log_of(state, snapshot).read_bytes(), log_of(state, uuid).read_bytes()
    assert old[:32] == bytes(16) + uuids.UUID(uuid).bytes
    assert old[48:] == b"\x01\x03" + bytes(10)
    assert new[:32] == uuids.UUID(snapshot).bytes + bytes(16)
    assert new[48:] == bytes(12)


def test_the_bitmap_has_the_highest_bit_first_and_adds_up(sim: XenSim, api: Api, vdi: str) -> None:
    uuid = api.VDI.get_uuid(vdi)
    snapshots = [api.VDI.snapshot(vdi, {})]
    for block in (0, 9):
        sim.guest_write(uuid, block * BLOCK, b"x")
        snapshots.append(api.VDI.snapshot(vdi, {}))
    assert changed(api, snapshots[0], snapshots[1]) == b"\x80" + bytes(11)
    assert changed(api, snapshots[1], snapshots[2]) == b"\x00\x40" + bytes(10)
    assert changed(api, snapshots[0], snapshots[2]) == b"\x80\x40" + bytes(10)
    sim.guest_write(uuid, 95 * BLOCK, b"x")
    assert changed(api, snapshots[2], vdi) == bytes(11) + b"\x01"


def test_growth_lengthens_the_bitmap_and_marks_nothing(sim: XenSim, api: Api, vdi: str) -> None:
    first = api.VDI.snapshot(vdi, {})
    sim.guest_write(api.VDI.get_uuid(vdi), 0, b"x")
    api.VDI.resize(vdi, str(8 * MIB))
    second = api.VDI.snapshot(vdi, {})
    assert changed(api, first, second) == b"\x80" + bytes(15)


def test_metadata_keep_their_place_in_the_chain_and_pass_their_bits_on(sim: XenSim, api: Api, vdi: str) -> None:
    uuid, snapshots = api.VDI.get_uuid(vdi), []
    for block in range(3):
        sim.guest_write(uuid, block * BLOCK, b"x")
        snapshots.append(api.VDI.snapshot(vdi, {}))
    for _ in range(2):
        api.VDI.data_destroy(snapshots[0])
        assert api.VDI.get_type(snapshots[0]) == "cbt_metadata"
    assert changed(api, snapshots[0], snapshots[2])[0] == 0b01100000
    api.VDI.data_destroy(snapshots[1])
    api.VDI.destroy(snapshots[1])
    assert changed(api, snapshots[0], snapshots[2])[0] == 0b01100000
    with pytest.raises(api.Failure, match="VDI_INCOMPATIBLE_TYPE"):
        api.VDI.snapshot(snapshots[0], {})


def test_what_breaks_a_chain_is_an_error(sim: XenSim, api: Api, vdi: str) -> None:
    first = api.VDI.snapshot(vdi, {})
    with pytest.raises(api.Failure, match=r"SR_BACKEND_FAILURE_460.*same"):
        changed(api, first, first)
    clone = api.VDI.clone(first, {})
    with pytest.raises(api.Failure, match="VDI_NO_CBT_METADATA"):
        changed(api, first, clone)
    api.VDI.destroy(clone)
    api.VDI.disable_cbt(vdi)
    api.VDI.disable_cbt(vdi)
    with pytest.raises(api.Failure, match="VDI_NO_CBT_METADATA"):
        changed(api, first, vdi)
    api.VDI.enable_cbt(vdi)
    second = api.VDI.snapshot(vdi, {})
    for older, newer in ((first, second), (second, first)):
        with pytest.raises(api.Failure, match=r"SR_BACKEND_FAILURE_460.*unrelated"):
            changed(api, older, newer)
    api.VDI.destroy(first)
    with pytest.raises(api.Failure, match="HANDLE_INVALID"):
        changed(api, first, second)


@pytest.mark.parametrize("moment", ["snapshot", "resize"])
def test_a_log_that_cannot_follow_ends_with_a_message(sim: XenSim, api: Api, vdi: str, moment: str) -> None:
    first = api.VDI.snapshot(vdi, {})
    sim.fault(f"cbt.{moment}", "fail")
    if moment == "snapshot":
        assert not api.VDI.get_cbt_enabled(api.VDI.snapshot(vdi, {}))
    else:
        api.VDI.resize(vdi, str(8 * MIB))
    sim.clear()
    sim.fault("storage.gc", "fail", times=1 << 30)
    assert api.VDI.get_cbt_enabled(first)
    assert not api.VDI.get_cbt_enabled(vdi)
    message = sim.dump("message")["message"][-1]
    assert (message["name"], message["obj_uuid"]) == (f"VDI_CBT_{moment.upper()}_FAILED", api.VDI.get_uuid(vdi))


def test_a_log_of_the_wrong_size_is_inconsistent(state: Path, sim: XenSim, api: Api, vdi: str) -> None:
    first, second = api.VDI.snapshot(vdi, {}), api.VDI.snapshot(vdi, {})
    with log_of(state, api.VDI.get_uuid(second)).open("r+b") as file:
        file.seek(40)
        file.write(struct.pack("<Q", 4 * MIB))
    with pytest.raises(api.Failure, match="SR_BACKEND_FAILURE_459"):
        changed(api, first, second)


def test_refusals_of_enable_and_data_destroy(sim: XenSim, api: Api, vdi: str) -> None:
    snapshot = api.VDI.snapshot(vdi, {})
    with pytest.raises(api.Failure, match="OPERATION_NOT_ALLOWED"):
        api.VDI.enable_cbt(snapshot)
    with pytest.raises(api.Failure, match="OPERATION_NOT_ALLOWED"):
        api.VDI.data_destroy(vdi)
    with pytest.raises(api.Failure, match="SR_BACKEND_FAILURE_66"):
        api.VDI.enable_cbt(api.VDI.get_by_uuid(sim.disks("raw")[0]))
    pool = sim.dump("pool")["pool"][0]
    sim.do("set", cls="pool", uuid=pool["uuid"], fields={"restrictions": {"restrict_cbt": "true"}})
    with pytest.raises(api.Failure, match=r"LICENCE_RESTRICTION.*CBT"):
        api.VDI.enable_cbt(vdi)
    assert len(changed(api, snapshot, vdi)) == 12, "only enable_cbt is licensed"
    sim.do("set", cls="pool", uuid=pool["uuid"], fields={"restrictions": pool["restrictions"]})
    api.VDI.disable_cbt(vdi)
    untracked = api.VDI.snapshot(vdi, {})
    with pytest.raises(api.Failure, match="VDI_NO_CBT_METADATA"):
        api.VDI.data_destroy(untracked)


def test_data_destroy_waits_four_seconds_for_vbds(sim: XenSim, api: Api) -> None:
    """Seconds of the pool, that is: 0.04 of ours."""
    disk = api.VDI.get_by_uuid(sim.disks("vm")[0])
    api.VDI.enable_cbt(disk)
    vm = api.VM.snapshot(api.VM.get_by_name_label("vm")[0], "point", [])
    (vbd,) = api.VM.get_VBDs(vm)
    snapshot = api.VBD.get_VDI(vbd)
    assert api.VDI.get_snapshot_of(snapshot) == disk
    with pytest.raises(api.Failure, match=r"VDI_IN_USE.*data_destroy"):
        api.VDI.data_destroy(snapshot)
    api.VM.destroy(vm)
    api.VDI.data_destroy(snapshot)
    api.VDI.destroy(snapshot)
    api.VDI.disable_cbt(disk)


def test_a_crash_of_the_host_costs_the_log(tmp_path: Path) -> None:
    vms = [{"name": "vm", "power_state": "Running", "disks": [{"sr": "nfs", "size": 4 * MIB}]}]
    with running_sim(default_world(vms=vms, users=[BACKUP_USER]), tmp_path, time_scale=0.01) as sim:
        api = login(sim)
        vm, uuid = api.VM.get_by_name_label("vm")[0], sim.disks("vm")[0]
        vdi = api.VDI.get_by_uuid(uuid)
        api.VDI.enable_cbt(vdi)
        with pytest.raises(api.Failure, match=r"VDI_IN_USE.*list_changed_blocks"):
            changed(api, api.VDI.snapshot(vdi, {}), vdi)
        api.VM.hard_shutdown(vm)
        api.VM.start(vm, False, False)
        assert api.VDI.get_cbt_enabled(vdi), "a shutdown in good order keeps the log"
        sim.do("crash_host", host=api.host.get_name_label(api.VM.get_resident_on(vm)))
        assert api.VDI.get_cbt_enabled(vdi)
        assert log_of(tmp_path, uuid).read_bytes()[32] == 0
        api.VM.start(vm, False, False)
        assert not api.VDI.get_cbt_enabled(vdi)
        (message,) = sim.dump("message")["message"]
        assert (message["name"], message["obj_uuid"]) == ("VDI_CBT_METADATA_INCONSISTENT", uuid)
        assert not list(tmp_path.glob(f"sr-*/{uuid}.cbtlog"))
        api.logout()
