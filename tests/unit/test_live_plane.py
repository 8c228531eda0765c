"""The writable data plane over a socket in place of the FUSE device: what happens to a request's bytes."""

from __future__ import annotations

import errno
import os
import socket
import struct
import threading
import time
from collections import deque
from typing import TYPE_CHECKING

import pytest

from tests.support.disks import CHUNK, MemoryDisk
from xbfs.fuse import wire
from xbfs.fuse.files import OpenFiles
from xbfs.fuse.live_plane import LivePlane
from xbfs.vfs.gate import Parked
from xbfs.vfs.live.attributes import Attributes
from xbfs.vfs.live.disks import LiveDisk
from xbfs.vfs.live.handles import OpenDisk
from xbfs.view.overlay import create_overlay
from xbfs_engine.core.errors import StorageFull
from xbfs_engine.core.runtime import SystemClock

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from xbfs.view.base import Part
    from xbfs.view.overlay import Overlay

SIZE = 16 * CHUNK
ANSWER_S = 10


class Hanging(Parked):
    """Is over when the test says so."""

    def __init__(self, waiting: deque[Callable[[], None]]) -> None:
        super().__init__("a blob hangs")
        self._waiting = waiting

    def park(self, resume: Callable[[], None]) -> None:
        self._waiting.append(resume)


class Base(MemoryDisk):
    """Hangs for as long as ``waiting`` is a queue."""

    waiting: deque[Callable[[], None]] | None = None

    def parts_at(self, offset: int, length: int) -> Sequence[Part]:
        if self.waiting is not None:
            raise Hanging(self.waiting)
        return super().parts_at(offset, length)


class Kernel:
    """The other side of the device."""

    def __init__(self, end: socket.socket, handle: int) -> None:
        self._end = end
        self._handle = handle
        self._unique = 0
        end.settimeout(ANSWER_S)

    def ask(self, opcode: int, record: bytes, data: bytes = b"") -> int:
        self._unique += 1
        size = wire.IN_HEADER.size + len(record) + len(data)
        header = wire.IN_HEADER.pack(size, opcode, self._unique, 9, 0, 0, 0, 0)
        self._end.send(header + record + data)
        return self._unique

    def write(self, offset: int, data: bytes) -> int:
        return self.ask(wire.WRITE, wire.WRITE_IN.pack(self._handle, offset, len(data), 0, 0, 0, 0), data)

    def answered(self) -> tuple[int, int, bytes]:
        """Which request, the errno, the rest."""
        answer = self._end.recv(1 << 20)
        size, error, unique = wire.OUT_HEADER.unpack_from(answer)
        assert size == len(answer)
        return unique, -error, answer[wire.OUT_HEADER.size :]


@pytest.fixture
def base() -> Base:
    disk = Base.holding(SIZE, range(16))
    assert isinstance(disk, Base)
    return disk


@pytest.fixture
def overlay(tmp_path: Path, base: Base) -> Iterator[Overlay]:
    with create_overlay(tmp_path / "overlay", base, identity=b"x") as made:
        yield made


@pytest.fixture
def kernel(tmp_path: Path, overlay: Overlay) -> Iterator[Kernel]:
    (tmp_path / "stub").touch()
    stub = os.open(tmp_path / "stub", os.O_PATH)
    files = OpenFiles()
    handle = files.add_writable(OpenDisk(LiveDisk(overlay, stub, SystemClock()), None, "x", 30.0))
    ours, device = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)

    def attributes(inode: int) -> Attributes:
        return Attributes(inode, 1, 0o100600, 2, 3, 4, 0, 5, 6, -1, 7, 8)

    plane = LivePlane(
        device.detach(), files, SystemClock(), attributes=attributes, passable=lambda _: None, ended=lambda: None
    )
    plane.start()
    yield Kernel(ours, handle)
    ours.close()
    deadline = time.monotonic() + ANSWER_S
    while any(thread.name == "xbfs-device" for thread in threading.enumerate()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    plane.close()
    os.close(plane.control)
    os.close(stub)


def test_a_write_that_waits_without_a_thread_keeps_its_bytes(kernel: Kernel, overlay: Overlay, base: Base) -> None:
    base.waiting = waiting = deque()
    part = kernel.write(100, b"kept" * 10)
    deadline = time.monotonic() + ANSWER_S
    while not waiting:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    for turn in range(20):  # through all buffers that there are
        whole = kernel.write(CHUNK + turn * 4096, b"other" * 819 + b"!")
        assert kernel.answered() == (whole, 0, wire.WRITE_OUT.pack(4096, 0))
    base.waiting = None
    waiting.popleft()()
    assert kernel.answered() == (part, 0, wire.WRITE_OUT.pack(40, 0))
    assert overlay.read_at(0, 4096) == base.read_at(0, 100) + b"kept" * 10 + base.read_at(140, 3956)
    assert overlay.read_at(CHUNK, 4096) == b"other" * 819 + b"!"


def test_errors_of_writes(kernel: Kernel, overlay: Overlay, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_offset: int, _buffers: object) -> None:
        raise StorageFull("no room")

    monkeypatch.setattr(type(overlay), "write_at", lambda _self, offset, buffers: full(offset, buffers))
    asked = kernel.write(0, b"x" * 4096)
    assert kernel.answered() == (asked, errno.ENOSPC, b"")
    monkeypatch.undo()
    asked = kernel.write(0, b"x" * 4096)
    assert kernel.answered()[:2] == (asked, 0)
    asked = kernel.ask(wire.FALLOCATE, wire.FALLOCATE_IN.pack(1, 0, 4096, 0x08, 0))
    assert kernel.answered() == (asked, errno.EOPNOTSUPP, b"")


def test_attributes_as_the_kernel_reads_them(kernel: Kernel) -> None:
    asked = kernel.ask(wire.GETATTR, bytes(16))
    unique, error, answer = kernel.answered()
    assert (unique, error) == (asked, 0)
    inode, size, blocks, atime, mtime, ctime, *rest = struct.unpack_from("=6Q10I", answer, 16)
    assert (inode, size, blocks, atime, mtime, ctime) == (9, 5, 6, (1 << 64) - 1, 0, 0)
    assert rest == [999_999_999, 7, 8, 0o100600, 2, 3, 4, 0, 4096, 0]
    asked = kernel.ask(wire.GETXATTR, wire.GETXATTR_IN.pack(0, 0), b"security.capability\0")
    assert kernel.answered() == (asked, errno.ENODATA, b"")
