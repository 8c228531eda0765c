"""Restores what is asked for of guests, or only counts it: the way in.

One restore belongs to one thread, which reads; another one, of its own, writes.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol

from xbfs_engine.core.errors import GuestNotFound, GuestUnsupported, TargetExists
from xbfs_engine.guestfs.base import Kind
from xbfs_engine.restore.files.copying import Copy, Links
from xbfs_engine.restore.files.paths import expand, wanted, without_drive
from xbfs_engine.restore.files.reading import Reader
from xbfs_engine.restore.files.view import View
from xbfs_engine.restore.files.walk import Walk

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from xbfs_engine.core.errors import XbfsError
    from xbfs_engine.guestfs.guest import Guest
    from xbfs_engine.restore.files.records import Account, Target
    from xbfs_engine.restore.files.view import Item

SOURCES_MAX: Final = 250_000
"""Matches, which are remembered at some 300 bytes each; what is below them counts for nothing."""


class Source(NamedTuple):
    """A path or pattern in a guest: in one volume if that is named, else in the guest's own tree."""

    guest: Guest
    path: bytes
    volume: str | None = None


@dataclass(frozen=True, slots=True)
class Options:
    """``umask``: what is taken from the modes of files whose filesystem has none."""

    umask: int = 0o022
    with_xattrs: bool = True


class Listener(Protocol):
    """Who is told of a restore, in the thread that called."""

    def failed(self, path: bytes, error: XbfsError) -> None:
        """A file or directory was not restored as it should be."""
        ...

    def progress(self, entries: int, content_bytes: int) -> None:
        """So much is done; called for every file."""
        ...


def restore_files(sources: Sequence[Source], target: Target, options: Options, listener: Listener) -> None:
    """Restore all that matches, and what is below it, to ``target``, each under its last name.

    What can not be read or written is told to ``listener`` and left out; the target's account has the rest. Raises,
    with nothing written, GuestNotFound if a source matches nothing and UsageError for a path that is none; and at any
    time what ends all: StorageFull and the target's other fatal errors, and StorageError of the repository.
    """
    account = target.account
    told = _Told(account, listener)
    found = [(source.guest, *_matches(source, account)) for source in sources]
    copy = Copy(target)
    names: dict[bytes, tuple[str, bytes]] = {}
    links: dict[int, Links] = {}
    try:
        for guest, view, items in found:
            reader = Reader(view, account, umask=options.umask, with_xattrs=options.with_xattrs)
            of_guest = links.setdefault(id(guest), Links(account))
            walk = Walk(view, _unambiguous(items, names, account), account.fail)
            for item in walk:
                if item is None:
                    copy.leave()
                elif item.kind is Kind.DIRECTORY:
                    copy.enter(item, reader)
                elif not copy.place.refused:
                    copy.one(item, reader, of_guest)
                if copy.place.refused:
                    walk.prune()
                told.now()
        copy.finish()
    finally:
        copy.stop()
        told.now()


def count_files(sources: Sequence[Source], account: Account, listener: Listener) -> None:
    """Count in ``account`` what `restore_files` would restore, without reading or writing any content."""
    told = _Told(account, listener)
    totals = account.totals
    names: dict[bytes, tuple[str, bytes]] = {}
    found = [_matches(source, account) for source in sources]
    for view, items in found:
        links = Links(account)
        for item in Walk(view, _unambiguous(items, names, account), account.fail):
            if item is not None:
                linked = None if item.stat is None or item.kind is Kind.DIRECTORY else links.meet(item, item.stat)
                if linked is not None and not linked.is_first:
                    totals.hardlinks += 1
                elif item.kind is Kind.FILE:
                    totals.files += 1
                    totals.size_bytes += item.stat.size_bytes if item.stat else 0
                elif item.kind is Kind.DIRECTORY:
                    totals.directories += 1
                elif item.kind is Kind.SYMLINK:
                    totals.symlinks += 1
                elif item.kind is Kind.SOCKET:
                    totals.sockets_skipped += 1
                else:
                    totals.specials += 1
            told.now()


class _Told:
    """What a listener was told."""

    def __init__(self, account: Account, listener: Listener) -> None:
        self._account = account
        self._listener = listener

    def now(self) -> None:
        failures, totals = self._account.failures, self._account.totals
        while failures:
            path, error = failures.popleft()
            totals.failed += 1
            self._listener.failed(path, error)
        self._listener.progress(totals.entries, totals.content_bytes)


def _matches(source: Source, account: Account) -> tuple[View, Iterator[Item]]:
    """What a source stands for: one file at least."""
    view = View(source.guest, source.volume)
    problems: list[XbfsError] = []

    def failed(path: bytes, error: XbfsError) -> None:
        if not problems:
            problems.append(error)
        account.fail(path, error)

    text = without_drive(source.path) if source.volume is not None and view.is_windows else source.path
    path = wanted(text, windows=view.is_windows)
    for ignore_case in (False, True):
        items = expand(view, path, failed, ignore_case=ignore_case)
        first = next(items, None)
        if first is not None:
            return view, chain([first], items)
        if problems:
            raise problems[0]
    where = "the guest's own tree" if source.volume is None else f"volume {source.volume}"
    raise GuestNotFound(
        f"nothing in {where} is {text.decode(errors='backslashreplace')}", hint="look for it with `xbfs find`"
    )


def _unambiguous(items: Iterator[Item], names: dict[bytes, tuple[str, bytes]], account: Account) -> Iterator[Item]:
    """Those whose name is their own, each once; the others have failed."""
    for item in items:
        spot = names.get(item.name)
        if spot is None:
            if len(names) >= SOURCES_MAX:
                raise GuestUnsupported(f"more than {SOURCES_MAX} files match", hint="ask for their directory")
            names[item.name] = item.spot
            yield item
        elif spot != item.spot:
            shown = item.name.decode(errors="backslashreplace")
            account.fail(item.path, TargetExists(f"another file that was asked for is called {shown}, too"))
