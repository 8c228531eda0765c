"""The simulated pool as the published XenAPI package and plain http.client see it: sessions, roles, tasks, events."""

from __future__ import annotations

import base64
import hashlib
import http.client
import json
import ssl
import time

import pytest
import XenAPI

from tests.support.xensim import BACKUP_USER, XenSimError, default_world, running_sim
from tests.support.xensim_api import WAIT_S, ended, json_rpc, logged_in, refused


@pytest.fixture
def sim(tmp_path):
    with running_sim(default_world(), tmp_path / "sim") as running:
        yield running


def test_hosts_present_the_announced_certificates(sim):
    for host in sim.hosts:
        der = ssl.PEM_cert_to_DER_cert(ssl.get_server_certificate((host.address, host.port)))
        assert hashlib.sha256(der).digest().hex(":").upper() == host.fingerprint
    with logged_in(sim) as api:
        by_host = {api.host.get_uuid(one["host"]): one for one in api.Certificate.get_all_records().values()}
        for host in sim.hosts:
            assert by_host[host.uuid]["fingerprint_sha256"] == host.fingerprint
            pem = api.host.get_server_certificate(api.host.get_by_uuid(host.uuid))
            assert hashlib.sha256(ssl.PEM_cert_to_DER_cert(pem)).digest().hex(":").upper() == host.fingerprint


def test_integers_are_strings_in_xml_and_numbers_in_json(sim):
    with logged_in(sim) as api:
        vm = api.VM.get_by_name_label("web")[0]
        assert api.VM.get_memory_static_max(vm) == str(1 << 30)
        assert isinstance(api.VM.get_snapshot_time(vm), XenAPI.xmlrpclib.DateTime)
    session = json_rpc(sim.master, "session.login_with_password", "root", sim.root_password)["result"]
    answer = json_rpc(sim.master, "VM.get_memory_static_max", session, vm)
    assert answer == {"jsonrpc": "2.0", "id": 7, "result": 1 << 30}
    assert json_rpc(sim.master, "VM.get_uuid", session, "OpaqueRef:none")["error"] == {
        "code": 1,
        "message": "HANDLE_INVALID",
        "data": ["VM", "OpaqueRef:none"],
    }
    old = json_rpc(sim.master, "VM.get_nonsense", session, version="1.0")
    assert old == {"id": 7, "result": None, "error": ["MESSAGE_METHOD_UNKNOWN", "VM.get_nonsense"]}


def test_slaves_send_to_the_master_at_login_and_later(sim):
    slave = sim.hosts[1]
    with refused("HOST_IS_SLAVE", sim.master.address), logged_in(sim, host=slave):
        pass
    token = json_rpc(sim.master, "session.login_with_password", "root", sim.root_password)["result"]
    assert json_rpc(slave, "VM.get_all", token)["error"]["message"] == "HOST_IS_SLAVE"
    sim.do("set_master", host=slave.name)
    assert json_rpc(slave, "VM.get_all", token)["result"]
    assert json_rpc(sim.hosts[0], "VM.get_all", token)["error"]["data"] == [slave.address]


def test_host_that_is_offline_hangs_up(sim):
    slave = sim.hosts[1]
    sim.do("offline", host=slave.name)
    with pytest.raises((http.client.HTTPException, OSError)):
        json_rpc(slave, "pool.get_all", "")
    with logged_in(sim) as api:
        host = api.host.get_by_uuid(slave.uuid)
        assert not api.host_metrics.get_live(api.host.get_metrics(host))
        sim.do("offline", host=slave.name, value=False)
        assert api.host_metrics.get_live(api.host.get_metrics(host))
    assert json_rpc(slave, "pool.get_all", "")["error"]["message"] == "HOST_IS_SLAVE"


def test_wrong_passwords_and_users_without_role(tmp_path):
    users = [BACKUP_USER, {"name": "nobody", "password": "x"}]
    with running_sim(default_world(users=users), tmp_path / "sim") as sim:
        with refused("SESSION_AUTHENTICATION_FAILED", "root"), logged_in(sim, "root", "wrong"):
            pass
        with refused("SESSION_AUTHORIZATION_FAILED", "nobody"), logged_in(sim, "nobody", "x"):
            pass


def test_sessions_expire_after_a_day_unless_used_or_busy(sim):
    idle, used, busy = (
        json_rpc(sim.master, "session.login_with_password", "root", sim.root_password, "1.0", "me")["result"]
        for _ in range(3)
    )
    vm = json_rpc(sim.master, "VM.get_by_name_label", busy, "web")["result"][0]
    held = sim.fault("VM.clean_shutdown", "hold")
    json_rpc(sim.master, "Async.VM.clean_shutdown", busy, vm)
    sim.wait_fault(held)
    for _ in range(3):
        sim.advance(40_000)
        assert "result" in json_rpc(sim.master, "pool.get_all", used)
    assert json_rpc(sim.master, "pool.get_all", idle)["error"] == {
        "code": 1,
        "message": "SESSION_INVALID",
        "data": [idle],
    }
    assert "result" in json_rpc(sim.master, "pool.get_all", busy)
    sim.do("expire_sessions")
    assert json_rpc(sim.master, "pool.get_all", used)["error"]["message"] == "SESSION_INVALID"


def test_oldest_unused_sessions_of_an_originator_are_dropped(sim):
    def login(originator):
        return json_rpc(sim.master, "session.login_with_password", "root", sim.root_password, "1.0", originator)[
            "result"
        ]

    first, second, other = login("many"), login("many"), login("other")
    assert "result" in json_rpc(sim.master, "pool.get_all", first)
    connection = http.client.HTTPSConnection(
        sim.master.address, sim.master.port, context=ssl._create_unverified_context()
    )
    for _ in range(499):
        body = {"jsonrpc": "2.0", "method": "session.login_with_password", "id": 1}
        connection.request(
            "POST", "/jsonrpc", json.dumps(body | {"params": ["root", sim.root_password, "1.0", "many"]})
        )
        connection.getresponse().read()
    connection.close()
    assert "result" in json_rpc(sim.master, "pool.get_all", first)
    assert "result" in json_rpc(sim.master, "pool.get_all", other)
    assert json_rpc(sim.master, "pool.get_all", second)["error"]["message"] == "SESSION_INVALID"


def test_roles(sim):
    with logged_in(sim, "viewer", "viewer-password") as api:
        vm = api.VM.get_by_name_label("web")[0]
        with refused("RBAC_PERMISSION_DENIED", "vm.snapshot"):
            api.VM.snapshot(vm, "no", [])
        with refused("RBAC_PERMISSION_DENIED", "vm.add_to_other_config"):
            api.VM.add_to_other_config(vm, "xbfs:x", "y")
        task = api.Async.VM.snapshot(vm, "no", [])
        assert ended(api, task)["error_info"][0] == "RBAC_PERMISSION_DENIED"
    with logged_in(sim, BACKUP_USER["name"], BACKUP_USER["password"]) as api:
        snapshot = api.VM.snapshot(vm, "yes", [])
        api.VM.destroy(snapshot)
        network = api.network.get_by_name_label("lan")[0]
        with refused("RBAC_PERMISSION_DENIED", "network.add_purpose"):
            api.network.add_purpose(network, "nbd")
        vtpm = api.VTPM.get_all()[0]
        with refused("RBAC_PERMISSION_DENIED", "vtpm.get_contents"):
            api.VTPM.get_contents(vtpm)
    with logged_in(sim) as api:
        assert base64.b64decode(api.VTPM.get_contents(vtpm)) == b"state of a TPM"


def test_purposes_of_networks_exclude_each_other(sim):
    with logged_in(sim) as api:
        lan, lab = (api.network.get_by_name_label(name)[0] for name in ("lan", "lab"))
        with refused("NETWORK_INCOMPATIBLE_PURPOSES", "insecure_nbd", "nbd"):
            api.network.add_purpose(lab, "insecure_nbd")
        api.network.remove_purpose(lan, "nbd")
        api.network.add_purpose(lab, "insecure_nbd")
        assert api.network.get_purpose(lab) == ["insecure_nbd"]


def test_unknown_calls_wrong_counts_and_wrong_types(sim):
    with logged_in(sim) as api:
        vm = api.VM.get_by_name_label("web")[0]
        with refused("MESSAGE_METHOD_UNKNOWN", "VM.snapshot_with_quiesce"):
            api.VM.snapshot_with_quiesce(vm, "x")
        with refused("MESSAGE_PARAMETER_COUNT_MISMATCH", "VM.start"):
            api.VM.start(vm)
        with refused("FIELD_TYPE_ERROR", "start_paused"):
            api.VM.start(vm, "yes", False)
        with refused("MAP_DUPLICATE_KEY", "VM", "other_config"):
            api.VM.add_to_other_config(vm, "mac_seed", "x")
        with refused("UUID_INVALID", "VM", "none"):
            api.VM.get_by_uuid("none")


def test_async_task_gives_its_result_and_its_failure(sim):
    with logged_in(sim) as api:
        vm = api.VM.get_by_name_label("web")[0]
        record = ended(api, api.Async.VM.snapshot(vm, "one", []))
        assert record["status"] == "success"
        assert record["progress"] == 1.0
        snapshot = record["result"].removeprefix("<value>").removesuffix("</value>")
        assert api.VM.get_snapshot_of(snapshot) == vm
        task = api.Async.VM.start(vm, False, False)
        record = ended(api, task)
        assert record["status"] == "failure"
        assert record["error_info"] == ["VM_BAD_POWER_STATE", vm, "halted", "running"]
        api.task.destroy(task)
        with refused("HANDLE_INVALID", "task", task):
            api.task.get_status(task)


def test_cancelled_task_leaves_no_half_snapshot(sim):
    with logged_in(sim) as api:
        vm = api.VM.get_by_name_label("web")[0]
        before = {vdi["uuid"] for vdi in sim.dump("VDI")["VDI"] if vdi["managed"]}
        held = sim.fault("VDI.snapshot", "hold", nth=1)
        task = api.Async.VM.snapshot(vm, "stopped", [])
        sim.wait_fault(held)
        api.task.cancel(task)
        sim.clear(held)
        record = ended(api, task)
        assert record["status"] == "cancelled"
        assert record["error_info"][0] == "TASK_CANCELLED"
        assert {vdi["uuid"] for vdi in sim.dump("VDI")["VDI"] if vdi["managed"]} == before
        assert api.VM.get_snapshots(vm) == []


def test_finished_tasks_are_forgotten(sim):
    with logged_in(sim) as api:
        old = api.task.create("old", "")
        api.task.set_status(old, "success")
        sim.advance(66 * 60)
        new = api.task.create("new", "")
        assert api.task.get_all() == [new]


def test_events_add_mod_del_with_tokens(sim):
    with logged_in(sim) as api:
        events_from = getattr(api.event, "from")
        everything = events_from(["vm"], "", 0.0)
        assert {event["operation"] for event in everything["events"]} == {"add"}
        assert int(everything["valid_ref_counts"]["vm"]) == len(api.VM.get_all())
        vm = api.VM.get_by_name_label("web")[0]
        api.VM.set_name_description(vm, "seen")
        changed = events_from(["VM"], everything["token"], 30.0)
        ((event),) = changed["events"]
        assert (event["class"], event["operation"], event["ref"]) == ("vm", "mod", vm)
        assert event["snapshot"]["name_description"] == "seen"
        task = api.task.create("mine", "")
        born = events_from([f"task/{task}"], changed["token"], 30.0)
        assert [event["operation"] for event in born["events"]] == ["add"]
        api.task.destroy(task)
        (gone,) = events_from(["task"], born["token"], 30.0)["events"]
        assert (gone["operation"], gone["ref"]) == ("del", task)
        assert "snapshot" not in gone
        assert events_from(["sr"], born["token"], 5.0)["events"] == []
        with refused("EVENT_FROM_TOKEN_PARSE_FAILURE", "nonsense"):
            events_from(["vm"], "nonsense", 1.0)


def test_faults_before_after_and_dropped_connections(sim):
    with logged_in(sim) as api:
        vm = api.VM.get_by_name_label("web")[0]
        sim.fault("VM.set_name_description", "fail", code="OTHER_OPERATION_IN_PROGRESS", params=["VM", vm, "x", "y"])
        with refused("OTHER_OPERATION_IN_PROGRESS", "VM", vm):
            api.VM.set_name_description(vm, "a")
        assert api.VM.get_name_description(vm) == ""
        sim.fault("VM.set_*", "fail_after", code="INTERNAL_ERROR", nth=2)
        api.VM.set_name_description(vm, "b")
        with refused("INTERNAL_ERROR"):
            api.VM.set_name_description(vm, "c")
        assert api.VM.get_name_description(vm) == "c"
        sim.fault("VM.set_name_description", "drop_after", times=2)  # xmlrpc.client asks a second time by itself
        with pytest.raises((http.client.HTTPException, OSError)):
            api.VM.set_name_description(vm, "d")
        assert api.VM.get_name_description(vm) == "d"
        sim.fault("VM.get_uuid", "kill_session", argument=vm)
        uuid = api.VM.get_uuid(vm)  # the package logs in again by itself
        assert uuid == sim.vm("web")["uuid"]
    statuses = [done["status"] for done in sim.journal() if done["method"] == "VM.set_name_description"]
    assert statuses == ["OTHER_OPERATION_IN_PROGRESS", "Success", "INTERNAL_ERROR", "dropped", "dropped"]
    assert all(done["originator"] in {"xbfs/test", ""} for done in sim.journal())


def test_control_reports_its_errors(sim):
    with pytest.raises(XenSimError, match="KeyError"):
        sim.do("nonsense")
    with pytest.raises(XenSimError, match="UUID_INVALID"):
        sim.read("none", 0, 1)


def test_http_wants_a_session_and_a_role(sim):
    def status(path, **headers):
        connection = http.client.HTTPSConnection(
            sim.master.address, sim.master.port, context=ssl._create_unverified_context(), timeout=WAIT_S
        )
        try:
            connection.request("GET", path, headers=headers)
            return connection.getresponse().status
        finally:
            connection.close()

    vm = sim.vm("web")["uuid"]
    viewer = json_rpc(sim.master, "session.login_with_password", "viewer", "viewer-password")["result"]
    basic = base64.b64encode(f"root:{sim.root_password}".encode()).decode()
    assert status(f"/export_metadata?uuid={vm}") == 401
    assert status(f"/export_metadata?uuid={vm}&session_id=OpaqueRef:none") == 401
    assert status(f"/export_metadata?uuid={vm}", Cookie=f"session_id={viewer}") == 403
    assert status(f"/export_metadata?uuid={vm}", Authorization=f"Basic {basic}") == 200
    assert status(f"/nothing?uuid={vm}") == 404
    assert status("/export_metadata?uuid=none", Authorization=f"Basic {basic}") == 500
    until = time.monotonic() + WAIT_S  # the task of a request goes after its answer
    while sim.dump("task")["task"]:
        assert time.monotonic() < until
        time.sleep(0.01)
