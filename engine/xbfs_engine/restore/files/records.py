"""What passes between those who read a guest's files and those who write them, and what a restore tells. No work."""

from __future__ import annotations

import os
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence

    from xbfs_engine.codec.wire import Value
    from xbfs_engine.core.errors import XbfsError
    from xbfs_engine.guestfs.base import FileExtent, Kind, Xattr

_LOSSES_MAX: Final = 64


class Meta(NamedTuple):
    """What is to be restored of a file beside its content. Times are ns since 1970."""

    path: bytes
    """In the guest, for messages."""
    kind: Kind
    mode: int
    owner: tuple[int, int] | None
    """Numbers of user and group; None if its filesystem knows none."""
    size_bytes: int
    mtime_ns: int
    atime_ns: int
    device: tuple[int, int]
    xattrs: Sequence[Xattr]


class Made(NamedTuple):
    """A file of the target that can be linked to."""

    path: bytes
    """In the target: relative to its topmost directory."""
    identity: tuple[int, int]
    """Device and inode; zeros in an archive."""


class Place:
    """A directory of the target that is being filled."""

    __slots__ = ("above", "claimed", "fd", "inherits_acl", "meta", "path", "refused")

    def __init__(self, path: bytes = b"", above: Place | None = None, meta: Meta | None = None) -> None:
        self.path = path
        """In the target: relative, empty for the topmost one."""
        self.above = above
        self.meta = meta
        """None for the topmost one, which stays as it is."""
        self.refused = False
        """It could not be made, so nothing goes into it."""
        self.fd = -1
        self.claimed: set[str] = set()
        """Names that were restored, without case; only where the target knows no case."""
        self.inherits_acl = False
        """What is made in it gets an ACL of the target's, which must go."""

    def of(self, name: bytes) -> bytes:
        """The path of what is in it."""
        return self.path + b"/" + name if self.path else name

    def close(self) -> None:
        """Give back its descriptor."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


class Writing(Protocol):
    """A file that is being written. It appears with ``commit``; without it nothing of it stays."""

    def write(self, offset: int, data: bytes) -> None:
        """The next piece; offsets ascend, and what is left out is a hole."""
        ...

    def commit(self) -> Made:
        """It is complete."""
        ...

    def abandon(self) -> None:
        """It will not be. Raises if what was written can not be taken back."""
        ...


class Target(Protocol):
    """Where files go. One thread at a time; every method raises only XbfsError."""

    @property
    def top(self) -> Place:
        """The directory that all goes into."""
        ...

    @property
    def account(self) -> Account:
        """The account of the restore that it is for."""
        ...

    @property
    def fatal(self) -> tuple[type[XbfsError], ...]:
        """Errors after which nothing more can be written."""
        ...

    @property
    def wants_extents(self) -> bool:
        """Whether all extents of a file must be known when it is begun."""
        ...

    def enter(self, place: Place) -> None:
        """Make the directory ``place``, whose place above was entered."""
        ...

    def leave(self, place: Place) -> None:
        """All that belongs into it is there."""
        ...

    def create(self, above: Place, name: bytes, meta: Meta, extents: Sequence[FileExtent] | None) -> Writing:
        """Begin a file. ``extents``: all of it, if it has holes and the target wants to know."""
        ...

    def link(self, above: Place, name: bytes, meta: Meta, first: Made) -> None:
        """One more name of a file. Raises TargetExists; another error means that there can be no link."""
        ...

    def node(self, above: Place, name: bytes, meta: Meta, target: bytes) -> Made | None:
        """A symlink (to ``target``), FIFO or device; None if it was left out, which has been told as a loss."""
        ...

    def finish(self) -> None:
        """All has been given."""
        ...


@dataclass(slots=True)
class Loss:
    """Something that the target could not hold."""

    count: int
    path: bytes
    """The first file it concerned, as the guest shows it."""


@dataclass(slots=True)
class Totals:
    """What was restored. ``size_bytes`` is the sum of sizes, ``content_bytes`` what of it was no hole."""

    files: int = 0
    directories: int = 0
    symlinks: int = 0
    hardlinks: int = 0
    specials: int = 0
    sockets_skipped: int = 0
    failed: int = 0
    size_bytes: int = 0
    content_bytes: int = 0

    @property
    def entries(self) -> int:
        """All that was restored."""
        return self.files + self.directories + self.symlinks + self.hardlinks + self.specials

    def to_record(self) -> dict[str, Value]:
        """For --json."""
        return {name: getattr(self, name) for name in self.__slots__}


@dataclass(slots=True)
class Account:
    """The account of one restore. Two threads keep it: each total and each kind of loss is told by one of them."""

    totals: Totals = field(default_factory=Totals)
    losses: dict[str, Loss] = field(default_factory=dict)
    failures: deque[tuple[bytes, XbfsError]] = field(default_factory=deque)
    """Those that were not told yet."""

    def lose(self, what: str, path: bytes) -> None:
        """The target does not hold ``what`` of a file."""
        loss = self.losses.get(what)
        if loss is not None:
            loss.count += 1
        elif len(self.losses) < _LOSSES_MAX:
            self.losses[what] = Loss(1, path)

    def fail(self, path: bytes, error: XbfsError) -> None:
        """A file or directory was not restored as it should be."""
        self.failures.append((path, error))
