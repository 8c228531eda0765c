"""What is remembered of a VM: all that a restore needs, nothing that means nothing later, and bounded."""

from __future__ import annotations

import copy
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.fake_xapi import FakeXapi
from xbfs_engine.codec import wire
from xbfs_engine.core.errors import FormatTooNew, PoolError, WireError, XbfsError
from xbfs_engine.source.xapi.markers import block_reason
from xbfs_engine.source.xapi.vm_record import ARCHIVE_SIZE_MAX, VmRecord, capture_vm, vm_record_of


class World:
    """A VM with all that one can have."""

    def __init__(self) -> None:
        self.xapi = FakeXapi()
        db = self.xapi.db
        self.vm = self.xapi.vm(
            "web",
            resident_on=self.xapi.host,
            NVRAM={"EFI-variables": "AAAA" * 1000},
            bios_strings={"bios-vendor": "Xen"},
            HVM_boot_params={"firmware": "uefi", "order": "cd"},
            HVM_shadow_multiplier=1.5,
            memory_static_max=1 << 33,
            tags=["daily"],
            other_config={"mac_seed": "seed", "xbfs:run": "x"},
            blocked_operations={"destroy": "no", "pool_migrate": block_reason("0" * 16, "node")},
        )
        self.disk = self.xapi.vdi(tags=["fast"])
        self.xapi.vbd(self.vm, self.disk, 0, bootable=True)
        self.xapi.vbd(self.vm, "OpaqueRef:NULL", 3, type="CD", empty=True)
        lan = db.create("network", name_label="lan", bridge="xapi7", MTU=9000)
        db.create("PIF", host=self.xapi.host, network=lan, VLAN=70)
        db.create("VIF", VM=self.vm, network=lan, device="0", MAC="00:11:22:33:44:55", locking_mode="unlocked")
        db.create("VTPM", VM=self.vm, is_unique=True)
        db.set(self.vm, VUSBs=["OpaqueRef:usb"])
        metrics = db.create("VM_guest_metrics", os_version={"name": "Debian 12"})
        db.set(self.vm, guest_metrics=metrics)

    async def capture(self, archive: bytes | None = b"archive") -> VmRecord:
        return await capture_vm(self.xapi, self.vm, archive)


@pytest.fixture
def world() -> World:
    return World()


async def test_what_is_captured(world: World) -> None:
    record = await world.capture()
    vm = record.vm
    assert vm["name_label"] == "web"
    assert vm["memory_static_max"] == str(1 << 33)
    assert vm["HVM_shadow_multiplier"] == "1.5"
    assert vm["HVM_boot_params"] == {"firmware": "uefi", "order": "cd"}
    assert vm["NVRAM"] == {"EFI-variables": "AAAA" * 1000}
    assert vm["snapshot_time"] == "1970-01-01T00:00:00Z"
    assert vm["is_a_template"] is False
    assert vm["other_config"] == {"mac_seed": "seed"}
    assert vm["blocked_operations"] == {"destroy": "no"}
    assert "resident_on" not in vm
    assert "allowed_operations" not in vm
    disk, drive = record.disks
    assert disk.vbd["bootable"] is True
    assert disk.vdi is not None
    assert disk.vdi["uuid"] == world.xapi.uuid(world.disk)
    assert record.srs[disk.sr_uuid]["type"] == "nfs"
    assert (drive.vdi, drive.sr_uuid) == (None, "")
    (vif,) = record.vifs
    assert (vif.vif["MAC"], vif.network["name_label"], vif.vlan) == ("00:11:22:33:44:55", "lan", "70")
    assert record.vtpms[0]["is_unique"] is True
    assert record.host["software_version"] == {"product_version": "8.3.0", "product_brand": "XCP-ng"}
    assert record.pool["name_label"] == "lab"
    assert record.guest["os_version"] == {"name": "Debian 12"}
    assert record.notes == ("1 USB device",)
    assert record.archive == b"archive"


@pytest.mark.parametrize("archive", [b"archive", None])
async def test_it_survives_the_repository(world: World, archive: bytes | None) -> None:
    record = await world.capture(archive)
    fields = record.to_fields()
    stored = wire.decode(wire.encode({"vm": {**fields, "xen": 1}}), "test").mapping("vm")
    assert vm_record_of(stored) == record
    assert b"OpaqueRef" not in wire.encode(fields)


async def test_what_is_too_large_is_left_out_and_noted(world: World) -> None:
    world.xapi.db.set(world.vm, xenstore_data={"vm-data/x": "x" * (600 << 10)})
    record = await world.capture(bytes(ARCHIVE_SIZE_MAX + 1))
    assert "xenstore_data" not in record.vm
    assert record.archive is None
    assert len(record.notes) == 3


@pytest.mark.parametrize(
    ("method", "code"),
    [
        ("VBD.get_record", "HANDLE_INVALID"),
        ("VTPM.get_record", "MESSAGE_METHOD_UNKNOWN"),
        ("SR.get_record", "HANDLE_INVALID"),
    ],
)
async def test_what_vanishes_meanwhile_is_noted(world: World, method: str, code: str) -> None:
    world.xapi.faults[method] = [code]
    record = await world.capture()
    assert any(code in note for note in record.notes)
    assert vm_record_of(record.to_fields()) == record


async def test_other_failures_are_raised(world: World) -> None:
    world.xapi.faults["VDI.get_record"] = ["HOST_OFFLINE"]
    with pytest.raises(PoolError):
        await world.capture()


async def test_newer_records_are_refused(world: World) -> None:
    fields = copy.deepcopy((await world.capture()).to_fields())
    fields["record"]["version"] = 2  # type: ignore[index, call-overload]  # a map, as just made
    with pytest.raises(FormatTooNew):
        vm_record_of(fields)
    with pytest.raises(WireError):
        vm_record_of({"xen": 1})


VALUES = st.recursive(
    st.none() | st.text(max_size=5) | st.integers(-5, 5) | st.booleans() | st.binary(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=150, deadline=None)
@given(st.data())
async def test_damaged_records_give_typed_errors_only(data: st.DataObject) -> None:
    fields: Any = copy.deepcopy((await World().capture()).to_fields())
    place = fields
    for _ in range(data.draw(st.integers(1, 4))):
        keys = sorted(place) if isinstance(place, dict) else list(range(len(place)))
        if not keys:
            break
        key = data.draw(st.sampled_from(keys))
        inner = place[key]
        if not isinstance(inner, dict | list) or data.draw(st.booleans()):
            place[key] = data.draw(VALUES)
            break
        place = inner
    with suppress(XbfsError):
        vm_record_of(fields)
