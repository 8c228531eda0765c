"""Exports of a live mount for tests: a server process that can be killed and started anew, with counts."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING

from tests.support.live_mounts import LiveMounted
from xbfs.serve.nbd import NbdPlace
from xbfs.serve.nfs import NfsPlace

if TYPE_CHECKING:
    from collections.abc import Callable

WAIT_S = 30


class Exported(LiveMounted):
    """As LiveMounted, with an export: ``nbd`` of the session, or ``nfs`` of all."""

    def __init__(self, folder: Path, kind: str, address: str, *more: str) -> None:
        super().__init__(folder)
        self._kind, self._address, self._more = kind, address, more
        self.told: dict[str, str] = {}

    def start(self) -> None:
        words = (self._kind, self.state, self.mount, self.control, self._address, *self._more)
        self.told = json.loads(self.spawn("tests.support.export_server", *words))

    @property
    def nbd(self) -> NbdPlace:
        return NbdPlace(
            Path(self.told["socket"]), self._address, int(self.told["port"]), Path(self.told["certificates"])
        )

    @property
    def nfs(self) -> NfsPlace:
        return NfsPlace(self._address, int(self.told["port"]), int(self.told["mount_port"]))

    def count(self, name: str) -> int:
        """How often the overlays did that."""
        counted: int = json.loads((self.control / "counts").read_text())[name]
        return counted


def children(pid: int, name: str) -> list[int]:
    """Processes of that name whose parent is ``pid``."""
    return [one for one, (parent, called) in _processes().items() if parent == pid and called == name]


def descendants(pid: int, name: str) -> list[int]:
    """Processes of that name that are below ``pid``."""
    processes = _processes()

    def descends(one: int) -> bool:
        parent, _ = processes.get(one, (0, ""))
        return parent == pid or (parent > 0 and descends(parent))

    return [one for one, (_, called) in processes.items() if called == name and descends(one)]


def _processes() -> dict[int, tuple[int, str]]:
    """Parents and names of all processes, by number."""
    found = {}
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            fields = dict(line.split(":\t", 1) for line in status.read_text().splitlines() if ":\t" in line)
        except OSError:
            continue  # it has ended
        found[int(fields["Pid"])] = int(fields["PPid"]), fields["Name"]
    return dict(sorted(found.items()))


def wait_until(condition: Callable[[], bool], what: str) -> None:
    """Until it holds."""
    end = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.02)
