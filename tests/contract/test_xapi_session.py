"""Sessions with pools of scripted hosts: who is asked, what is tried again, what is told, what is left behind."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

import pytest
import trio

from tests.support.xapi_fake import PASSWORD, SECRETS, SESSION, Failure, fake_hosts, once, pool_config, refuse
from xbfs_engine.core.errors import (
    CertificateRejected,
    LoginRefused,
    PoolError,
    PoolUnreachable,
    XapiFailure,
)
from xbfs_engine.core.runtime import system_runtime
from xbfs_engine.source.xapi.session import Pool, PoolConfig, open_pool
from xbfs_engine.source.xapi.transport import CallBroken

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractAsyncContextManager
    from pathlib import Path

    from tests.support.xapi_fake import FakeHost

TASK = "OpaqueRef:00000000-0000-4000-8000-00000000aaaa"


@pytest.fixture
def host(tmp_path: Path) -> Iterator[FakeHost]:
    with fake_hosts(tmp_path) as hosts:
        yield hosts[0]


@pytest.fixture
def two(tmp_path: Path) -> Iterator[list[FakeHost]]:
    with fake_hosts(tmp_path, 2) as hosts:
        yield hosts


def opened(config: PoolConfig) -> AbstractAsyncContextManager[Pool]:
    return open_pool(config, SECRETS, system_runtime(), retry_delays_s=(0.01, 0.01))


async def test_logs_in_as_the_node_and_out_again(host: FakeHost) -> None:
    host.methods["VM.get_name_label"] = lambda session, ref: f"{session[-1]} {ref}"
    async with opened(pool_config(host)) as pool:
        assert await pool.call("VM.get_name_label", "OpaqueRef:1") == "1 OpaqueRef:1"
    assert host.calls[0] == ("session.login_with_password", ("root", PASSWORD, "2.21", "xbfs/node"))
    assert host.calls[-1] == ("session.logout", (SESSION,))
    # All over one connection that was kept.
    assert host.connections == 1


async def test_integers_are_sent_as_xapi_takes_them(host: FakeHost) -> None:
    host.methods["VDI.create"] = lambda _, record: record["virtual_size"]
    async with opened(pool_config(host)) as pool:
        assert await pool.call("VDI.create", {"virtual_size": 1 << 41, "sharable": False}) == str(1 << 41)
    assert host.named("VDI.create") == [(SESSION, {"virtual_size": str(1 << 41), "sharable": False})]


async def test_a_session_that_ended_is_renewed_once_and_silently(host: FakeHost) -> None:
    sessions = iter(["first", "second", "third"])
    host.methods["session.login_with_password"] = lambda *_: next(sessions)

    def start(session: str, _ref: str) -> str:
        if session == "first":
            raise Failure("SESSION_INVALID", session)
        return session

    host.methods["VM.start"] = start
    async with opened(pool_config(host)) as pool:
        assert await pool.call("VM.start", "vm") == "second"
    assert host.named("session.logout") == [("second",)]


async def test_a_session_that_ends_at_once_again_is_an_error_without_the_session(host: FakeHost) -> None:
    host.methods["VM.start"] = lambda session, _: refuse("SESSION_INVALID", session)()
    async with opened(pool_config(host)) as pool:
        with pytest.raises(XapiFailure) as caught:
            await pool.call("VM.start", "vm")
    assert caught.value.code == "SESSION_INVALID"
    assert SESSION not in str(caught.value)
    assert SESSION not in caught.value.params
    assert len(host.named("VM.start")) == 2


async def test_many_calls_renew_a_session_together(host: FakeHost) -> None:
    sessions = iter(["first", "second", "third"])
    host.methods["session.login_with_password"] = lambda *_: next(sessions)
    host.methods["VM.start"] = lambda session, _: session if session == "second" else refuse("SESSION_INVALID")()
    async with opened(pool_config(host)) as pool, trio.open_nursery() as nursery:
        for _ in range(12):
            nursery.start_soon(pool.call, "VM.start", "vm")
    assert len(host.named("session.login_with_password")) == 2


async def test_login_follows_a_member_to_the_master(two: list[FakeHost]) -> None:
    member, master = two
    member.methods["session.login_with_password"] = refuse("HOST_IS_SLAVE", master.address.host)
    master.methods["VM.get_all"] = lambda _: ["a"]
    async with opened(pool_config(member, master)) as pool:
        assert await pool.call("VM.get_all") == ["a"]
        assert pool.master == master.address
    assert len(member.calls) == 1


async def test_a_call_follows_when_the_master_moves(two: list[FakeHost]) -> None:
    old, new = two
    old.methods["VM.start"] = refuse("HOST_IS_SLAVE", new.address.host)
    new.methods["VM.start"] = lambda session, _: session
    async with opened(pool_config(old, new)) as pool:
        assert await pool.call("VM.start", "vm") == SESSION
        assert await pool.call("VM.start", "vm") == SESSION
    assert len(old.named("VM.start")) == 1
    assert new.named("session.logout") == [(SESSION,)]


async def test_hosts_that_point_at_each_other_end_in_an_error(two: list[FakeHost]) -> None:
    for host, other in (two, two[::-1]):
        host.methods["session.login_with_password"] = refuse("HOST_IS_SLAVE", other.address.host)
    with pytest.raises(PoolUnreachable, match="HOST_IS_SLAVE"):
        async with opened(pool_config(*two)):
            pass


async def test_every_known_host_is_tried(two: list[FakeHost]) -> None:
    down, up = two
    config = pool_config(up)
    nobody = down.address._replace(host="127.0.0.9")
    config = PoolConfig("test", (nobody, up.address), "root", {**config.pins, "127.0.0.8": "x"}, "xbfs/node")
    async with opened(config) as pool:
        assert pool.master == up.address
    with pytest.raises(PoolUnreachable) as caught:
        async with opened(PoolConfig("test", (nobody,), "root", {"127.0.0.8": "x"}, "xbfs/node")):
            pass
    assert "127.0.0.9" in str(caught.value)
    assert "127.0.0.8" in str(caught.value)


async def test_a_redirect_to_a_host_that_is_not_pinned_ends_there(two: list[FakeHost]) -> None:
    member, master = two
    member.methods["session.login_with_password"] = refuse("HOST_IS_SLAVE", master.address.host)
    with pytest.raises(CertificateRejected) as caught:
        async with opened(pool_config(member)):
            pass
    assert master.fingerprint in str(caught.value)
    assert not master.received


async def test_a_changed_certificate_gets_no_password(host: FakeHost) -> None:
    config = pool_config(host)
    other = ":".join(["AB"] * 32)
    with pytest.raises(CertificateRejected) as caught:
        async with opened(PoolConfig("test", config.addresses, "root", {host.address.host: other}, "xbfs/node")):
            pass
    assert host.fingerprint in str(caught.value)
    assert other in str(caught.value)
    assert not host.received


@pytest.mark.parametrize("code", ["SESSION_AUTHENTICATION_FAILED", "SESSION_AUTHORIZATION_FAILED"])
async def test_a_wrong_password_is_not_tried_elsewhere_and_not_told(two: list[FakeHost], code: str) -> None:
    two[0].methods["session.login_with_password"] = refuse(code, "root", f"bad password {PASSWORD}")
    with pytest.raises(LoginRefused) as caught:
        async with opened(pool_config(*two)):
            pass
    assert PASSWORD not in str(caught.value)
    assert not two[1].calls


async def test_a_role_that_does_not_suffice_names_the_one_that_does(host: FakeHost) -> None:
    host.methods["VM.snapshot"] = refuse("RBAC_PERMISSION_DENIED", "vm.snapshot", "No permission in user session")
    host.methods["SR.create"] = refuse("RBAC_PERMISSION_DENIED", "sr.create", "No permission in user session")
    async with opened(pool_config(host)) as pool:
        with pytest.raises(LoginRefused, match=r"vm\.snapshot") as caught:
            await pool.call("VM.snapshot")
        assert "vm-power-admin" in caught.value.hint
        with pytest.raises(LoginRefused) as caught:
            await pool.call("SR.create")
        assert "pool-operator" in caught.value.hint


def cut(host: FakeHost) -> Callable[..., object]:
    """A method whose connection breaks before the answer."""

    def method(*_: object) -> object:
        host.received[-1].connection.close()
        raise OSError

    return method


async def test_reads_are_tried_again_on_a_broken_connection(host: FakeHost) -> None:
    host.methods["VM.get_all"] = once(cut(host), lambda _: ["a"])
    async with opened(pool_config(host)) as pool:
        assert await pool.call("VM.get_all") == ["a"]
    assert len(host.named("VM.get_all")) == 2
    assert len(host.named("session.login_with_password")) == 1


async def test_reads_are_not_tried_for_ever(host: FakeHost) -> None:
    host.methods["VM.get_all"] = cut(host)
    async with opened(pool_config(host)) as pool:
        with pytest.raises(CallBroken):
            await pool.call("VM.get_all")
    assert len(host.named("VM.get_all")) == 3


async def test_changes_are_never_sent_twice(host: FakeHost) -> None:
    host.methods["VM.snapshot"] = cut(host)
    async with opened(pool_config(host)) as pool:
        with pytest.raises(CallBroken, match=r"VM\.snapshot"):
            await pool.call("VM.snapshot", "vm")
    assert len(host.named("VM.snapshot")) == 1


async def test_a_host_that_breaks_off_twice_is_not_taken_for_the_master_for_ever(two: list[FakeHost]) -> None:
    stuck, well = two
    stuck.methods["VM.destroy"] = cut(stuck)
    well.methods["VM.destroy"] = lambda *_: ""
    async with opened(pool_config(stuck, well)) as pool:
        stuck.methods["session.login_with_password"] = cut(stuck)
        for _ in range(2):
            with pytest.raises(CallBroken):
                await pool.call("VM.destroy", "vm")
        await pool.call("VM.destroy", "vm")
        assert pool.master == well.address
    assert len(stuck.named("VM.destroy")) == 2


async def test_a_call_has_a_deadline_and_leaves_no_thread(host: FakeHost) -> None:
    until = threading.Event()
    host.methods["VM.snapshot"] = lambda *_: until.wait(10)
    before = time.monotonic()
    async with opened(pool_config(host)) as pool:
        with pytest.raises(CallBroken, match=r"0\.2 s"):
            await pool.call("VM.snapshot", "vm", timeout_s=0.2)
        with trio.move_on_after(0.2) as scope:
            await pool.call("VM.snapshot", "vm")
        assert scope.cancelled_caught
        until.set()
        # Calls that were given up do not take the place of others.
        assert pool._calls.borrowed_tokens == 0
    assert time.monotonic() - before < 5


async def test_waits_for_events_do_not_hold_up_calls(host: FakeHost) -> None:
    until = threading.Event()
    host.methods["event.from"] = lambda *_: until.wait(10)
    host.methods["VM.get_all"] = lambda _: []
    async with opened(pool_config(host)) as pool, trio.open_nursery() as nursery:
        for _ in range(12):
            nursery.start_soon(pool.call, "event.from", ["vm"], "", 30.0)
        await trio.sleep(0.1)
        with trio.fail_after(3):
            assert await pool.call("VM.get_all") == []
        until.set()


async def test_records_are_records(host: FakeHost) -> None:
    host.methods["VM.get_all_records"] = lambda _: {"OpaqueRef:1": {"uuid": "u"}}
    host.methods["SR.get_all_records"] = lambda _: {"OpaqueRef:1": "u"}
    host.methods["VDI.get_all_records"] = lambda _: []
    async with opened(pool_config(host)) as pool:
        assert await pool.records("VM") == {"OpaqueRef:1": {"uuid": "u"}}
        for cls in ("SR", "VDI"):
            with pytest.raises(PoolError, match=f"{cls}.get_all_records"):
                await pool.records(cls)


class Tasks:
    """The tasks of one host. ``steps``: what each look at the task shows, the last one for ever."""

    def __init__(self, host: FakeHost, *steps: dict[str, object]) -> None:
        self.steps = list(steps)
        self.destroyed = threading.Event()
        host.methods |= {
            "Async.VM.snapshot": lambda *_: TASK,
            "event.from": lambda *_: {"token": "1,2", "valid_ref_counts": {}, "events": []},
            "task.get_record": lambda *_: self.steps.pop(0) if len(self.steps) > 1 else self.steps[0],
            "task.cancel": self.cancel,
            "task.destroy": lambda *_: self.destroyed.set() or "",
        }

    def cancel(self, _session: str, task: str) -> str:
        assert task == TASK
        self.steps = [{"status": "cancelled", "progress": 1.0}]
        return ""


PENDING = {"status": "pending", "progress": 0.5}


async def test_a_task_is_followed_to_its_result(host: FakeHost) -> None:
    done = {"status": "success", "progress": 1.0, "result": "<value>OpaqueRef:5 &amp; more</value>"}
    tasks = Tasks(host, PENDING, {"status": "pending", "progress": 0.75}, done)
    seen: list[float] = []
    async with opened(pool_config(host)) as pool:
        result = await pool.run_task("VM.snapshot", "vm", "name", [], timeout_s=10, progress=seen.append)
    assert result == "OpaqueRef:5 & more"
    assert seen == [0.5, 0.75]
    assert tasks.destroyed.is_set()
    assert not host.named("task.cancel")
    assert [token for _, _, token, _ in host.named("event.from")] == ["", "1,2", "1,2"]


async def test_a_task_without_result(host: FakeHost) -> None:
    Tasks(host, {"status": "success", "progress": 1.0, "result": ""})
    async with opened(pool_config(host)) as pool:
        assert await pool.run_task("VM.snapshot", timeout_s=10) == ""


async def test_a_failed_task_raises_its_error_and_is_destroyed(host: FakeHost) -> None:
    tasks = Tasks(host, {"status": "failure", "error_info": ["SR_BACKEND_FAILURE_44", "", "no space [opterr=x]", ""]})
    async with opened(pool_config(host)) as pool:
        with pytest.raises(XapiFailure, match="no room for a snapshot") as caught:
            await pool.run_task("VM.snapshot", timeout_s=10)
    assert caught.value.code == "SR_BACKEND_FAILURE_44"
    assert caught.value.hint
    assert tasks.destroyed.is_set()


async def test_a_task_that_somebody_cancelled(host: FakeHost) -> None:
    Tasks(host, {"status": "cancelled"})
    async with opened(pool_config(host)) as pool:
        with pytest.raises(XapiFailure) as caught:
            await pool.run_task("VM.snapshot", timeout_s=10)
    assert caught.value.code == "TASK_CANCELLED"


async def test_a_task_that_takes_too_long_is_cancelled_and_destroyed(host: FakeHost) -> None:
    tasks = Tasks(host, PENDING)
    async with opened(pool_config(host)) as pool:
        with pytest.raises(XapiFailure) as caught:
            await pool.run_task("VM.snapshot", timeout_s=0.2)
    assert caught.value.code == "XBFS_TASK_TIMEOUT"
    assert len(host.named("task.cancel")) == 1
    assert tasks.destroyed.is_set()


async def test_a_cancelled_wait_cancels_the_task(host: FakeHost) -> None:
    tasks = Tasks(host, PENDING)
    async with opened(pool_config(host)) as pool:
        with trio.move_on_after(0.2) as scope:
            await pool.run_task("VM.snapshot", timeout_s=60)
    assert scope.cancelled_caught
    assert len(host.named("task.cancel")) == 1
    assert tasks.destroyed.is_set()
    assert host.calls[-1][0] == "session.logout"


async def test_tasks_are_polled_where_events_are_refused(host: FakeHost) -> None:
    tasks = Tasks(host, PENDING, {"status": "success", "result": "<value>x</value>"})
    host.methods["event.from"] = refuse("EVENT_FROM_TOKEN_PARSE_FAILURE", "x")
    async with opened(pool_config(host)) as pool:
        assert await pool.run_task("VM.snapshot", timeout_s=30) == "x"
    assert tasks.destroyed.is_set()
