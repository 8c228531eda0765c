#!/usr/bin/env python3
"""Makes schema.json of the simulator from the published object model of XAPI (xenapi.json of xapi-project).

``python -m tools.xensim.make_schema SOURCE`` writes it beside this file. Classes nobody asks the simulator for are
left out; of a message only what a server needs stays: least role, parameters, result.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

CLASSES = (
    *("session", "subject", "role", "task", "event", "message", "pool", "Certificate"),
    *("VM", "VM_metrics", "VM_guest_metrics", "VM_appliance", "VTPM", "console"),
    *("host", "host_metrics", "host_cpu", "network", "VIF", "VIF_metrics", "PIF", "PIF_metrics"),
    *("SM", "SR", "VDI", "VBD", "VBD_metrics", "PBD", "vdi_nbd_server_info"),
)
ROLES = ("read-only", "vm-operator", "vm-admin", "vm-power-admin", "pool-operator", "pool-admin")
LOCAL_ROOT = "root"
NULL = "OpaqueRef:NULL"
EPOCH = "19700101T00:00:00Z"


def least_role(roles: list[str]) -> str:
    """The weakest of the published roles; the datamodel gives none to calls that only dom0 itself may make."""
    return next((role for role in ROLES if role in roles), LOCAL_ROOT)


def empty(kind: str, enums: dict[str, list[str]]) -> object:
    """What a field of type ``kind`` holds before anybody sets it."""
    if kind.endswith(" set"):
        return []
    if kind.endswith((" map", " record")):
        return {}
    if kind.endswith(" ref"):
        return NULL
    if kind.startswith("enum "):
        return enums[kind.removeprefix("enum ")][0]
    return {"int": 0, "float": 0.0, "bool": False, "datetime": EPOCH}.get(kind, "")


def default(text: str | None, kind: str, enums: dict[str, list[str]]) -> object:
    """The published default, written in OCaml, as a JSON value."""
    plain = empty(kind, enums)
    if text is None or text in {"None", "Null"} or kind.endswith(" ref"):
        return plain
    if kind.endswith(" set"):
        items = [item.strip() for item in text.strip("{}").split(";") if item.strip()]
        return (
            [int(item) for item in items] if kind == "int set" else [item for item in items if "OpaqueRef" not in item]
        )
    if kind.endswith(" map"):
        return dict(re.findall(r'"([^"]*)" -> "([^"]*)"', text))
    if kind == "int":
        return int(text)
    if kind == "float":
        return float(text)
    return text == "true" if kind == "bool" else text.strip('"')


def compact(cls: dict[str, Any]) -> dict[str, Any]:
    """One class as the simulator reads it."""
    enums = {enum["name"]: [value["name"] for value in enum["values"]] for enum in cls["enums"]}
    fields = {
        field["name"]: [
            field["type"],
            field["qualifier"],
            field.get("default") is None and field["qualifier"] != "RO/runtime",
            default(field.get("default"), field["type"], enums),
        ]
        for field in cls["fields"]
        if field["lifecycle"]["state"] != "Removed_s"
    }
    messages = {}
    for message in cls["messages"]:
        if message["lifecycle"]["state"] == "Removed_s":
            continue
        params = [
            [param["name"], param["type"], bool(param.get("required", True))]
            for param in message["params"]
            if param["name"] != "session_id"
        ]
        result = message["result"][0] if message.get("result") else "void"
        messages[message["name"]] = [least_role(message["roles"]), result, bool(message["implicit"]), params]
    return {"enums": enums, "fields": fields, "messages": messages}


def main(arguments: list[str]) -> int:
    """Run the command; returns the exit status."""
    if len(arguments) != 1:
        sys.stderr.write("usage: python -m tools.xensim.make_schema SOURCE\n")
        return 2
    published = {cls["name"]: cls for cls in json.loads(Path(arguments[0]).read_text(encoding="utf-8"))}
    classes = {name: compact(published[name]) for name in CLASSES}
    lines = []
    for name, cls in classes.items():
        parts = []
        for part, entries in cls.items():
            rows = ",\n".join(f"   {json.dumps(key)}: {json.dumps(value)}" for key, value in sorted(entries.items()))
            parts.append(f"  {json.dumps(part)}: {{\n{rows}}}")
        lines.append(f" {json.dumps(name)}: {{\n" + ",\n".join(parts) + "}")
    Path(__file__).with_name("schema.json").write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
