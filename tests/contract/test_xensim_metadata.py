"""Archives of VM metadata of the simulated pool: what is in them, and what comes of importing them."""

from __future__ import annotations

import http.client
import io
import ssl
import tarfile
import xmlrpc.client
from urllib.parse import urlencode

import pytest

from tests.support.xensim import default_world, running_sim
from tests.support.xensim_api import disks_of, ended, json_rpc, logged_in, vm_of


@pytest.fixture
def sim(tmp_path):
    with running_sim(default_world(), tmp_path / "sim") as running:
        yield running


@pytest.fixture
def api(sim):
    with logged_in(sim) as xenapi:
        yield xenapi


def transfer(sim, method, path, body=None, **query):
    session = json_rpc(sim.master, "session.login_with_password", "root", sim.root_password)["result"]
    context = ssl._create_unverified_context()
    connection = http.client.HTTPSConnection(sim.master.address, sim.master.port, context=context, timeout=20)
    try:
        connection.request(method, f"{path}?{urlencode(query)}", body, {"Cookie": f"session_id={session}"})
        response = connection.getresponse()
        assert response.status == 200
        return response.read()
    finally:
        connection.close()


def export(sim, vm, **query):
    return transfer(sim, "GET", "/export_metadata", uuid=vm, **query)


def import_(sim, api, archive, **query):
    """The task's record; "vdi_map" becomes its parameters."""
    vdi_map = query.pop("vdi_map", {})
    task = api.task.create("import", "")
    query |= {f"vdi:{old}": new for old, new in vdi_map.items()} | {"task_id": task}
    transfer(sim, "PUT", "/import_metadata", archive, **query)
    return ended(api, task)


def document(archive):
    with tarfile.open(fileobj=io.BytesIO(archive)) as members:
        assert members.getnames() == ["ova.xml"]
        text = members.extractfile("ova.xml").read()
    wrapped = b"<methodResponse><params><param>" + text + b"</param></params></methodResponse>"
    ((value,), _) = xmlrpc.client.loads(wrapped)
    return value


def new_disk(api, like):
    record = {key: value for key, value in api.VDI.get_record(like).items() if key != "sm_config"}
    return api.VDI.create(record)


def test_archive_holds_the_vm_and_what_belongs_to_it(sim, api):
    vm = api.VM.get_uuid(vm_of(api, "db"))
    found = document(export(sim, vm))
    assert found["version"]["export_vsn"] == "2"
    classes = sorted(one["class"] for one in found["objects"])
    assert classes == sorted(
        ["VM", "VM_metrics", "VM_guest_metrics", "VBD", "VDI", "SR", "VIF", "VIF", "network", "network", "VTPM"]
    )
    by_class = {one["class"]: one for one in found["objects"]}
    assert by_class["VM"]["snapshot"]["uuid"] == vm
    assert by_class["VBD"]["snapshot"]["VDI"] == by_class["VDI"]["id"]
    assert by_class["VTPM"]["snapshot"]["vTPM'_content"] == "c3RhdGUgb2YgYSBUUE0="
    assert by_class["VDI"]["snapshot"]["snapshot_of"] == "OpaqueRef:NULL"
    without = document(export(sim, vm, excluded_device_types="vtpm,vif"))
    assert not {"VTPM", "VIF", "network"} & {one["class"] for one in without["objects"]}


def test_import_makes_a_new_vm_on_the_given_disks(sim, api):
    vm = vm_of(api, "db")
    snapshot = api.VM.snapshot(vm, "for export", [])
    api.VM.set_is_a_template(snapshot, False)
    archive = export(sim, api.VM.get_uuid(snapshot), export_snapshots="false")
    (old,) = disks_of(api, snapshot)
    disk = new_disk(api, old)
    record = import_(sim, api, archive, vdi_map={api.VDI.get_uuid(old): api.VDI.get_uuid(disk)})
    assert record["status"] == "success", record["error_info"]
    new = record["result"].partition("OpaqueRef:")[2].partition("<")[0]
    new = f"OpaqueRef:{new}"
    made, source = api.VM.get_record(new), api.VM.get_record(vm)
    for field in ("NVRAM", "bios_strings", "platform", "HVM_boot_params", "memory_static_max"):
        assert made[field] == source[field], field
    assert (made["is_a_template"], made["is_a_snapshot"], made["power_state"]) == (False, False, "Halted")
    assert made["uuid"] not in {source["uuid"], api.VM.get_uuid(snapshot)}
    assert made["other_config"]["mac_seed"] != source["other_config"]["mac_seed"]
    assert disks_of(api, new) == [disk]
    macs = [{api.VIF.get_MAC(vif) for vif in one["VIFs"]} for one in (made, source)]
    assert len(macs[0]) == 2
    assert not macs[0] & macs[1]
    networks = [{api.VIF.get_network(vif) for vif in one["VIFs"]} for one in (made, source)]
    assert networks[0] == networks[1]
    assert api.VTPM.get_contents(made["VTPMs"][0]) == "c3RhdGUgb2YgYSBUUE0="
    assert api.VM.start(new, False, False) == ""


def test_missing_disk_fails_the_import_and_nothing_stays(sim, api):
    vm = vm_of(api, "db")
    archive = export(sim, api.VM.get_uuid(vm))
    disk = disks_of(api, vm)[0]
    api.VM.destroy(vm)
    api.VDI.destroy(disk)
    before = sim.dump("VM", "VBD", "VIF", "VTPM", "network")
    assert import_(sim, api, archive)["error_info"][0] == "VDI_LOCATION_MISSING"
    assert sim.dump("VM", "VBD", "VIF", "VTPM", "network") == before
    forced = import_(sim, api, archive, force="true")
    assert forced["status"] == "success"
    assert disks_of(api, vm_of(api, "db")) == []


def test_restore_keeps_identity_and_replaces_only_when_forced(sim, api):
    vm = vm_of(api, "db")
    uuid, macs = api.VM.get_uuid(vm), sorted(api.VIF.get_MAC(vif) for vif in api.VM.get_VIFs(vm))
    archive = export(sim, uuid)
    refused = import_(sim, api, archive, restore="true")
    assert refused["error_info"][0] == "VM_TO_IMPORT_IS_NOT_NEWER_VERSION"
    api.VM.start(vm, False, False)
    assert import_(sim, api, archive, restore="true", force="true")["error_info"][0] == "VM_BAD_POWER_STATE"
    api.VM.hard_shutdown(vm)
    assert import_(sim, api, archive, restore="true", force="true")["status"] == "success"
    again = vm_of(api, "db")
    assert again != vm
    assert api.VM.get_uuid(again) == uuid
    assert sorted(api.VIF.get_MAC(vif) for vif in api.VM.get_VIFs(again)) == macs


def test_restore_refuses_the_mac_seed_of_another_vm(sim, api):
    vm = vm_of(api, "db")
    archive = export(sim, api.VM.get_uuid(vm))
    api.VM.remove_from_other_config(vm_of(api, "web"), "mac_seed")
    api.VM.add_to_other_config(vm_of(api, "web"), "mac_seed", api.VM.get_other_config(vm)["mac_seed"])
    assert import_(sim, api, archive, restore="true", force="true")["error_info"][0] == "DUPLICATE_MAC_SEED"


def test_networks_are_found_by_name_then_bridge_else_made(sim, api):
    vm = vm_of(api, "web")
    lan = api.network.get_by_name_label("lan")[0]
    archive = export(sim, api.VM.get_uuid(vm))

    def network_of_import():
        assert import_(sim, api, archive, force="true")["status"] == "success"
        new = next(ref for ref in api.VM.get_by_name_label("web") if ref != vm)
        network = api.VIF.get_network(api.VM.get_VIFs(new)[0])
        api.VM.destroy(new)
        return network

    assert network_of_import() == lan
    api.network.set_name_label(lan, "renamed")
    assert network_of_import() == lan, "same bridge"
    sim.do("set", cls="network", uuid=api.network.get_uuid(lan), fields={"bridge": "xenbr9"})
    made = network_of_import()
    assert made != lan
    assert api.network.get_name_label(made) == "lan"


def test_dry_run_changes_nothing(sim, api):
    archive = export(sim, api.VM.get_uuid(vm_of(api, "db")))
    before = sim.dump("VM", "VBD", "VIF")
    assert import_(sim, api, archive, dry_run="true")["status"] == "success"
    assert sim.dump("VM", "VBD", "VIF") == before


@pytest.mark.parametrize("body", [b"", b"nonsense" * 200])
def test_what_is_no_archive_fails_the_task(sim, api, body):
    assert import_(sim, api, body)["status"] == "failure"
