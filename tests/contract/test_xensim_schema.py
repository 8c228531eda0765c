"""The simulator's object model against the published one: every class, field, call, role and parameter it serves."""

from __future__ import annotations

import inspect
import json
import os
from pathlib import Path

import pytest

from tools.xensim import calls, make_schema, schema
from tools.xensim.db import RELATIONS

ROOT = Path(__file__).parents[2]
SOURCE = Path(os.environ.get("XBFS_XENAPI_JSON", ROOT.parent / "shared/reference/xenapi.json"))
# Served though not published: only dom0 may call them, so the published model leaves them out.
UNPUBLISHED = {"VTPM.get_contents": "root", "VTPM.set_contents": "root"}


@pytest.fixture(scope="module")
def published():
    if not SOURCE.exists():
        pytest.skip(f"no published object model at {SOURCE}")
    calls.load()
    return {cls["name"]: cls for cls in json.loads(SOURCE.read_text(encoding="utf-8"))}


def test_every_implemented_call_is_published_with_its_role_and_parameters(published):
    for method, call in calls.registered().items():
        cls, _, name = method.partition(".")
        found = [message for message in published[cls]["messages"] if message["name"] == name]
        if not found:
            assert UNPUBLISHED.get(method) == call.role, method
            continue
        (message,) = found
        assert message["lifecycle"]["state"] != "Removed_s", method
        assert call.role in message["roles"], method
        weaker = schema.ROLES[: schema.ROLES.index(call.role)]
        assert not set(weaker) & set(message["roles"]), f"{method}: {weaker} may call it too"
        wanted = [param for param in message["params"] if param["name"] != "session_id"]
        assert [(param.name, param.type, param.required) for param in call.params] == [
            (param["name"], param["type"], param.get("required", True)) for param in wanted
        ], method


def test_implementations_take_what_is_published():
    calls.load()
    for method, call in calls.registered().items():
        signature = inspect.signature(call.run)
        required = [param for param in call.params if param.required]
        signature.bind(None, *required)
        signature.bind(None, *call.params)
        assert method.partition(".")[0] in schema.classes()


def test_every_field_is_published_with_its_type(published):
    for name, cls in schema.classes().items():
        fields = {field["name"]: field for field in published[name]["fields"]}
        for key, field in cls.fields.items():
            assert field.type == fields[key]["type"], f"{name}.{key}"
            assert field.qualifier == fields[key]["qualifier"], f"{name}.{key}"
        missing = fields.keys() - cls.fields.keys()
        assert all(fields[key]["lifecycle"]["state"] == "Removed_s" for key in missing), missing


def test_schema_is_what_its_tool_makes(published):
    stored = json.loads((ROOT / "tools/xensim/schema.json").read_text(encoding="utf-8"))
    assert stored == {
        name: json.loads(json.dumps(make_schema.compact(published[name]))) for name in make_schema.CLASSES
    }


def test_relations_join_fields_of_the_right_types():
    classes = schema.classes()
    for (child, pointer), (parent, listing) in RELATIONS.items():
        assert classes[child].fields[pointer].type == f"{parent} ref"
        assert classes[parent].fields[listing].type == f"{child} ref set"


@pytest.mark.parametrize(
    ("method", "role"),
    [
        ("VM.get_record", "read-only"),
        ("VM.set_name_label", "vm-admin"),
        ("VM.set_is_a_template", "vm-admin"),
        ("VM.add_to_blocked_operations", "vm-admin"),
        ("VDI.add_to_other_config", "vm-admin"),
        ("SR.add_to_other_config", "pool-operator"),
        ("VM.add_tags", "vm-operator"),
        ("VM.set_NVRAM", "vm-admin"),
        ("VM.get_by_name_label", "read-only"),
        ("pool.get_all_records", "read-only"),
    ],
)
def test_generic_calls_have_the_published_role(method, role):
    call = calls.find(method)
    assert call is not None
    assert call.role == role


@pytest.mark.parametrize(
    "method", ["VM.get_nonsense", "VM.set_uuid", "VM", "", "VDI.snapshot_with_quiesce", "Foo.get_all"]
)
def test_what_is_not_published_is_unknown(method):
    assert calls.find(method) is None
