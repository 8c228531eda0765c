"""Independent clients of the simulated pool: the published XenAPI package, and JSON-RPC over http.client."""

from __future__ import annotations

import http.client
import json
import ssl
import time
from contextlib import contextmanager

import pytest
import XenAPI

WAIT_S = 20.0


@contextmanager
def logged_in(sim, user="root", password=None, originator="xbfs/test", host=None):
    session = XenAPI.Session((host or sim.master).url, ignore_ssl=True)
    try:
        session.login_with_password(user, password or sim.root_password, "1.0", originator)
        yield session.xenapi
    finally:
        session("close")()


@contextmanager
def refused(*details):
    with pytest.raises(XenAPI.Failure) as caught:
        yield caught
    assert caught.value.details[: len(details)] == list(details)


def json_rpc(host, method, *params, version="2.0"):
    connection = http.client.HTTPSConnection(
        host.address, host.port, context=ssl._create_unverified_context(), timeout=WAIT_S
    )
    body = {"method": method, "params": list(params), "id": 7} | ({"jsonrpc": "2.0"} if version == "2.0" else {})
    try:
        connection.request("POST", "/jsonrpc", json.dumps(body))
        return json.loads(connection.getresponse().read())
    finally:
        connection.close()


def ended(api, task):
    """The record of a task that has ended, waited for with event.from."""
    token, until = "", time.monotonic() + WAIT_S
    while time.monotonic() < until:
        record = api.task.get_record(task)
        if record["status"] in {"success", "failure", "cancelled"}:
            return record
        token = getattr(api.event, "from")([f"task/{task}"], token, 30.0)["token"]
    raise AssertionError("the task did not end")


def vm_of(api, name):
    (found,) = api.VM.get_by_name_label(name)
    return found


def disks_of(api, vm):
    vbds = [api.VBD.get_record(ref) for ref in api.VM.get_VBDs(vm)]
    return [one["VDI"] for one in sorted(vbds, key=lambda one: int(one["userdevice"])) if one["type"] == "Disk"]
