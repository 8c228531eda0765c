"""A mount server as a process of its own, with faults a test can switch on from outside.

    python -m tests.support.mount_server STORAGE MOUNTPOINT CONTROL [DEADLINE_S]

CONTROL is a directory. While CONTROL/hang holds the name of a blob (or "*"), reads of it do not return. While
CONTROL/raise exists, looking at a directory's entries raises an exception nobody expects. "ready" goes to stdout.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from tests.support.engine import PASSPHRASE
from xbfs.fuse.mount import MountOptions, serve
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
    root, directory, control = map(Path, sys.argv[1:4])
    view = ViewOptions(deadline_s=float(sys.argv[4]) if len(sys.argv) > 4 else 30.0, refresh_s=0.2)
    entries = Tree.entries

    def entries_or_bug(self: Tree, inode: int) -> list[Entry] | None:
        if (control / "raise").exists():
            raise ZeroDivisionError("injected")
        return entries(self, inode)

    Tree.entries = entries_or_bug  # type: ignore[method-assign]  # the bug to be survived
    repository = open_repository(ControlledStorage(root, control), system_runtime(), PASSPHRASE)

    def ready() -> None:
        sys.stdout.write("ready\n")
        sys.stdout.flush()

    try:
        serve(repository, Catalog(repository), directory, MountOptions(view), ready=ready)
    except XbfsError as exc:
        sys.stderr.write(f"{type(exc).__name__}: {exc.message}\n")
        return exc.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
