"""Where points are booted for a test: what this machine and a pool have in common.

The session of a test is called ``test-PID-START-…`` after the process that made it: what a killed one left is shown by
`xbfs boot list` and thrown away by the next test. With --keep it is called ``tested-…`` and nobody throws it away.
"""

from __future__ import annotations

import os
import re
from abc import ABC, abstractmethod
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import xbfs
from xbfs.cli.boot_pool_end import journal_of, leave_pool
from xbfs.cli.points import ID_DIGITS
from xbfs.instant import client
from xbfs.instant.boottest.run import Examination
from xbfs_engine.core.errors import SessionNotFound, XbfsError

if TYPE_CHECKING:
    import argparse
    from collections.abc import Awaitable, Callable
    from contextlib import ExitStack

    from xbfs.cli.output import Output
    from xbfs.instant.boottest.verdict import Observed
    from xbfs_engine.catalog.boottests import BootTest
    from xbfs_engine.catalog.catalog import Catalog
    from xbfs_engine.catalog.restore_point import RestorePoint
    from xbfs_engine.store.index import ChunkIndex
    from xbfs_engine.store.repository import Repository

    Trial = Callable[[Callable[[Observed], None]], Awaitable[BootTest]]
    """Boots one point, reports what it sees, and gives the result."""

_LEFT: Final = re.compile(r"test-(\d{1,10})-(\d{1,20})-[0-9a-f]{4}")
_KEPT_NAME: Final = "tested"


@dataclass(frozen=True, slots=True)
class Ground(ABC):
    """What tests need of the command."""

    arguments: argparse.Namespace
    output: Output
    repository: Repository
    catalog: Catalog
    index: ChunkIndex

    @abstractmethod
    def prepare(self, point: RestorePoint, sessions: ExitStack) -> Trial:
        """A session of the point, which ends with ``sessions``. Blocking. Raises XbfsError."""

    def session_name(self, point: RestorePoint) -> str:
        """For a session of this process, or one that is kept, which is said."""
        unique = self.repository.runtime.random.token(2).hex()
        if not self.arguments.keep:
            return f"test-{os.getpid()}-{_started(os.getpid())}-{unique}"
        name = f"{_KEPT_NAME}-{point.id[:ID_DIGITS]}-{unique}"
        self.output.say_now(f"session {name}: `xbfs boot discard {name}` ends it")
        return name

    def examination(self, point: RestorePoint, accelerator: str, firmware: str) -> Examination:
        """As the command wants it."""
        arguments, program = self.arguments, f"xbfs {xbfs.__version__}"
        return Examination(point.id, arguments.deadline, arguments.marker, program, accelerator, firmware)


def throw_away_what_is_left(repository: Repository, output: Output) -> None:
    """Sessions of tests whose process has gone, and what they have on pools."""
    for running in client.running(repository):
        match = _LEFT.fullmatch(running.name)
        if match is None or _started(int(match[1])) == int(match[2]):
            continue
        try:
            journal = journal_of(repository, running.name)
            if journal is not None:
                leave_pool(repository, journal, output, force=True)
            client.discard(repository, running.name, force=True)
        except SessionNotFound:
            continue  # another test was faster
        except XbfsError as exc:
            output.warn(f"session {running.name} of a test that was killed stays: {exc.message}")
        else:
            output.say(f"session {running.name} of a test that was killed is thrown away")


def _started(pid: int) -> int:
    """When a process started, in ticks since the machine did; 0 if there is none (proc(5), field 22 of stat)."""
    with suppress(OSError):
        return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[19])
    return 0
