"""Plans of restores and the records they make: what is chosen, left out and refused; hostile points."""

from __future__ import annotations

import copy
from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.fake_xapi import GIB, FakeXapi
from tests.support.points import disk, point
from xbfs_engine.core.errors import FormatTooNew, ObjectNotFound, UsageError, VmNotReady, WireError
from xbfs_engine.restore.vm.plan import VmPlan, VmWishes, plan_disks, plan_vm
from xbfs_engine.restore.vm.shapes import vbd_fields, vif_fields, vm_fields
from xbfs_engine.restore.vm.target import Target, look_at

RECORD: dict[str, Any] = {
    "version": 1,
    "vm": {
        **{"uuid": "u", "memory_static_max": "1024", "HVM_shadow_multiplier": "1.5", "generation_id": "g"},
        **{"other_config": {"mac_seed": "s", "xbfs:run": "r", "mine": "1"}, "NVRAM": {"EFI-variables": "AA=="}},
        **{"bios_strings": {}, "tags": ["a"], "domid": "7"},
    },
    "disks": [
        {"vbd": {"userdevice": "0", "type": "Disk", "bootable": True}, "vdi": {"name_label": "root"}, "sr": "x"},
        {"vbd": {"userdevice": "1", "type": "Disk"}, "vdi": {"name_label": "shared"}, "sr": "x"},
        {"vbd": {"userdevice": "3", "type": "CD"}, "vdi": {"name_label": "setup.iso"}, "sr": "x"},
        {"vbd": {"userdevice": "4", "type": "CD"}, "vdi": None, "sr": ""},
    ],
    "vifs": [{"vif": {"device": "0", "MAC": "AA:BB"}, "network": {"uuid": "n", "name_label": "storage"}, "vlan": "-1"}],
    "vtpms": [{"vtpm": {"is_unique": False}}],
    "srs": {"x": {"type": "nfs"}},
    "host": {},
    "pool": {},
    "guest": {},
    "notes": [{"text": "1 vGPU"}],
}
POINT = replace(point("web", disks=[disk(0, GIB), disk(2, GIB)]), vm={"record": RECORD})


def wishes(**changes: Any) -> VmWishes:
    plain: dict[str, Any] = {"sr": "nfs", "name": None, "disks": frozenset(), "networks": {}, "keep_identity": False}
    return VmWishes(**(plain | changes))


@pytest.fixture(scope="module")
def target() -> Target:
    return trio.run(look_at, FakeXapi())


def plan(target: Target, record: dict[str, Any] = RECORD, **changes: Any) -> VmPlan:
    return plan_vm(replace(POINT, vm={"record": record}), target, wishes(**changes))


def test_what_comes_back_and_what_does_not(target: Target) -> None:
    found = plan(target, name="copy", disks=frozenset({0}))
    assert found.name == "copy"
    assert [(one.number, one.name, one.vbd["bootable"]) for one in found.disks] == [(0, "root", True)]
    assert [drive["userdevice"] for drive in found.drives] == ["3", "4"]
    assert [(vif.device, vif.mac, vif.network.name) for vif in found.vifs] == [("0", "aa:bb", "storage")]
    assert found.left_out == (
        "1 vGPU",
        "disk 1 (shared): it is not in the restore point",
        "CD setup.iso: its drive 3 comes back empty",
        "vTPM: the pool's licence does not include it",
    )


def test_disks_that_no_record_tells_of_come_too(target: Target) -> None:
    assert [one.name for one in plan(target).disks] == ["root", "disk"]


def test_networks_by_uuid_before_name_and_never_a_guess(target: Target) -> None:
    storage = target.networks[0]
    twin = storage._replace(ref="OpaqueRef:twin", uuid="n")
    by_uuid = plan_vm(POINT, Target(target.inventory, [storage, twin]), wishes())
    assert by_uuid.vifs[0].network == twin
    two = Target(target.inventory, [storage, storage._replace(ref="OpaqueRef:twin", uuid="other")])
    with pytest.raises(ObjectNotFound, match=r"'storage' \(several have this name\)"):
        plan_vm(POINT, two, wishes())
    assert plan_vm(POINT, two, wishes(networks={"n": "other"})).vifs[0].network.uuid == "other"
    with pytest.raises(ObjectNotFound, match="there is none") as caught:
        plan_vm(POINT, Target(target.inventory, []), wishes())
    assert "--network 'storage'=NETWORK" in caught.value.hint


def test_srs(target: Target) -> None:
    assert plan(target, sr=target.inventory.sr_by_uuid(plan(target).sr.uuid).uuid).sr.name == "nfs"  # type: ignore[union-attr]
    with pytest.raises(ObjectNotFound, match="no SR 'iso'"):
        plan(target, sr="iso")
    pool = FakeXapi()
    pool.add_sr("nfs")
    with pytest.raises(ObjectNotFound, match="2 SRs"):
        plan(trio.run(look_at, pool))
    lonely = FakeXapi()
    lonely.db.create("SR", name_label="lonely", type="nfs", content_type="user", physical_size=GIB)
    with pytest.raises(VmNotReady, match="connected to no host"):
        plan(trio.run(look_at, lonely), sr="lonely")


def test_room_is_counted_in_full_only_where_disks_are_thick(target: Target) -> None:
    huge = replace(POINT, disks=(disk(0, 901 * GIB, bytes(1 << 17)),))
    assert plan_disks(huge, target, sr="nfs", disks=frozenset(), attach=None).disks
    with pytest.raises(VmNotReady, match=r"900.0 GiB free, the disks need 901.0 GiB"):
        plan_disks(huge, target, sr="lvm", disks=frozenset(), attach=None)


def test_points_that_can_not_be_restored(target: Target) -> None:
    with pytest.raises(VmNotReady, match="nothing else"):
        plan_vm(replace(POINT, vm={}), target, wishes())
    with pytest.raises(FormatTooNew):
        plan(target, RECORD | {"version": 2})
    with pytest.raises(UsageError, match="no disk 5"):
        plan(target, disks=frozenset({0, 5}))


def test_records_for_creating_calls() -> None:
    copied = vm_fields(RECORD["vm"], keep_identity=False)
    assert copied["HVM_shadow_multiplier"] == 1.5
    assert copied["other_config"] == {"mine": "1"}
    assert not {"uuid", "domid", "generation_id", "bios_strings"} & copied.keys()
    kept = vm_fields(RECORD["vm"], keep_identity=True)
    assert (kept["other_config"], kept["generation_id"]) == ({"mac_seed": "s", "mine": "1"}, "g")
    assert "HVM_shadow_multiplier" not in vm_fields({"HVM_shadow_multiplier": "1.0"}, keep_identity=False)
    empty = vbd_fields({"type": "CD", "mode": "RO"}, "vm", None, "3")
    assert (empty["VDI"], empty["empty"], empty["type"], empty["mode"]) == ("OpaqueRef:NULL", True, "CD", "RO")
    with pytest.raises(WireError):
        vm_fields({"HVM_shadow_multiplier": "much"}, keep_identity=False)
    with pytest.raises(WireError):
        vm_fields({"platform": {"a": b"bytes"}}, keep_identity=False)


ANYTHING = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.binary(max_size=3), st.sampled_from(["", "0", "Disk", "²"])),
    lambda inner: st.one_of(st.lists(inner, max_size=2), st.dictionaries(st.text(max_size=4), inner, max_size=2)),
    max_leaves=4,
)


@settings(max_examples=200, deadline=None)
@given(data=st.data(), value=ANYTHING)
def test_hostile_records_end_in_typed_errors(target: Target, data: st.DataObject, value: Any) -> None:
    record: Any = copy.deepcopy(RECORD)
    place = record
    while True:
        key = data.draw(st.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place))))
        if not isinstance(place[key], dict | list) or not place[key] or data.draw(st.booleans()):
            place[key] = value
            break
        place = place[key]
    with suppress(WireError, ObjectNotFound, FormatTooNew):
        found = plan(target, record)
        vm_fields(found.record.vm, keep_identity=True)
        for one in found.disks:
            vbd_fields(one.vbd, "vm", "vdi", "0")
        for drive in found.drives:
            vbd_fields(drive, "vm", None, str(drive.get("userdevice")))
        for vif in found.vifs:
            vif_fields(vif, "vm", keep_mac=True)
