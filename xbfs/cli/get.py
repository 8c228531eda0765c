"""get: files of guests out of restore points."""

from __future__ import annotations

import os
import resource
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final

from xbfs.cli import text
from xbfs.cli.context import catalog_of, index_of, point_of, repository_of
from xbfs.cli.file_text import path_text
from xbfs.cli.progress import ProgressLine
from xbfs.cli.volume_keys import given_keys
from xbfs.view.guests import open_guest
from xbfs_engine.catalog.blockmap import NodeStore
from xbfs_engine.core.errors import Cancelled, PointNotFound, UsageError
from xbfs_engine.core.limits import MIB
from xbfs_engine.guestfs.worker.client import GuestWorkers
from xbfs_engine.restore.files.directory_target import DirectoryTarget
from xbfs_engine.restore.files.paths import split
from xbfs_engine.restore.files.records import Account
from xbfs_engine.restore.files.restoring import Options, Source, count_files, restore_files
from xbfs_engine.restore.files.tar_target import FileOutput, StreamOutput, TarTarget
from xbfs_engine.storage.files import AtomicOutput
from xbfs_engine.store.cache import ChunkCache
from xbfs_engine.store.reader import ChunkReader

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator, Sequence

    from xbfs.cli.output import Output
    from xbfs_engine.catalog.catalog import Catalog
    from xbfs_engine.catalog.restore_point import RestorePoint
    from xbfs_engine.core.errors import XbfsError
    from xbfs_engine.core.runtime import Clock
    from xbfs_engine.restore.files.records import Target
    from xbfs_engine.store.repository import Repository

STREAM: Final = "-"
CACHE_BYTES: Final = 128 * MIB
"""Decoded chunks that are kept: files are read in the order of their names, not of their places."""
_TOLD_MAX: Final = 100
"""Files that failed of which each is told; the others are counted."""


def get(arguments: argparse.Namespace, output: Output) -> None:
    """Restore files."""
    if arguments.tar == STREAM and not arguments.dry_run:
        _take_stdout(output)
    repository = repository_of(arguments)
    catalog = catalog_of(repository, output)
    wanted = [_parsed(catalog, word) for word in arguments.sources]
    account = Account()
    clock = repository.runtime.clock
    started_s = clock.monotonic_s()
    with _sources(repository, wanted, arguments.volume) as sources, ProgressLine(output, clock) as line:
        told = _Told(output, line, account, clock)
        try:
            _restore(arguments, sources, account, repository, told)
        except KeyboardInterrupt:
            raise Cancelled(_stopped(arguments, account)) from None
    told.rest()
    with_owners = not arguments.no_owner and (arguments.tar is not None or os.geteuid() == 0)
    output.result(
        {
            "points": sorted({point.id for point, _ in wanted}),
            "target": arguments.output or arguments.tar,
            "dry_run": arguments.dry_run,
            "owners_restored": with_owners,
            **account.totals.to_record(),
            "losses": [
                {"what": what, "count": loss.count, "first": loss.path.decode(errors="replace")}
                for what, loss in account.losses.items()
            ],
            "elapsed_ms": int((clock.monotonic_s() - started_s) * 1000),
        }
    )
    output.say(_summary(arguments, account, clock.monotonic_s() - started_s))
    if not (with_owners or arguments.no_owner or arguments.dry_run):
        output.say("owners were not restored: that needs root")


def _parsed(catalog: Catalog, word: str) -> tuple[RestorePoint, bytes]:
    """POINT:/path, at the first colon that has a point before it. Raises PointNotFound, PointAmbiguous, UsageError."""
    problem: PointNotFound | None = None
    for point, path in split(word):
        try:
            return point_of(catalog, point), path
        except PointNotFound as exc:
            problem = problem or exc
    raise problem or UsageError(f"{word!r} is not POINT:/path", hint="such as web@latest:/etc or desk@latest:C:/Users")


def _restore(
    arguments: argparse.Namespace, sources: Sequence[Source], account: Account, repository: Repository, told: _Told
) -> None:
    if arguments.dry_run:
        count_files(sources, account, told)
        return
    _allow_open_files()
    with _target(arguments, account, repository) as target:
        restore_files(sources, target, _options(arguments), told)


def _stopped(arguments: argparse.Namespace, account: Account) -> str:
    if arguments.dry_run or arguments.tar not in (None, STREAM):
        return "stopped on request; nothing was left behind"
    entries = text.count(account.totals.entries, "file")
    return f"stopped on request after {entries}; " + (
        "the archive has no end" if arguments.tar else "each one that is there is whole"
    )


@contextmanager
def _sources(
    repository: Repository, wanted: Sequence[tuple[RestorePoint, bytes]], volume: str | None
) -> Iterator[list[Source]]:
    """What is wanted, over one guest for each point."""
    reader = ChunkReader(repository.storage, repository.keys, index_of(repository))
    nodes, cache = NodeStore(reader), ChunkCache(reader, CACHE_BYTES)
    points = {point.id: point for point, _ in wanted}
    keys = given_keys()
    with GuestWorkers(repository.runtime.clock, workers_max=1) as workers:
        guests = {point.id: open_guest(workers, point, nodes, cache, keys) for point in points.values()}
        yield [Source(guests[point.id], path, volume) for point, path in wanted]


@contextmanager
def _target(arguments: argparse.Namespace, account: Account, repository: Repository) -> Iterator[Target]:
    random = repository.runtime.random
    if arguments.tar is None:
        with_owner = os.geteuid() == 0 and not arguments.no_owner
        directory = Path(arguments.output)
        with DirectoryTarget(
            directory, account, random, overwrite=arguments.overwrite, with_owner=with_owner
        ) as target:
            yield target
        return
    ours, with_owner = (os.geteuid(), os.getegid()), not arguments.no_owner
    if arguments.tar == STREAM:
        yield TarTarget(StreamOutput(sys.stdout.fileno()), account, owner=ours, with_owner=with_owner)
        return
    with AtomicOutput(Path(arguments.tar), overwrite=arguments.overwrite) as archive:
        yield TarTarget(FileOutput(archive), account, owner=ours, with_owner=with_owner)


def _options(arguments: argparse.Namespace) -> Options:
    umask = os.umask(0o077)
    os.umask(umask)
    return Options(umask=umask, with_xattrs=not arguments.no_xattrs)


def _allow_open_files() -> None:
    """A directory is open for each level that is being restored."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


class _Told:
    """Tells the user of failures and progress."""

    def __init__(self, output: Output, line: ProgressLine, account: Account, clock: Clock) -> None:
        self._output = output
        self._line = line
        self._account = account
        self._clock = clock
        self._started_s = clock.monotonic_s()
        self._first: tuple[bytes, XbfsError] | None = None
        self._told = 0

    def failed(self, path: bytes, error: XbfsError) -> None:
        """The first one waits: if nothing else happens, it is the error of the command."""
        if self._told == 0 and self._first is None:
            self._first = (path, error)
            return
        self._tell_first()
        self._tell(path, error)

    def progress(self, entries: int, content_bytes: int) -> None:
        """Show how far it is."""
        elapsed_s = self._clock.monotonic_s() - self._started_s
        rate = f", {entries / elapsed_s:.0f} files/s" if elapsed_s > 0 else ""
        self._line.update("get", content_bytes, 0, note=text.count(entries, "file") + rate)

    def rest(self) -> None:
        """What can only be told in the end. Raises the error if it is the only thing that happened."""
        if self._first is not None and not self._account.totals.entries:
            path, error = self._first
            raise type(error)(f"{path_text(path)}: {error.message}", hint=error.hint)
        self._tell_first()
        if self._told > _TOLD_MAX:
            self._output.warn(f"{self._told - _TOLD_MAX} more files failed")
        for what, loss in self._account.losses.items():
            self._output.warn(
                f"not restored of {text.count(loss.count, 'file')}: {what}; the first is {path_text(loss.path)}"
            )

    def _tell_first(self) -> None:
        if self._first is not None:
            first, self._first = self._first, None
            self._tell(*first)

    def _tell(self, path: bytes, error: XbfsError) -> None:
        self._told += 1
        if self._told <= _TOLD_MAX:
            self._output.warn(f"{path_text(path)}: {error.message}", error.hint)


def _summary(arguments: argparse.Namespace, account: Account, elapsed_s: float) -> str:
    totals = account.totals
    others = totals.symlinks + totals.hardlinks + totals.specials
    what = f"{text.count(totals.files, 'file')}, " + (
        f"{totals.directories} director{'y' if totals.directories == 1 else 'ies'}"
    )
    if others:
        what += f", {text.count(others, 'link or device')}" if others == 1 else f", {others} links and devices"
    if totals.sockets_skipped:
        what += f", {text.count(totals.sockets_skipped, 'socket')} left out"
    if totals.failed:
        what += f", {totals.failed} failed"
    if arguments.dry_run:
        return f"would restore {what}, {text.size(totals.size_bytes)}"
    where = "standard output" if arguments.tar == STREAM else arguments.output or arguments.tar
    rate = f"{totals.entries / elapsed_s:.0f} files/s" if elapsed_s > 0 else "- files/s"
    return (
        f"{where}: {what}, {text.size(totals.content_bytes)} in {text.duration(elapsed_s)}, "
        f"{rate}, {text.rate(totals.content_bytes, elapsed_s)}"
    )


def _take_stdout(output: Output) -> None:
    """Keep standard output for the archive. Raises UsageError where it can not be."""
    if output.json:
        raise UsageError("--json and --tar - both need standard output", hint="write the archive to a file: --tar FILE")
    if sys.stdout.isatty():
        raise UsageError(
            "an archive is not for a terminal", hint="name a file with --tar FILE, or pipe --tar - somewhere"
        )
    output.give_away_stdout()
