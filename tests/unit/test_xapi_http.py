"""Disks read from scripted hosts: early 200, errors inside, redirects, truncation, silence, the task's word."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import pytest
import trio

from tests.support.xapi_fake import SECRETS, SESSION, pool_config
from tests.support.xapi_transfers import (
    DISK,
    EARLY,
    ERROR,
    IO_ERROR,
    TASK,
    Tasks,
    hanging,
    in_thread,
    redirect,
    serving,
    transfer_hosts,
    whole,
)
from xbfs_engine.core.errors import CertificateRejected, LoginRefused, TransferFailed, XapiFailure
from xbfs_engine.core.runtime import system_runtime
from xbfs_engine.source.xapi import http
from xbfs_engine.source.xapi.http import RawStream, export_raw
from xbfs_engine.source.xapi.session import Pool, open_pool

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

    from tests.support.xapi_fake import FakeHost, Request


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[list[FakeHost]]:
    with transfer_hosts(tmp_path) as found:
        yield found


@pytest.fixture
def host(hosts: list[FakeHost]) -> FakeHost:
    return hosts[0]


@pytest.fixture
def tasks(host: FakeHost) -> Iterator[Tasks]:
    made = Tasks(host)
    yield made
    # Whatever happened: nothing of ours is left on the pool.
    assert made.gone


@pytest.fixture
async def pool(hosts: list[FakeHost]) -> AsyncIterator[Pool]:
    async with open_pool(pool_config(*hosts), SECRETS, system_runtime(), retry_delays_s=(0.01,)) as opened:
        yield opened


async def test_a_disk_is_read(host: FakeHost, tasks: Tasks, pool: Pool) -> None:
    host.routes["/export_raw_vdi"] = serving(tasks, EARLY, DISK)
    async with export_raw(pool, "OpaqueRef:vdi", format="raw", timeout_s=5) as stream:
        assert await in_thread(stream, 100_000) == DISK
        await stream.finish(size_bytes=len(DISK))
        assert stream.received_bytes == len(DISK)
    request = next(item for item in host.received if item.method == "GET")
    assert request.query == {"vdi": "OpaqueRef:vdi", "format": "raw", "task_id": TASK}
    # Not in the query: it would be in logs and redirects.
    assert request.headers["cookie"] == f"session_id={SESSION}"
    label = host.named("task.create")[0][1]
    assert label.startswith("xbfs/node: ")
    assert not host.named("task.cancel")


async def test_a_difference_is_asked_for(host: FakeHost, tasks: Tasks, pool: Pool) -> None:
    host.routes["/export_raw_vdi"] = serving(tasks, EARLY + b"conectix", b"more")
    async with export_raw(pool, "OpaqueRef:vdi", format="vhd", base_ref="OpaqueRef:base", timeout_s=5) as stream:
        assert await in_thread(stream, 5) == b"conectixmore"
        await stream.finish()
    request = next(item for item in host.received if item.method == "GET")
    assert request.query["base"] == "OpaqueRef:base"


@pytest.mark.parametrize("cut", [1, 5, 13, 40, len(ERROR)])
async def test_an_error_inside_the_body_is_no_disk(host: FakeHost, tasks: Tasks, pool: Pool, cut: int) -> None:
    """xapi says 200 first; what follows comes in one piece or two."""
    end = lambda: tasks.end(IO_ERROR)  # noqa: E731
    host.routes["/export_raw_vdi"] = serving(tasks, EARLY + ERROR[:cut], ERROR[cut:], end=end)
    with pytest.raises(XapiFailure) as caught:
        await whole(pool)
    assert caught.value.code == "VDI_IO_ERROR"
    assert "500 Internal Server Error" in str(caught.value.__cause__)


async def test_an_error_inside_the_body_without_a_word_of_the_task(
    host: FakeHost, tasks: Tasks, pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http, "_VERDICT_S", 0.2)
    host.routes["/export_raw_vdi"] = serving(tasks, EARLY + ERROR, end=lambda: None)
    with pytest.raises(TransferFailed, match="500 Internal Server Error"):
        await whole(pool)
    assert host.named("task.cancel")


async def test_a_disk_that_begins_like_an_error_is_a_disk(host: FakeHost, tasks: Tasks, pool: Pool) -> None:
    disk = ERROR + DISK
    host.routes["/export_raw_vdi"] = serving(tasks, EARLY, disk)
    assert await whole(pool, size_bytes=len(disk)) == disk


async def test_an_error_behind_the_disk_is_told_by_the_task(host: FakeHost, tasks: Tasks, pool: Pool) -> None:
    host.routes["/export_raw_vdi"] = serving(tasks, EARLY, DISK, ERROR, end=lambda: tasks.end(IO_ERROR))
    with pytest.raises(XapiFailure) as caught:
        await whole(pool)
    assert caught.value.code == "VDI_IO_ERROR"


async def test_a_stream_that_ends_early_is_told_by_the_task(host: FakeHost, tasks: Tasks, pool: Pool) -> None:
    host.routes["/export_raw_vdi"] = serving(tasks, EARLY, DISK[:1000], end=lambda: tasks.end(IO_ERROR))
    with pytest.raises(XapiFailure):
        await whole(pool)


async def test_a_stream_that_ends_early_though_the_task_is_content(host: FakeHost, tasks: Tasks, pool: Pool) -> None:
    host.routes["/export_raw_vdi"] = serving(tasks, EARLY, DISK[:1000])
    with pytest.raises(TransferFailed, match=f"1000 of {len(DISK)} bytes"):
        await whole(pool, size_bytes=len(DISK))


async def test_a_task_that_never_ends_fails_the_transfer(host: FakeHost, tasks: Tasks, pool: Pool) -> None:
    host.routes["/export_raw_vdi"] = serving(tasks, EARLY, DISK, end=lambda: None)
    with pytest.raises(XapiFailure) as caught:
        await whole(pool, timeout_s=0.3)
    assert caught.value.code == "XBFS_TASK_TIMEOUT"
    assert host.named("task.cancel")


async def test_the_rest_can_be_dropped(host: FakeHost, tasks: Tasks, pool: Pool) -> None:
    def endless(request: Request) -> None:
        request.send(EARLY)
        while True:
            request.send(DISK)

    host.routes["/export_raw_vdi"] = endless
    async with export_raw(pool, "OpaqueRef:vdi", format="vhd", timeout_s=5) as stream:
        buffer = bytearray(1000)
        assert await trio.to_thread.run_sync(stream.readinto, memoryview(buffer)) == 1000
        assert buffer == DISK[:1000]
    assert host.named("task.cancel")


async def test_silence_has_an_end(host: FakeHost, tasks: Tasks, pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "_VERDICT_S", 0.2)
    until = threading.Event()
    host.routes["/export_raw_vdi"] = hanging(until)
    with pytest.raises(TransferFailed, match="it took too long"):
        await whole(pool, timeout_s=0.3)
    until.set()


async def test_leaving_frees_a_thread_that_waits_for_the_host(host: FakeHost, tasks: Tasks, pool: Pool) -> None:
    until = threading.Event()
    host.routes["/export_raw_vdi"] = hanging(until)
    failures: list[Exception] = []

    def read(stream: RawStream) -> None:
        try:
            stream.readinto(memoryview(bytearray(4096)))
        except TransferFailed as exc:
            failures.append(exc)

    with trio.fail_after(5):
        async with trio.open_nursery() as nursery, export_raw(pool, "r", format="raw", timeout_s=30) as stream:
            nursery.start_soon(trio.to_thread.run_sync, read, stream)
            await trio.sleep(0.2)
    assert failures
    until.set()


async def test_a_redirect_is_followed_to_a_pinned_host(hosts: list[FakeHost], tasks: Tasks, pool: Pool) -> None:
    first, second = hosts
    location = f"https://{second.address.host}/elsewhere?evil=1"
    first.routes["/export_raw_vdi"] = redirect(location)
    second.routes["/export_raw_vdi"] = serving(tasks, EARLY, DISK)
    assert await whole(pool, size_bytes=len(DISK)) == DISK
    # Of the redirect only the host counts.
    assert second.received[-1].query == {"vdi": "OpaqueRef:vdi", "format": "raw", "task_id": TASK}


async def test_the_session_never_goes_to_a_host_that_is_not_pinned(hosts: list[FakeHost], tasks: Tasks) -> None:
    first, second = hosts
    location = f"https://{second.address}/export_raw_vdi"
    first.routes["/export_raw_vdi"] = redirect(location)
    async with open_pool(pool_config(first), SECRETS, system_runtime()) as pool:
        with pytest.raises(CertificateRejected, match=second.fingerprint):
            await whole(pool)
    assert not second.received


@pytest.mark.parametrize(
    "location",
    [b"http://127.0.0.1/x", b"", b"https://", b"//127.0.0.2/", b"https://[::1/", b"https://a b/", b"https://h:99999/"],
)
async def test_a_redirect_to_nowhere(host: FakeHost, tasks: Tasks, pool: Pool, location: bytes) -> None:
    def route(request: Request) -> None:
        request.send(b"HTTP/1.1 302 Found\r\nLocation: " + location + b"\r\n\r\n")
        tasks.succeed()

    host.routes["/export_raw_vdi"] = route
    with pytest.raises(TransferFailed, match="redirects"):
        await whole(pool)


async def test_redirects_in_a_circle(host: FakeHost, tasks: Tasks, pool: Pool) -> None:
    def route(request: Request) -> None:
        request.send(f"HTTP/1.1 302 Found\r\nLocation: https://{host.address}/\r\n\r\n".encode())
        tasks.succeed()

    host.routes["/export_raw_vdi"] = route
    with pytest.raises(TransferFailed, match="from one to the other"):
        await whole(pool)


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (b"HTTP/1.1 401 Unauthorised\r\n\r\n", LoginRefused),
        (b"HTTP/1.1 403 Forbidden\r\n\r\n", LoginRefused),
        (b"HTTP/1.1 404 Not Found\r\n\r\n", TransferFailed),
        (b"HTTP/1.1 500 Internal Server Error\r\n\r\n<html>", TransferFailed),
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\n", TransferFailed),
        (b"HTTP/1.1 200", TransferFailed),
        (b"HTTP/1.1 2x0 OK\r\n\r\n", TransferFailed),
        (b"220 mail.example.org ESMTP\r\n\r\n", TransferFailed),
        (b"x" * 100_000, TransferFailed),
        (b"", TransferFailed),
    ],
)
async def test_other_answers(host: FakeHost, tasks: Tasks, pool: Pool, answer: bytes, error: type[Exception]) -> None:
    host.routes["/export_raw_vdi"] = serving(tasks, answer)
    with pytest.raises(error):
        await whole(pool)
