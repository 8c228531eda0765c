"""Archives of VM metadata, rewritten: what the new VM shall be, what stays as it was, and hostile ones."""

from __future__ import annotations

import copy
import io
import tarfile
import xmlrpc.client
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xbfs_engine.core.errors import WireError
from xbfs_engine.restore.vm.ova import Changes, Rewritten, rewrite
from xbfs_engine.restore.vm.plan import VifPlan
from xbfs_engine.restore.vm.target import Network
from xbfs_engine.source.xapi.values import NULL_REF

VM, DISK, OTHER = "vm-uuid", "disk-uuid", "other-uuid"
LAN = Network("OpaqueRef:lan", "lan-uuid", "dr <lan> & co", "xenbr7")
MAC = "02:16:3e:00:00:01"
CHANGES = Changes(
    name="[Importing] web",
    uuid=None,
    disks={"0": "new-disk"},
    vifs={MAC: VifPlan("0", MAC, {}, LAN)},
    marker={"xbfs:run": "r"},
    blocked={"start": "ours"},
    vtpm=True,
)


def objects() -> list[dict[str, Any]]:
    """As export_metadata of a snapshot gives them, with what a restore must not take over."""
    vm = {
        "uuid": VM,
        "name_label": "snapshot of web",
        "is_a_template": True,
        "is_a_snapshot": True,
        "is_control_domain": False,
        "snapshot_of": NULL_REF,
        "snapshot_time": xmlrpc.client.DateTime("20260920T21:00:03Z"),
        "suspend_VDI": "Ref:9",
        "power_state": "Running",
        "affinity": "Ref:1",
        "memory_static_max": "4294967296",
        "HVM_shadow_multiplier": 1.0,
        "VBDs": ["Ref:3", "Ref:4", "Ref:5"],
        "VIFs": ["Ref:6"],
        "VGPUs": ["Ref:20"],
        "other_config": {"mac_seed": "seed", "xbfs:run": "of the backup", "folder": "/a"},
        "blocked_operations": {},
        "NVRAM": {"EFI-variables": "AAECAw=="},
        "field_of_the_future": [{"deep": ["x"]}],
    }
    vbd = {"VM": "Ref:2", "type": "Disk", "currently_attached": True, "empty": False}
    return [
        {"class": "host", "id": "Ref:1", "snapshot": {"uuid": "host"}},
        {"class": "VM", "id": "Ref:2", "snapshot": vm},
        {"class": "VBD", "id": "Ref:3", "snapshot": {**vbd, "VDI": "Ref:7", "userdevice": "0"}},
        {"class": "VBD", "id": "Ref:4", "snapshot": {**vbd, "VDI": "Ref:8", "userdevice": "1"}},
        {"class": "VBD", "id": "Ref:5", "snapshot": {**vbd, "VDI": "Ref:9", "userdevice": "3", "type": "CD"}},
        {"class": "VIF", "id": "Ref:6", "snapshot": {"VM": "Ref:2", "device": "", "MAC": MAC, "network": "Ref:10"}},
        {"class": "VDI", "id": "Ref:7", "snapshot": {"uuid": DISK, "SR": "Ref:11"}},
        {"class": "VDI", "id": "Ref:8", "snapshot": {"uuid": OTHER, "SR": "Ref:12"}},
        {"class": "VDI", "id": "Ref:9", "snapshot": {"uuid": "iso", "SR": "Ref:12"}},
        {
            "class": "network",
            "id": "Ref:10",
            "snapshot": {"uuid": "old", "name_label": "lan", "bridge": "b", "MTU": "9000"},
        },
        {"class": "SR", "id": "Ref:11", "snapshot": {"uuid": "sr"}},
        {"class": "SR", "id": "Ref:12", "snapshot": {"uuid": "other sr"}},
        {"class": "VTPM", "id": "Ref:13", "snapshot": {"vTPM'_VM": "Ref:2", "vTPM'_content": "c2VjcmV0"}},
        {"class": "VGPU", "id": "Ref:20", "snapshot": {"VM": "Ref:2"}},
    ]


def archive(found: Any, *, head: bytes = b"", name: str = "ova.xml") -> bytes:
    text = xmlrpc.client.dumps(({"version": {"xapi_major": 1, "hostname": "h"}, "objects": found},), allow_none=True)
    return tar(head + text.partition("<param>\n")[2].rpartition("</param>")[0].encode(), name)


def tar(content: bytes, name: str = "ova.xml") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as members:
        member = tarfile.TarInfo(name)
        member.size = len(content)
        members.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def read(rewritten: Rewritten) -> tuple[dict[str, Any], dict[str, list[dict[str, Any]]]]:
    """The document, and the objects' records by class, read with what we did not write it with."""
    with tarfile.open(fileobj=io.BytesIO(rewritten.archive)) as members:
        assert members.getnames() == ["ova.xml"]
        stream = members.extractfile("ova.xml")
        assert stream is not None
        text = stream.read()
    ((document,), _) = xmlrpc.client.loads(b"<params><param>" + text + b"</param></params>")
    found: dict[str, list[dict[str, Any]]] = {}
    for one in document["objects"]:
        found.setdefault(one["class"], []).append(one["snapshot"] | {"id": one["id"]})
    return document, found


@pytest.mark.parametrize("head", [b"", b'<?xml version="1.0"?>\n'])
def test_a_copy_of_a_snapshot(head: bytes) -> None:
    rewritten = rewrite(archive(objects(), head=head), VM, CHANGES)
    document, found = read(rewritten)
    assert rewritten.vdi_map == {DISK: "new-disk"}
    assert document["version"] == {"xapi_major": 1, "hostname": "h"}
    assert {cls: len(records) for cls, records in found.items()} == {
        **{"host": 1, "VM": 1, "VBD": 2, "VIF": 1, "VDI": 1, "network": 1, "SR": 1, "VTPM": 1}
    }
    (vm,) = found["VM"]
    assert vm["name_label"] == "[Importing] web"
    assert (vm["is_a_template"], vm["is_a_snapshot"], vm["power_state"]) == (False, False, "Halted")
    assert vm["other_config"] == {"folder": "/a", "xbfs:run": "r"}
    assert vm["blocked_operations"] == {"start": "ours"}
    assert (vm["VBDs"], vm["VIFs"], vm["VGPUs"]) == (["Ref:3", "Ref:5"], ["Ref:6"], [])
    assert (vm["suspend_VDI"], vm["affinity"], vm["uuid"]) == (NULL_REF, "Ref:1", VM)
    for name in ("memory_static_max", "HVM_shadow_multiplier", "NVRAM", "field_of_the_future", "snapshot_time"):
        assert vm[name] == objects()[1]["snapshot"][name], "what is not ours to change"
    disk, drive = sorted(found["VBD"], key=lambda vbd: vbd["id"])
    assert (disk["VDI"], disk["currently_attached"]) == ("Ref:7", False)
    assert (drive["type"], drive["VDI"], drive["empty"]) == ("CD", NULL_REF, True)
    (vif,), (network,) = found["VIF"], found["network"]
    assert (vif["network"], vif["device"], vif["MAC"]) == (network["id"], "0", MAC)
    assert (network["name_label"], network["bridge"], network["MTU"]) == ("dr <lan> & co", "xenbr7", "9000")


def test_itself_and_without_tpm() -> None:
    changes = Changes("web", "real-uuid", CHANGES.disks, CHANGES.vifs, {}, {}, vtpm=False)
    _, found = read(rewrite(archive(objects()), VM, changes))
    (vm,) = found["VM"]
    assert (vm["uuid"], vm["other_config"]) == ("real-uuid", {"mac_seed": "seed", "folder": "/a"})
    assert "VTPM" not in found


def test_other_vms_in_the_archive_are_left_out() -> None:
    found = objects()
    second = copy.deepcopy(found[1]) | {"id": "Ref:30"}
    second["snapshot"]["uuid"] = "a snapshot of it"
    vbd = {
        "class": "VBD",
        "id": "Ref:31",
        "snapshot": {"VM": "Ref:30", "type": "Disk", "VDI": "Ref:8", "userdevice": "0"},
    }
    _, kept = read(rewrite(archive([*found, second, vbd]), VM, CHANGES))
    assert [vm["uuid"] for vm in kept["VM"]] == [VM]
    assert len(kept["VBD"]) == 2
    with pytest.raises(WireError, match="2 VMs"):
        rewrite(archive([*found, second]), "neither", CHANGES)


@pytest.mark.parametrize(
    ("broken", "told"),
    [
        (b"", "no tar"),
        (b"nonsense" * 200, "no tar"),
        (tar(b"<value>x</value>", "other.xml"), "does not begin with ova.xml"),
        (tar(b"<value>x</value>"), "no struct"),
        (tar(b"<value><struct>"), "no XML-RPC"),
        (tar(b'<!DOCTYPE x [<!ENTITY a "aaaa">]><value>&a;</value>'), "no XML-RPC"),
        (tar(b"<value><int>" + b"9" * 5000 + b"</int></value>"), "no XML-RPC"),
        (tar(b"<value><array><data>" * 50 + b"</data></array></value>" * 50), "no struct"),
        (archive("no list"), "no objects"),
        (archive([{"class": "VM", "id": 7, "snapshot": {}}]), "no object"),
        (archive([]), "0 VMs"),
        (archive(objects()[:2]), "lacks disks or VIFs"),
        (archive([one for one in objects() if one["id"] != "Ref:7"]), "lacks disks"),
    ],
)
def test_what_can_not_be_used(broken: bytes, told: str) -> None:
    with pytest.raises(WireError, match=told):
        rewrite(broken, VM, CHANGES)


def test_a_vif_that_nobody_recorded() -> None:
    found = objects()
    found[5]["snapshot"]["MAC"] = "02:00:00:00:00:99"
    with pytest.raises(WireError, match="VIF"):
        rewrite(archive(found), VM, CHANGES)


VALUES = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-(1 << 31), (1 << 31) - 1),
        st.sampled_from(["", "Ref:2", "Disk", "CD", "0"]),
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.sampled_from(["VM", "VDI", "x"]), inner)),
    max_leaves=5,
)


FIELDS = (
    *("VM", "VDI", "type", "userdevice", "uuid", "other_config", "network", "MAC", "SR", "affinity"),
    *("vTPM'_VM", "is_control_domain"),
)


@settings(max_examples=150, deadline=None)
@given(number=st.integers(0, 13), field=st.sampled_from(FIELDS), value=VALUES)
def test_hostile_records_end_in_typed_errors(number: int, field: str, value: object) -> None:
    found = objects()
    found[number]["snapshot"][field] = value
    with suppress(WireError):
        read(rewrite(archive(found), VM, CHANGES))


GOOD = archive(objects())


@settings(max_examples=150, deadline=None)
@given(at=st.integers(0, len(GOOD) - 1), data=st.binary(min_size=1, max_size=8), cut=st.booleans())
def test_damaged_archives_end_in_typed_errors(at: int, data: bytes, *, cut: bool) -> None:
    damaged = GOOD[:at] if cut else GOOD[:at] + data + GOOD[at + len(data) :]
    with suppress(WireError):
        rewrite(damaged, VM, CHANGES)
