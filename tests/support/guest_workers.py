"""For tests of guests' workers: their processes, sources that do harm, and all answers on a guest."""

from __future__ import annotations

import os
import struct
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from tests.support import guest_golden, xfs_golden
from tests.support.volume_images import BytesSource, golden_disks
from xbfs_engine.core.errors import GuestError
from xbfs_engine.guestfs.base import Kind
from xbfs_engine.guestfs.volumes import Disk
from xbfs_engine.guestfs.worker.launcher import ZygoteLauncher

if TYPE_CHECKING:
    from collections.abc import Callable

    from xbfs_engine.formats.source import BlockSource
    from xbfs_engine.guestfs.base import NodeId
    from xbfs_engine.guestfs.guest import Guest, Page
    from xbfs_engine.guestfs.worker.launcher import Launched


class Process(NamedTuple):
    """A process: its number alone would say nothing after its end."""

    pid: int
    started: str

    @property
    def is_there(self) -> bool:
        return process(self.pid) == self


def process(pid: int) -> Process | None:
    """A process that runs; zombies do not."""
    with suppress(OSError):
        fields = (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()
        if fields[0] not in "ZX":
            return Process(pid, fields[19])
    return None


def children(pid: int) -> list[int]:
    """Of its only thread."""
    with suppress(OSError):
        return [int(child) for child in (Path("/proc") / str(pid) / "task" / str(pid) / "children").read_text().split()]
    return []


class CountingLauncher:
    """A zygote's launcher that knows its processes and how many there have been."""

    def __init__(self) -> None:
        self._inner = ZygoteLauncher(30.0)
        self.launched = 0

    @property
    def zygote(self) -> int:
        assert self._inner._zygote is not None
        return self._inner._zygote._process.pid

    @property
    def worker(self) -> int:
        """The one that was started last."""
        return max(self.workers, key=lambda pid: int((process(pid) or Process(0, "0")).started))

    @property
    def workers(self) -> list[int]:
        return [pid for pid in children(self.zygote) if process(pid)]

    def launch(self) -> Launched:
        self.launched += 1
        return self._inner.launch()

    def close(self) -> None:
        self._inner.close()


class TrapSource:
    """A source that does something when a range of it is read."""

    def __init__(self, inner: BlockSource, *traps: tuple[int, int], spring: Callable[[], None]) -> None:
        self._inner = inner
        self._traps = traps
        self.spring = spring
        self.sprung = 0
        self.size_bytes = inner.size_bytes

    def read_at(self, offset: int, length: int) -> bytes:
        if any(offset < start + size and start < offset + length for start, size in self._traps):
            self.sprung += 1
            self.spring()
        return self._inner.read_at(offset, length)


def eventually(is_so: Callable[[], object], within_s: float = 10.0) -> None:
    """Wait until something is so."""
    until = time.monotonic() + within_s
    while not is_so():
        assert time.monotonic() < until, "it never was so"
        time.sleep(0.005)


def send(pid: int, signal: int) -> None:
    os.kill(pid, signal)


def partitioned(content: bytes) -> bytes:
    """A disk with an MBR of one FAT partition."""
    entry = struct.pack("<8B2I", 0, 0, 0, 0, 0x0C, 0, 0, 0, 2048, len(content) // 512)
    table = bytes(440) + struct.pack("<IH", 0x12345678, 0) + entry + bytes(48) + b"\x55\xaa"
    return table.ljust(1 << 20, b"\0") + content


def golden_guest() -> list[Disk]:
    """Disks with every kind of filesystem and of volume."""
    disks = [Disk(str(number), guest_golden.image(name)) for number, name in enumerate(guest_golden.NAMES)]
    disks += [Disk(f"x{name}", xfs_golden.image(name)) for name in ("v4", "v5", "dirty")]
    inside = guest_golden.image("fat")
    disks.append(Disk("p", BytesSource(partitioned(inside.read_at(0, inside.size_bytes)))))
    return [*disks, *(Disk(f"l{number}", BytesSource(data)) for number, data in golden_disks("lvm").items())]


class Refused(NamedTuple):
    """An error as an answer."""

    kind: type[GuestError]
    message: str
    hint: str


def said(call: Callable[..., object], *arguments: object) -> object:
    """What a call gives or raises."""
    try:
        return call(*arguments)
    except GuestError as error:
        return Refused(type(error), error.message, error.hint)


def pages(guest: Guest, volume: str, node: NodeId) -> list[Page]:
    """A whole directory."""
    found = [guest.list(volume, node)]
    while not found[-1].is_last:
        found.append(guest.list(volume, node, found[-1].entries[-1].entry.cookie))
    return found


def everything(guest: Guest, each_max: int) -> dict[tuple[str, str, bytes], object]:
    """All answers on a guest by volume, question and path: on all directories, and on so many files of each."""
    answers: dict[tuple[str, str, bytes], object] = {("", "volumes", b""): guest.volumes()}
    answers["", "tree", b""] = said(guest.tree)
    for row in guest.volumes().rows:
        name = row.name
        answers[name, "info", b""] = said(guest.info, name)
        root = answers[name, "root", b""] = said(guest.root, name)
        todo: list[tuple[NodeId, bytes]] = [] if isinstance(root, Refused) else [(guest.root(name), b"")]
        for node, path in todo:
            for call in (guest.stat, guest.extents, guest.readlink, guest.xattrs):
                answers[name, call.__name__, path] = said(call, name, node)
            answers[name, "read", path] = said(guest.read, name, node, 1000, 100_000)
            listed = answers[name, "list", path] = said(pages, guest, name, node)
            if isinstance(listed, Refused):
                continue
            entries = [entry for page in pages(guest, name, node) for entry, _ in page.entries]
            todo += [
                (entry.node, path + b"/" + entry.name)
                for number, entry in enumerate(entries)
                if number < each_max or entry.kind is Kind.DIRECTORY
            ]
            if entries:
                answers[name, "lookup", path] = said(guest.lookup, name, node, entries[-1].name)
    return answers
