"""Disks written to scripted hosts, and metadata of VMs: the right host, framing, failures on the way and after it."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

import pytest
import trio

from tests.support.xapi_fake import SECRETS, http_200, pool_config, refuse
from tests.support.xapi_transfers import DISK, EARLY, IO_ERROR, TASK, Tasks, redirect, send, serving, transfer_hosts
from xbfs_engine.core.errors import TransferFailed, XapiFailure
from xbfs_engine.core.runtime import system_runtime
from xbfs_engine.source.xapi import http
from xbfs_engine.source.xapi.http import export_metadata, import_metadata, import_raw
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


async def test_a_disk_is_written(host: FakeHost, tasks: Tasks, pool: Pool) -> None:
    found: list[bytes] = []

    def route(request: Request) -> None:
        request.send(EARLY)
        found.append(request.body(int(request.headers["content-length"])))
        tasks.succeed()

    host.routes["/import_raw_vdi"] = route
    async with import_raw(pool, "OpaqueRef:vdi", format="vhd", length=len(DISK), timeout_s=5) as sink:
        await send(sink, DISK[:1000])
        await send(sink, DISK[1000:])
    assert found == [DISK]
    request = next(item for item in host.received if item.method == "PUT")
    assert request.query == {"vdi": "OpaqueRef:vdi", "format": "vhd", "task_id": TASK}


async def test_records_of_chunked_writes(host: FakeHost, tasks: Tasks, pool: Pool) -> None:
    disk = bytearray(len(DISK))

    def route(request: Request) -> None:
        assert "content-length" not in request.headers
        request.send(EARLY)
        while True:
            offset, length = struct.unpack("<QI", request.body(12))
            if length == 0:
                break
            disk[offset : offset + length] = request.body(length)
        tasks.succeed()

    host.routes["/import_raw_vdi"] = route
    async with import_raw(pool, "OpaqueRef:vdi", format="chunked", length=None, timeout_s=5) as sink:
        for offset, data in ((70_000, b"world"), (512, b""), (0, b"hello" * 1000)):
            await trio.to_thread.run_sync(sink.write_at, offset, data)
    assert disk[:5000] == b"hello" * 1000
    assert disk[70_000:70_006] == b"world\0"


async def test_a_write_that_the_host_gives_up_is_told_by_the_task(host: FakeHost, tasks: Tasks, pool: Pool) -> None:
    host.routes["/import_raw_vdi"] = serving(tasks, EARLY, end=lambda: tasks.end(IO_ERROR))
    with pytest.raises(XapiFailure) as caught:
        async with import_raw(pool, "OpaqueRef:vdi", format="raw", length=1 << 30, timeout_s=5) as sink:
            await send(sink, DISK * 1024)
    assert caught.value.code == "VDI_IO_ERROR"


async def test_a_write_that_was_taken_whole_but_failed(host: FakeHost, tasks: Tasks, pool: Pool) -> None:
    def route(request: Request) -> None:
        request.send(EARLY)
        request.body(len(DISK))
        tasks.end(IO_ERROR)

    host.routes["/import_raw_vdi"] = route
    with pytest.raises(XapiFailure):
        async with import_raw(pool, "OpaqueRef:vdi", format="raw", length=len(DISK), timeout_s=5) as sink:
            await send(sink, DISK)


async def test_a_write_that_is_not_complete_never_succeeds(host: FakeHost, tasks: Tasks, pool: Pool) -> None:
    def route(request: Request) -> None:
        request.send(EARLY)
        request.body(len(DISK))
        tasks.end(IO_ERROR)

    host.routes["/import_raw_vdi"] = route
    with pytest.raises(TransferFailed, match=f"10 of {len(DISK)} bytes were sent") as caught:
        async with import_raw(pool, "OpaqueRef:vdi", format="raw", length=len(DISK), timeout_s=5) as sink:
            await send(sink, DISK[:10])
    assert caught.value.retryable


async def test_a_write_goes_to_a_host_that_reaches_the_disk(hosts: list[FakeHost], tasks: Tasks, pool: Pool) -> None:
    first, second = hosts
    records = {
        "OpaqueRef:a": {"currently_attached": False, "host": "OpaqueRef:1"},
        "OpaqueRef:b": {"currently_attached": True, "host": "OpaqueRef:2"},
    }
    first.methods |= {
        "SR.get_PBDs": lambda *_: list(records),
        "PBD.get_record": lambda _, pbd: records[pbd],
        "host.get_address": lambda _, ref: {"OpaqueRef:1": first, "OpaqueRef:2": second}[ref].address.host,
    }

    def route(request: Request) -> None:
        request.send(EARLY)
        request.body(3)
        tasks.succeed()

    second.routes["/import_raw_vdi"] = route
    async with import_raw(pool, "OpaqueRef:vdi", format="raw", length=3, timeout_s=5) as sink:
        await send(sink, b"abc")
    records["OpaqueRef:b"]["currently_attached"] = False
    with pytest.raises(XapiFailure) as caught:
        async with import_raw(pool, "OpaqueRef:vdi", format="raw", length=3, timeout_s=5):
            pass
    assert caught.value.code == "SR_HAS_NO_PBDS"


async def test_a_redirected_write_costs_no_byte_of_the_body(hosts: list[FakeHost], tasks: Tasks, pool: Pool) -> None:
    first, second = hosts
    location = f"https://{second.address.host}/import_raw_vdi"
    first.routes["/import_raw_vdi"] = redirect(location)
    found: list[bytes] = []

    def route(request: Request) -> None:
        request.send(EARLY)
        found.append(request.body(len(DISK)))
        tasks.succeed()

    second.routes["/import_raw_vdi"] = route
    async with import_raw(pool, "OpaqueRef:vdi", format="raw", length=len(DISK), timeout_s=5) as sink:
        await send(sink, DISK)
    assert found == [DISK]


async def test_a_cancelled_write_cancels_the_task(host: FakeHost, tasks: Tasks, pool: Pool) -> None:
    def route(request: Request) -> None:
        request.send(EARLY)
        request.body(len(DISK))

    host.routes["/import_raw_vdi"] = route
    with trio.move_on_after(0.3) as scope:
        async with import_raw(pool, "OpaqueRef:vdi", format="raw", length=len(DISK), timeout_s=30) as sink:
            await send(sink, DISK[:10])
            await trio.sleep_forever()
    assert scope.cancelled_caught
    assert host.named("task.cancel")


async def test_metadata_both_ways(host: FakeHost, tasks: Tasks, pool: Pool) -> None:
    archive = b"ova.xml" * 1000
    host.routes["/export_metadata"] = serving(tasks, http_200(archive))
    assert await export_metadata(pool, "OpaqueRef:vm") == archive
    found: list[bytes] = []

    def route(request: Request) -> None:
        request.send(EARLY)
        found.append(request.body(int(request.headers["content-length"])))
        refs = "".join(f"<value>OpaqueRef:{n}-a</value>" for n in (1, 2))
        tasks.succeed(f"<value><array><data>{refs}</data></array></value>")

    host.routes["/import_metadata"] = route
    made = await import_metadata(pool, archive, vdi_map={"old-uuid": "new-uuid"}, restore=True)
    assert made == ["OpaqueRef:1-a", "OpaqueRef:2-a"]
    assert found == [archive]
    query = host.received[[item.path for item in host.received].index("/import_metadata")].query
    assert query == {"restore": "true", "vdi:old-uuid": "new-uuid", "task_id": TASK}


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\nshort",
        b"HTTP/1.1 200 OK\r\ncontent-length: 99999999999\r\n\r\n",
        EARLY + b"x" * 2000,
    ],
)
async def test_metadata_that_are_cut_or_endless(
    host: FakeHost, tasks: Tasks, pool: Pool, answer: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http, "METADATA_BYTES_MAX", 1000)
    host.routes["/export_metadata"] = serving(tasks, answer)
    with pytest.raises(TransferFailed):
        await export_metadata(pool, "OpaqueRef:vm")


async def test_a_task_that_can_not_be_made(host: FakeHost, pool: Pool) -> None:
    host.methods["task.create"] = refuse("TOO_MANY_PENDING_TASKS")
    with pytest.raises(XapiFailure, match="too many tasks"):
        await export_metadata(pool, "OpaqueRef:vm")
