"""VMs of the simulated pool through the published XenAPI package: life cycle, snapshots, disks, what blocks what."""

from __future__ import annotations

import pytest

from tests.support.xensim import MIB, default_world, running_sim
from tests.support.xensim_api import disks_of, logged_in, refused, vm_of

NULL = "OpaqueRef:NULL"
VBD = {
    "userdevice": "autodetect",
    "bootable": False,
    "mode": "RW",
    "type": "Disk",
    "empty": False,
    "unpluggable": True,
    "other_config": {},
    "qos_algorithm_type": "",
    "qos_algorithm_params": {},
}


@pytest.fixture
def sim(tmp_path):
    with running_sim(default_world(), tmp_path / "sim") as running:
        yield running


@pytest.fixture
def api(sim):
    with logged_in(sim) as xenapi:
        yield xenapi


def test_snapshot_tree(sim, api):
    vm = vm_of(api, "web")
    sim.guest_write(sim.disks("web")[1], 4096, b"before")
    first = api.VM.snapshot(vm, "first", [])
    sim.guest_write(sim.disks("web")[1], 4096, b"after!")
    second = api.VM.snapshot(vm, "second", [])
    record = api.VM.get_record(first)
    assert (record["is_a_snapshot"], record["is_a_template"], record["power_state"]) == (True, True, "Halted")
    assert record["snapshot_info"]["disk-snapshot-type"] == "crash_consistent"
    assert sorted(api.VM.get_snapshots(vm)) == sorted([first, second])
    with refused("VM_IS_SNAPSHOT", first):
        api.VM.snapshot(first, "of a snapshot", [])
    assert (api.VM.get_parent(vm), api.VM.get_parent(second)) == (second, first)
    for disk, origin in zip(disks_of(api, first), disks_of(api, vm), strict=True):
        assert api.VDI.get_is_a_snapshot(disk)
        assert api.VDI.get_snapshot_of(disk) == origin
    assert sim.read(api.VDI.get_uuid(disks_of(api, first)[1]), 4096, 6) == b"before"
    assert sim.read(api.VDI.get_uuid(disks_of(api, second)[1]), 4096, 6) == b"after!"
    kept = disks_of(api, second)
    api.VM.destroy(second)
    assert api.VM.get_parent(vm) == first
    assert [api.VDI.get_type(vdi) for vdi in kept] == ["user", "user"], "VM.destroy leaves the disks"


def test_snapshot_leaves_out_what_it_is_told_to(api):
    vm = vm_of(api, "web")
    root, data = disks_of(api, vm)
    snapshot = api.VM.snapshot(vm, "root only", [data])
    (only,) = disks_of(api, snapshot)
    assert api.VDI.get_snapshot_of(only) == root
    assert [api.VBD.get_type(ref) for ref in api.VM.get_VBDs(snapshot)].count("CD") == 1


def test_old_pools_do_not_know_ignore_vdis(tmp_path):
    with running_sim(default_world(), tmp_path / "sim", release="8.2") as sim, logged_in(sim) as api:
        vm = vm_of(api, "web")
        with refused("MESSAGE_PARAMETER_COUNT_MISMATCH", "VM.snapshot", "2", "3"):
            api.VM.snapshot(vm, "new way", [])
        assert api.VM.get_is_a_snapshot(api.VM.snapshot(vm, "old way"))


@pytest.mark.parametrize(
    ("disk", "code"),
    [
        ({"sharable": True}, "VDI_IS_SHARABLE"),
        ({"on_boot": "reset"}, "VDI_ON_BOOT_MODE_INCOMPATIBLE_WITH_OPERATION"),
    ],
)
def test_one_disk_that_cannot_be_snapshotted_fails_them_all(tmp_path, disk, code):
    vms = [{"name": "odd", "disks": [{"sr": "nfs", "size": 2 * MIB}, {"sr": "nfs", "size": 2 * MIB, **disk}]}]
    with running_sim(default_world(vms=vms), tmp_path / "sim") as sim, logged_in(sim) as api:
        vm = vm_of(api, "odd")
        with refused(code):
            api.VM.snapshot(vm, "all", [])
        assert not [vdi for vdi in sim.dump("VDI")["VDI"] if vdi["is_a_snapshot"]]
        api.VM.snapshot(vm, "without", [disks_of(api, vm)[1]])


def test_second_disk_failing_takes_the_first_snapshot_back(sim, api):
    sim.fault("VDI.snapshot", "fail", nth=2, code="SR_BACKEND_FAILURE_44", params=["", "no space", ""])
    with refused("SR_BACKEND_FAILURE_44"):
        api.VM.snapshot(vm_of(api, "web"), "half", [])
    assert not [vdi for vdi in sim.dump("VDI")["VDI"] if vdi["is_a_snapshot"]]
    assert not [vm for vm in sim.dump("VM")["VM"] if vm["is_a_snapshot"]]


def test_revert_gives_the_vm_new_disks(sim, api):
    vm = vm_of(api, "web")
    old = sim.disks("web")
    sim.guest_write(old[0], 0, b"good")
    snapshot = api.VM.snapshot(vm, "safe", [])
    sim.guest_write(old[0], 0, b"bad!")
    api.VM.revert(snapshot)
    new = sim.disks("web")
    assert not set(old) & set(new)
    assert sim.read(new[0], 0, 4) == b"good"
    assert sim.vm("web")["uuid"] == api.VM.get_uuid(vm)
    assert sim.vm("web")["power_state"] == "Halted"
    assert not {vdi["uuid"] for vdi in sim.dump("VDI")["VDI"]} & set(old)


def test_clone_has_macs_disks_and_seed_of_its_own(sim, api):
    vm = vm_of(api, "db")
    with refused("VM_BAD_POWER_STATE", vm_of(api, "web"), "halted", "running"):
        api.VM.clone(vm_of(api, "web"), "no")
    clone = api.VM.clone(vm, "db2")
    assert not set(disks_of(api, vm)) & set(disks_of(api, clone))
    macs = [{api.VIF.get_MAC(vif) for vif in api.VM.get_VIFs(one)} for one in (vm, clone)]
    assert not macs[0] & macs[1]
    assert api.VM.get_other_config(vm)["mac_seed"] != api.VM.get_other_config(clone)["mac_seed"]
    assert api.VTPM.get_contents(api.VM.get_VTPMs(clone)[0]) == api.VTPM.get_contents(api.VM.get_VTPMs(vm)[0])


def test_blocked_operations(api):
    vm = vm_of(api, "web")
    for operation, attempt in {
        "snapshot": lambda: api.VM.snapshot(vm, "x", []),
        "clean_shutdown": lambda: api.VM.clean_shutdown(vm),
        "migrate_send": lambda: api.VM.migrate_send(vm, {}, True, {}, {}, {}),
        "pool_migrate": lambda: api.VM.pool_migrate(vm, api.host.get_all()[1], {}),
    }.items():
        api.VM.add_to_blocked_operations(vm, operation, "xbfs: backup")
        with refused("OPERATION_BLOCKED", vm, "xbfs: backup"):
            attempt()
    api.VM.update_allowed_operations(vm)
    assert "snapshot" not in api.VM.get_allowed_operations(vm)
    api.VM.remove_from_blocked_operations(vm, "snapshot")
    assert api.VM.snapshot(vm, "x", [])


def test_cbt_forbids_to_migrate_disks_but_not_the_vm(api):
    vm = vm_of(api, "web")
    root = disks_of(api, vm)[0]
    api.VDI.enable_cbt(root)
    with refused("VDI_CBT_ENABLED", root):
        api.VM.migrate_send(vm, {}, True, {}, {}, {})
    other = next(host for host in api.host.get_all() if host != api.VM.get_resident_on(vm))
    api.VM.pool_migrate(vm, other, {})
    assert api.VM.get_resident_on(vm) == other
    api.VDI.disable_cbt(root)
    with refused("NOT_IMPLEMENTED"):
        api.VM.migrate_send(vm, {}, True, {}, {}, {})


def test_life_cycle_and_disks_in_use(api):
    vm = vm_of(api, "web")
    root = disks_of(api, vm)[0]
    with refused("VDI_IN_USE", root):
        api.VDI.destroy(root)
    with refused("VM_BAD_POWER_STATE", vm, "halted", "running"):
        api.VM.destroy(vm)
    api.VM.clean_shutdown(vm)
    with refused("VM_BAD_POWER_STATE", vm, "running", "halted"):
        api.VM.clean_shutdown(vm)
    assert not any(api.VBD.get_currently_attached(ref) for ref in api.VM.get_VBDs(vm))
    assert api.VM.get_resident_on(vm) == NULL
    api.VM.start(vm, False, False)
    with refused("OPERATION_NOT_ALLOWED"):
        api.VM.destroy(api.host.get_control_domain(api.host.get_all()[0]))
    with refused("VM_IS_TEMPLATE"):
        api.VM.start(vm_of(api, "Debian Bookworm 12"), False, False)


def test_vbd_errors(api):
    vm = vm_of(api, "web")
    root, _ = disks_of(api, vm)
    with refused("DEVICE_ALREADY_EXISTS", "0"):
        api.VBD.create(VBD | {"VM": vm, "VDI": root, "userdevice": "0"})
    with refused("FIELD_TYPE_ERROR", "qos_algorithm_type"):
        api.VBD.create(
            {key: value for key, value in VBD.items() if key != "qos_algorithm_type"} | {"VM": vm, "VDI": root}
        )
    dom0 = api.host.get_control_domain(api.VM.get_resident_on(vm))
    vbd = api.VBD.create(VBD | {"VM": dom0, "VDI": root, "mode": "RO"})
    with refused("DEVICE_ALREADY_DETACHED", vbd):
        api.VBD.unplug(vbd)
    api.VBD.plug(vbd)
    assert api.VBD.get_device(vbd) == "xvda"
    with refused("DEVICE_ALREADY_ATTACHED", vbd):
        api.VBD.plug(vbd)
    with refused("OPERATION_NOT_ALLOWED"):
        api.VBD.destroy(vbd)
    api.VBD.unplug_force(vbd)
    api.VBD.unplug_force(vbd)
    api.VBD.destroy(vbd)
    other = api.VBD.create(VBD | {"VM": vm_of(api, "db"), "VDI": root})
    with refused("VDI_IN_USE", root):
        api.VBD.assert_attachable(other)
    with refused("VDI_IN_USE", root):
        api.VM.start(vm_of(api, "db"), False, False)
    assert api.VM.get_power_state(vm_of(api, "db")) == "Halted"
    api.VBD.destroy(other)


def test_create_wants_every_required_field(api):
    record = api.VM.get_record(vm_of(api, "db"))
    for name in ("name_label", "memory_static_max", "platform", "HVM_boot_params", "PV_args", "affinity"):
        with refused("FIELD_TYPE_ERROR", name):
            api.VM.create({key: value for key, value in record.items() if key != name})
    with refused("MEMORY_CONSTRAINT_VIOLATION"):
        api.VM.create(record | {"memory_static_min": str(2 << 30)})
    copy = api.VM.create(record)
    assert api.VM.get_uuid(copy) != record["uuid"], "the uuid is not a constructor's field"
    assert api.VM.get_VBDs(copy) == []
    assert api.VM.get_NVRAM(copy) == record["NVRAM"]
    api.VM.set_bios_strings(copy, {"bios-vendor": "Xen"})
    with refused("VM_BIOS_STRINGS_ALREADY_SET"):
        api.VM.set_bios_strings(copy, {"bios-vendor": "Xen"})
    vtpm = api.VTPM.create(copy, False)
    with refused("VTPM_MAX_AMOUNT_REACHED", "1"):
        api.VTPM.create(copy, False)
    api.VTPM.destroy(vtpm)


def test_crashed_host_stops_its_vms_and_breaks_tracking(sim, api):
    vm = vm_of(api, "web")
    root = disks_of(api, vm)[0]
    api.VDI.enable_cbt(root)
    host = next(one for one in sim.hosts if one.uuid == api.host.get_uuid(api.VM.get_resident_on(vm)))
    sim.do("crash_host", host=host.name)
    assert api.VM.get_power_state(vm) == "Halted"
    api.VM.start(vm, False, False)
    assert not api.VDI.get_cbt_enabled(root)
    assert "VDI_CBT_METADATA_INCONSISTENT" in [one["name"] for one in api.message.get_all_records().values()]
