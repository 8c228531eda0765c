"""What is wanted of a guest: ``POINT:/path`` taken apart, and patterns in paths matched against the guest.

``*``, ``?`` and ``[…]`` stand for characters within a name, ``**`` for any number of directories. A name that is
written exactly as in the pattern matches, too: ``a[1].txt`` finds itself. Pure but for what `expand` asks the guest.
"""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING, Final, NamedTuple

from xbfs_engine.catalog.fileindex.glob import Pattern
from xbfs_engine.core.errors import GuestDamaged, GuestError, GuestUnsupported, IntegrityError, SourceError, UsageError
from xbfs_engine.guestfs.base import Kind

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from xbfs_engine.core.errors import XbfsError
    from xbfs_engine.restore.files.view import Item, View

DEPTH_MAX: Final = 1024
"""Directories in one another that are entered; far below what PATH_MAX allows to reach."""
COMPONENTS_MAX: Final = 256
"""Of a path that is asked for."""

UNREADABLE: Final = (GuestError, IntegrityError, SourceError)
"""What concerns one file or directory: the others are restored all the same."""

_SPLIT: Final = re.compile(r":(?=/|\\|[A-Za-z]:(?:[/\\]|\Z))")
_DRIVE: Final = re.compile(rb"[A-Za-z]:")
_WILD: Final = re.compile(rb"[*?\[]")


def split(word: str) -> list[tuple[str, bytes]]:
    """``POINT:/path`` as point and path: the colon is one before a slash or a drive, which no time has.

    The first is the likeliest, but names of VMs may hold anything. Empty if there is no such colon.
    """
    return [(word[: match.start()], os.fsencode(word[match.end() :])) for match in _SPLIT.finditer(word)]


class Wanted(NamedTuple):
    """A path that was asked for, component by component; ``**`` is None."""

    text: bytes
    parts: tuple[_Part | None, ...]
    follows: bool
    """A symlink at its end stands for what it leads to: the path ends with a slash."""


class _Part:
    """One component."""

    __slots__ = ("_folded", "_folded_pattern", "_name", "_pattern", "literal")

    def __init__(self, name: bytes) -> None:
        text = os.fsdecode(name)
        self._name = name
        self._pattern = Pattern(text)
        self._folded = text.casefold()
        self._folded_pattern = Pattern(text, ignore_case=True)
        self.literal = None if _WILD.search(name) else name

    def matches(self, name: bytes, *, ignore_case: bool) -> bool:
        if name == self._name or self._pattern.may_match(name):
            return True
        return ignore_case and (os.fsdecode(name).casefold() == self._folded or self._folded_pattern.may_match(name))


def wanted(text: bytes, *, windows: bool) -> Wanted:
    r"""A path taken apart; ``windows``: ``\`` is a slash. Raises UsageError."""
    path = text.replace(b"\\", b"/") if windows else text
    if b"\0" in path:
        raise UsageError("a path can not hold a NUL byte")
    names = [name for name in path.split(b"/") if name not in (b"", b".")]
    if b".." in names:
        raise UsageError(f"{os.fsdecode(text)!r} has '..' in it", hint="write the path without it")
    if len(names) > COMPONENTS_MAX:
        raise UsageError(f"the path has {len(names)} components; at most {COMPONENTS_MAX} are taken")
    parts: list[_Part | None] = []
    for number, name in enumerate(names):
        if name == b"**" and number + 1 < len(names):
            if not parts or parts[-1] is not None:
                parts.append(None)
        else:
            parts.append(_Part(b"*" if name == b"**" else name))
    return Wanted(text, tuple(parts) or (_Part(b"*"),), path.endswith(b"/") and bool(parts))


def without_drive(text: bytes) -> bytes:
    """A path on one volume of Windows without the drive before it."""
    names = text.replace(b"\\", b"/").lstrip(b"/").split(b"/", 1)
    return b"/" + (names[1] if len(names) > 1 else b"") if _DRIVE.fullmatch(names[0]) else text


def expand(
    view: View, path: Wanted, failed: Callable[[bytes, XbfsError], None], *, ignore_case: bool = False
) -> Iterator[Item]:
    """What matches; what is below a match is not looked at. The topmost directory is never one: for it stands what it
    holds. ``ignore_case``: in directories of Windows' filesystems. ``failed`` is told what can not be searched. Raises
    what is no matter of single files.
    """
    search = _Search(view, path.parts, failed, ignore_case=ignore_case)
    stack = [search.below(view.top, search.closed({0}))]
    while stack:
        found = next(stack[-1], None)
        if found is None:
            stack.pop()
            continue
        item, states = found
        if len(path.parts) in states:
            target = search.directory(item) if path.follows else item
            if target is not None:
                yield target._replace(name=item.name)
        elif len(stack) >= DEPTH_MAX:
            failed(item.path, GuestUnsupported(f"it lies deeper than {DEPTH_MAX} directories"))
        elif item.lies_in_itself():
            failed(item.path, GuestDamaged("the directory lies in itself"))
        else:
            stack.append(search.below(item, states))


class _Search:
    """The states of a search are the components that may be next; one that is their number: nothing is left."""

    def __init__(
        self,
        view: View,
        parts: tuple[_Part | None, ...],
        failed: Callable[[bytes, XbfsError], None],
        *,
        ignore_case: bool,
    ) -> None:
        self._view = view
        self._parts = parts
        self._failed = failed
        self._ignore_case = ignore_case

    def below(self, directory: Item, states: set[int]) -> Iterator[tuple[Item, set[int]]]:
        """What in a directory matches, or may have matches below it, with the states there."""
        ignore_case = self._ignore_case and self._view.is_ownerless(directory.volume)
        walked = {state for state in states if self._parts[state] is None}
        named = [(state, part) for state in states if (part := self._parts[state]) is not None]
        only = named[0][1].literal if not walked and len(named) == 1 else None
        try:
            for item in self._candidates(directory, only, ignore_case=ignore_case):
                matched = {state + 1 for state, part in named if part.matches(item.name, ignore_case=ignore_case)}
                if len(self._parts) in matched:
                    yield item, matched
                elif item.kind is Kind.DIRECTORY and (walked or matched):
                    yield item, self.closed(walked | matched)
                elif item.kind is Kind.SYMLINK and matched and (target := self.directory(item)) is not None:
                    yield target, self.closed(matched)
        except UNREADABLE as exc:
            self._failed(directory.path, exc)

    def directory(self, item: Item) -> Item | None:
        """A directory, also one that a symlink leads to."""
        try:
            target = self._view.followed(item) if item.kind is Kind.SYMLINK else item
        except UNREADABLE as exc:
            self._failed(item.path, exc)
            return None
        return target if target is not None and target.kind is Kind.DIRECTORY else None

    def closed(self, states: set[int]) -> set[int]:
        """With what is reached by letting ``**`` stand for nothing; no two of them are neighbours."""
        more = {state + 1 for state in states if state < len(self._parts) and self._parts[state] is None}
        return states | more

    def _candidates(self, directory: Item, only: bytes | None, *, ignore_case: bool) -> Iterator[Item]:
        """All entries, or the one that must have the name ``only``."""
        if only is not None:
            item = self._view.lookup(directory, only)
            if item is not None:
                yield item
            if item is not None or not ignore_case:
                return
        yield from self._view.entries(directory)
