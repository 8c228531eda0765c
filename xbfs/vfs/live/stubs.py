"""Stubs: empty files that stand for overlay disks, told by their inode number and by nothing a client could write.

Each has an anchor, a hard link beside the directory (``tree`` has ``tree.stubs/<key>``) that no client can reach: it
says which inode is the disk's, and keeps its number from being used again when the client has removed all names.
Called while nobody serves the directory, or by whoever serves it.
"""

from __future__ import annotations

import errno
import os
import stat
from contextlib import suppress
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Final

from xbfs_engine.core.errors import StorageError, StorageFull, TargetExists, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

DIRECTORY_MODE: Final = 0o755
STUB_MODE: Final = 0o600


def anchors(directory: Path) -> Path:
    """Where the anchors of a session's directory lie."""
    return directory.with_name(f"{directory.name}.stubs")


def place_stub(directory: Path, path: str, key: str) -> None:
    """Make the stub of overlay ``key`` at ``path`` below ``directory``; all directories are made. Durable; repeatable.

    Raises UsageError if the path leads elsewhere, TargetExists if something else is there, StorageError.
    """
    parts = PurePosixPath(path).parts
    if not parts or any(part in {"/", ".."} for part in parts) or "/" in key or key in {"", ".", ".."}:
        raise UsageError(f"{path!r} is no place for the disk {key!r}", hint="give a path below the session's directory")
    anchor = anchors(directory) / key
    try:
        for parent in (anchor.parent, directory):
            _make(parent)
        with suppress(FileExistsError):
            os.close(os.open(anchor, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, STUB_MODE))
        _sync(anchor.parent)
        place = directory
        for part in parts[:-1]:
            place /= part
            _make(place)
        place /= parts[-1]
        try:
            os.link(anchor, place, follow_symlinks=False)
        except FileExistsError as exc:
            if not os.path.samestat(anchor.lstat(), place.lstat()):
                raise TargetExists(f"{place} exists and is not disk {key!r}") from exc
        _sync(place.parent)
    except OSError as exc:
        kind = StorageFull if exc.errno in {errno.ENOSPC, errno.EDQUOT} else StorageError
        raise kind(f"{place_of(exc, directory)} can not be made: {exc.strerror}") from exc


def place_of(exc: OSError, otherwise: Path) -> str:
    """What an error is about."""
    return str(exc.filename2 or exc.filename or otherwise)


def stub_inodes(directory: Path) -> dict[str, os.stat_result]:
    """The anchors of a session's directory by key. Raises OSError."""
    with os.scandir(anchors(directory)) as entries:
        return {entry.name: entry.stat(follow_symlinks=False) for entry in entries}


def stub_keys(directory: Path) -> dict[str, list[str]]:
    """Where each key's stub is now, relative to ``directory``: clients rename, link and remove. Raises StorageError."""
    try:
        keys = {status.st_ino: key for key, status in stub_inodes(directory).items()}
        found: dict[str, list[str]] = {key: [] for key in keys.values()}
        for path, inode in _files(directory):
            if inode in keys:
                found[keys[inode]].append(path)
    except OSError as exc:
        raise StorageError(f"{place_of(exc, directory)} can not be read: {exc.strerror}") from exc
    return {key: sorted(paths) for key, paths in found.items()}


def _files(directory: Path, within: str = "") -> Iterator[tuple[str, int]]:
    """Path and inode number of all that is no directory. Links are not followed."""
    with os.scandir(directory) as entries:
        listed = sorted(entries, key=lambda entry: entry.name)
    for entry in listed:
        path = f"{within}{entry.name}"
        if entry.is_dir(follow_symlinks=False):
            yield from _files(directory / entry.name, f"{path}/")
        elif entry.is_file(follow_symlinks=False):
            yield path, entry.inode()


def _make(directory: Path) -> None:
    """A directory with a durable name, if there is none."""
    try:
        directory.mkdir(DIRECTORY_MODE)
    except FileExistsError:
        if not stat.S_ISDIR(directory.lstat().st_mode):
            raise
    _sync(directory.parent)


def _sync(directory: Path) -> None:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
