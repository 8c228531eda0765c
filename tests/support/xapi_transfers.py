"""Routes of scripted hosts for transfers of disks, the task that judges one, and readers as worker threads read."""

from __future__ import annotations

import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

import trio

from tests.support.xapi_fake import fake_hosts
from xbfs_engine.source.xapi.http import export_raw

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.support.xapi_fake import FakeHost, Request
    from xbfs_engine.source.xapi.http import RawSink, RawStream
    from xbfs_engine.source.xapi.session import Pool

TASK = "OpaqueRef:00000000-0000-4000-8000-00000000aaaa"
EARLY = b"HTTP/1.1 200 OK\r\nconnection: close\r\n\r\n"
ERROR = b"HTTP/1.1 500 Internal Server Error\r\ncontent-type: text/html\r\n\r\n<html>VDI_IO_ERROR</html>"
DISK = bytes(range(256)) * 4096
IO_ERROR = {"status": "failure", "error_info": ["VDI_IO_ERROR", "Device I/O errors"]}


class Tasks:
    """One task on ``host``, pending until a route says how it ended."""

    def __init__(self, host: FakeHost) -> None:
        self.record: dict[str, object] = {"status": "pending", "progress": 0.0}
        self.gone = False
        self.changed = threading.Event()
        host.methods |= {
            "task.create": lambda *_: TASK,
            "event.from": lambda *_: {"token": str(self.changed.wait(0.05))},
            "task.get_record": lambda *_: self.record,
            "task.cancel": lambda *_: self.end({"status": "cancelled"}),
            "task.destroy": self.destroy,
        }

    def end(self, record: dict[str, object]) -> str:
        self.record = record
        self.changed.set()
        return ""

    def succeed(self, result: str = "") -> None:
        self.end({"status": "success", "result": result})

    def destroy(self, *_: object) -> str:
        self.gone = True
        return ""


@contextmanager
def transfer_hosts(directory: Path) -> Iterator[list[FakeHost]]:
    """Two hosts of a pool, of which the first is master and reaches every disk."""
    with fake_hosts(directory, 2) as found:
        for host in found:
            host.methods |= {
                "VDI.get_SR": lambda *_: "OpaqueRef:sr",
                "SR.get_PBDs": lambda *_: ["OpaqueRef:pbd"],
                "PBD.get_record": lambda *_: {"currently_attached": True, "host": "OpaqueRef:host"},
                "host.get_address": lambda *_: found[0].address.host,
            }
        yield found


def redirect(location: str | bytes) -> Callable[[Request], None]:
    """A route that sends elsewhere."""
    place = location.encode() if isinstance(location, str) else location
    return lambda request: request.send(b"HTTP/1.1 302 Found\r\nLocation: " + place + b"\r\n\r\n")


def hanging(until: threading.Event) -> Callable[[Request], None]:
    """A route that stops in the middle."""

    def route(request: Request) -> None:
        request.send(EARLY + b"abc")
        until.wait(10)

    return route


def serving(tasks: Tasks, *pieces: bytes, end: Callable[[], object] | None = None) -> Callable[[Request], None]:
    """A route that sends ``pieces`` and ends the task."""

    def route(request: Request) -> None:
        for piece in pieces:
            request.send(piece)
        (end or tasks.succeed)()

    return route


async def in_thread(stream: RawStream, size: int) -> bytes:
    """As a worker reads: in pieces, to the end."""

    def read() -> bytes:
        found = b""
        while True:
            buffer = bytearray(size)
            count = stream.readinto(memoryview(buffer))
            found += buffer[:count]
            if count < size:
                return found

    return await trio.to_thread.run_sync(read)


async def send(sink: RawSink, data: bytes) -> None:
    await trio.to_thread.run_sync(sink.write, data)


async def whole(pool: Pool, *, size_bytes: int | None = None, timeout_s: float = 5) -> bytes:
    """Read a raw disk to its end, and hear the task."""
    async with export_raw(pool, "OpaqueRef:vdi", format="raw", timeout_s=timeout_s) as stream:
        data = await in_thread(stream, 64 << 10)
        await stream.finish(size_bytes=size_bytes)
        return data
