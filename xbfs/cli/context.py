"""What verbs start from: the repository that is meant, its secret, its cache directory and its restore points."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final

from xbfs_engine.catalog.catalog import Catalog
from xbfs_engine.core.errors import PassphraseMissing, StorageError, UsageError
from xbfs_engine.core.runtime import SystemClock, system_runtime
from xbfs_engine.storage.files import make_directories
from xbfs_engine.storage.local import LocalStorage
from xbfs_engine.storage.watched import WatchedStorage
from xbfs_engine.store.repository import CONFIGS, Repository, open_repository

if TYPE_CHECKING:
    import argparse

    from xbfs.cli.output import Output
    from xbfs_engine.catalog.restore_point import DiskRecord, RestorePoint
    from xbfs_engine.store.index import ChunkIndex

_PASSPHRASE_FILE_MAX: Final = 64 * 1024


def storage_of(arguments: argparse.Namespace) -> WatchedStorage:
    """The storage named by -r or XBFS_REPOSITORY. Raises UsageError."""
    place: str = getattr(arguments, "repository", None) or os.environ.get("XBFS_REPOSITORY", "")
    if not place:
        raise UsageError("no repository given", hint="name its directory with -r PATH or in XBFS_REPOSITORY")
    if "://" in place:
        raise UsageError(f"{place} is not a directory", hint="this release keeps repositories in local directories")
    return WatchedStorage(LocalStorage(Path(place)), SystemClock())


def repository_of(arguments: argparse.Namespace) -> Repository:
    """The opened repository. Raises RepositoryError, KeyError_, StorageError."""
    storage = storage_of(arguments)
    exists = any(True for _ in storage.list_blobs(CONFIGS))
    # Without a config the engine says so before it tries a secret: nobody is asked for one in vain.
    secret = passphrase(f"passphrase of {storage.location()}: ") if exists else ""
    return open_repository(storage, system_runtime(), secret)


def catalog_of(repository: Repository, output: Output) -> Catalog:
    """The restore points, with a warning for each that can not be used."""
    catalog = Catalog(repository)
    catalog.refresh()
    for damaged in catalog.damaged():
        output.warn(
            f"restore point {damaged.id[:12]} can not be used: {damaged.problem.message}",
            "run `xbfs verify`, and restore the file under points/ from a copy of the repository",
        )
    return catalog


def index_of(repository: Repository) -> ChunkIndex:
    """The chunk index, with its cache in this repository's own directory."""
    from xbfs_engine.store.index import ChunkIndex

    return ChunkIndex(repository.storage, repository.keys, cache_directory(repository))


def cache_directory(repository: Repository) -> Path:
    """XBFS_CACHE, or xbfs below XDG_CACHE_HOME or ~/.cache; one directory a repository. Raises StorageError."""
    chosen = os.environ.get("XBFS_CACHE")
    base = Path(chosen) if chosen else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "xbfs")
    directory = base.absolute() / repository.id
    try:
        make_directories(directory)
    except StorageError as exc:
        raise type(exc)(
            f"the cache can not be kept in {directory}: {exc.message}",
            hint="set XBFS_CACHE to a directory that can be written; it holds nothing that can not be rebuilt",
        ) from exc
    return directory


def point_of(catalog: Catalog, text: str) -> RestorePoint:
    """The point that ``text`` names: as ``Catalog.find`` takes it, or a path in a mount of this repository."""
    if "/" in text:
        path = Path(text).absolute()
        for place in (path, *path.parents):
            with suppress(OSError):
                return catalog.find(os.getxattr(place, "user.xbfs.point").decode())
    return catalog.find(text)


def disk_of(point: RestorePoint, number: int | None) -> DiskRecord:
    """The disk of that number, or a point's only one. Raises UsageError."""
    numbers = ", ".join(str(disk.number) for disk in point.disks)
    if number is None and len(point.disks) == 1:
        return point.disks[0]
    disk = None if number is None else point.disk(number)
    if disk is None:
        what = "several disks" if number is None else f"no disk {number}"
        raise UsageError(f"restore point {point.id[:12]} has {what}", hint=f"choose with --disk: {numbers}")
    return disk


def passphrase(prompt: str) -> str:
    """The secret that opens the repository: a passphrase or a recovery code. Raises PassphraseMissing."""
    given = _from_environment("XBFS_PASSPHRASE")
    return given if given is not None else _ask(prompt, "XBFS_PASSPHRASE")


def new_passphrase(variable: str) -> str:
    """A passphrase to be set, from ``variable`` or asked for twice. Raises PassphraseMissing, UsageError."""
    given = _from_environment(variable)
    if given is not None:
        return given
    chosen = _ask("new passphrase: ", variable)
    if _ask("once more: ", variable) != chosen:
        raise UsageError("the two passphrases differ", hint="nothing was changed; try again")
    return chosen


def _from_environment(variable: str) -> str | None:
    """From the variable, or the file that VARIABLE_FILE names; one line end at its end is not part of it."""
    value = os.environ.get(variable)
    if value:
        return value
    name = os.environ.get(f"{variable}_FILE")
    if not name:
        return None
    try:
        with Path(name).open("rb") as file:
            content = file.read(_PASSPHRASE_FILE_MAX + 1)
        found = content.decode().removesuffix("\n").removesuffix("\r")
    except (OSError, UnicodeDecodeError) as exc:
        reason = exc.strerror if isinstance(exc, OSError) else "it is not UTF-8 text"
        raise PassphraseMissing(f"{variable}_FILE: {name} can not be read: {reason}", hint="check the file") from exc
    if not found or len(content) > _PASSPHRASE_FILE_MAX:
        raise PassphraseMissing(f"{variable}_FILE: {name} is empty or too long", hint="it holds the passphrase alone")
    return found


def _ask(prompt: str, variable: str) -> str:
    if sys.stdin is None or not sys.stdin.isatty():
        raise PassphraseMissing(
            "a passphrase is needed, and there is no terminal to ask at", hint=f"set {variable} or {variable}_FILE"
        )
    from getpass import getpass

    try:
        return getpass(prompt)
    except EOFError:
        raise PassphraseMissing("no passphrase was given", hint=f"type it, or set {variable}") from None
