"""A mount server as a process of its own, with faults a test can switch on from outside.

    python -m tests.support.mount_server STORAGE MOUNTPOINT CONTROL [--deadline S] [--allow-other] [--user NUMBER]
        [--data-plane KIND]

CONTROL is a directory. While CONTROL/hang holds the name of a blob (or "*"), reads of it do not return. While
CONTROL/raise exists, looking at a directory's entries raises an exception nobody expects. "ready" goes to stdout.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import structlog  # noqa: F401 - later, as another user, it may not be readable

import xbfs.fuse.operations  # noqa: F401 - the same
from tests.support.engine import PASSPHRASE
from xbfs.fuse.mount import DataPlaneKind, MountOptions, MountServer
from xbfs.vfs.filesystem import ViewOptions
from xbfs.vfs.tree import Tree
from xbfs_engine.catalog.catalog import Catalog
from xbfs_engine.core.errors import XbfsError
from xbfs_engine.core.runtime import system_runtime
from xbfs_engine.storage.local import LocalStorage
from xbfs_engine.store.repository import open_repository

if TYPE_CHECKING:
    from xbfs.vfs.tree import Entry

HANG_MAX_S = 120


class ControlledStorage(LocalStorage):
    def __init__(self, root: Path, control: Path) -> None:
        super().__init__(root)
        self._control = control / "hang"

    def read(self, name: str, offset: int, length: int) -> bytes:
        end = time.monotonic() + HANG_MAX_S
        while self._hangs(name) and time.monotonic() < end:
            time.sleep(0.02)
        return super().read(name, offset, length)

    def _hangs(self, name: str) -> bool:
        try:
            return self._control.read_text() in {name, "*"}
        except FileNotFoundError:
            return False


def main() -> int:
    parser = argparse.ArgumentParser()
    for name in ("storage", "directory", "control"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--deadline", type=float, default=30.0)
    parser.add_argument("--allow-other", action="store_true")
    parser.add_argument("--user", type=int)
    parser.add_argument("--data-plane", type=DataPlaneKind, default=DataPlaneKind.DEVICE)
    arguments = parser.parse_args()
    control: Path = arguments.control
    options = MountOptions(
        ViewOptions(deadline_s=arguments.deadline, refresh_s=0.2),
        allow_other=arguments.allow_other,
        data_plane=arguments.data_plane,
    )
    entries = Tree.entries

    def entries_or_bug(self: Tree, inode: int) -> list[Entry] | None:
        if (control / "raise").exists():
            raise ZeroDivisionError("injected")
        return entries(self, inode)

    Tree.entries = entries_or_bug  # type: ignore[method-assign]  # the bug to be survived
    repository = open_repository(ControlledStorage(arguments.storage, control), system_runtime(), PASSPHRASE)
    if arguments.user is not None:
        os.setgid(arguments.user)
        os.setuid(arguments.user)

    def ready() -> None:
        sys.stdout.write("ready\n")
        sys.stdout.flush()

    try:
        MountServer(repository, Catalog(repository), arguments.directory, options).serve(ready)
    except XbfsError as exc:
        sys.stderr.write(f"{type(exc).__name__}: {exc.message}\n")
        return exc.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
