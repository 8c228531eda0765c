"""For tests of `xbfs get`: guests of several kinds, restores into a directory, and what a directory then holds."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from tests.support.runtime import SeededRandom
from xbfs_engine.guestfs.reading import GuestReading
from xbfs_engine.guestfs.volumes import Disk
from xbfs_engine.restore.files.directory_target import DirectoryTarget
from xbfs_engine.restore.files.records import Account
from xbfs_engine.restore.files.restoring import Options, Source, restore_files

if TYPE_CHECKING:
    from collections.abc import Sequence

    from xbfs_engine.core.errors import XbfsError
    from xbfs_engine.formats.source import BlockSource
    from xbfs_engine.guestfs.guest import Guest

IS_ROOT = os.geteuid() == 0


def guest_on(*sources: BlockSource) -> GuestReading:
    return GuestReading([Disk(str(number), source) for number, source in enumerate(sources)])


class Listening:
    """Remembers what it is told."""

    def __init__(self) -> None:
        self.failures: list[tuple[bytes, XbfsError]] = []
        self.calls = 0

    def failed(self, path: bytes, error: XbfsError) -> None:
        self.failures.append((path, error))

    def progress(self, entries: int, content_bytes: int) -> None:
        self.calls += 1

    @property
    def failed_paths(self) -> list[bytes]:
        return [path for path, _ in self.failures]


def get(
    guest: Guest,
    paths: Sequence[str | bytes],
    directory: Path,
    *,
    volume: str | None = None,
    overwrite: bool = False,
    with_owner: bool = IS_ROOT,
    options: Options = Options(),  # noqa: B008 - frozen
    seed: int = 1,
) -> tuple[Account, Listening]:
    """Restore into a directory."""
    listening = Listening()
    account = Account()
    sources = [Source(guest, os.fsencode(path), volume) for path in paths]
    with DirectoryTarget(directory, account, SeededRandom(seed), overwrite=overwrite, with_owner=with_owner) as target:
        restore_files(sources, target, options, listening)
    return account, listening


def names(directory: Path) -> set[str]:
    """All paths below a directory."""
    return {str(path.relative_to(directory)) for path in directory.rglob("*")}


def open_files() -> int:
    """Descriptors of this process."""
    with suppress(OSError):
        return len(list(Path("/proc/self/fd").iterdir()))
    return 0
