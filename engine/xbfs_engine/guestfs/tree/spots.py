"""Paths of a guest while its tree is being put together: links and mounts are followed inside it, within bounds.

Owns no knowledge of any table. One thread at a time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NamedTuple

from xbfs_engine.core.errors import GuestUnsupported, XbfsError
from xbfs_engine.guestfs.base import READ_BYTES_MAX, Kind, NodeId
from xbfs_engine.guestfs.tree.fstab import components

if TYPE_CHECKING:
    from collections.abc import Iterator

    from xbfs_engine.guestfs.guest import Guest, Listed

_LINKS_MAX: Final = 40
"""Links in one path (Linux: MAXSYMLINKS)."""

_STEPS_MAX: Final = 512
"""Names that are looked up for one path."""

_WORDS_MAX: Final = 200


class Spot(NamedTuple):
    """A directory or file of one volume."""

    volume: str
    node: NodeId


@dataclass(frozen=True, slots=True, eq=False)
class Step:
    """A spot and the directories of its volume that it is known to lie in."""

    spot: Spot
    above: Step | None = None

    def lineage(self) -> Iterator[Spot]:
        """It, and what it lies in."""
        step: Step | None = self
        while step is not None:
            yield step.spot
            step = step.above


class Place(NamedTuple):
    """What a path leads to."""

    path: bytes
    """Without links."""
    step: Step
    kind: Kind


class Space:
    """The tree of a guest as far as it is put together."""

    def __init__(self, guest: Guest, top: Step) -> None:
        self.guest = guest
        self._top = top
        self._over: dict[Spot, Step] = {}
        self._more: dict[bytes, Step] = {}

    def cover(self, spot: Spot, step: Step) -> None:
        """Show another directory in place of the one at ``spot``."""
        self._over[spot] = step

    def add(self, name: bytes, step: Step) -> None:
        """Show a directory in the topmost one, which has none of that name."""
        self._more[name] = step

    def is_covered(self, spot: Spot) -> bool:
        """Whether another directory is shown there."""
        return spot in self._over

    def find(self, path: bytes) -> Place | None:
        """What a path leads to, None if to nothing. Links never lead out of the topmost directory.

        GuestUnsupported: too many links or names. Else what the guest raises.
        """
        stack = [(b"", self._top)]
        kind = Kind.DIRECTORY
        waiting = components(path)[::-1]
        links = steps = 0
        while waiting:
            name = waiting.pop()
            if kind is not Kind.DIRECTORY:
                return None
            if name == b"..":
                del stack[max(1, len(stack) - 1) :]
                continue
            steps += 1
            if steps > _STEPS_MAX:
                raise GuestUnsupported(f"its path has more than {_STEPS_MAX} names")
            here = stack[-1][1]
            listed = self.guest.lookup(here.spot.volume, here.spot.node, name)
            if listed is None:
                more = self._more.get(name) if len(stack) == 1 else None
                if more is None:
                    return None
                stack.append((name, more))
                continue
            kind = kind_of(listed)
            if kind is Kind.SYMLINK:
                links += 1
                if links > _LINKS_MAX:
                    raise GuestUnsupported(f"its path has more than {_LINKS_MAX} links")
                target = self.guest.readlink(here.spot.volume, listed.entry.node)
                if target.startswith(b"/"):
                    del stack[1:]
                waiting += components(target)[::-1]
                kind = Kind.DIRECTORY
                continue
            step = Step(Spot(here.spot.volume, listed.entry.node), here)
            stack.append((name, self._over.get(step.spot, step)))
        return Place(b"/" + b"/".join(name for name, _ in stack[1:]), stack[-1][1], kind)

    def read(self, path: bytes, bytes_max: int) -> bytes | None:
        """A file's content, None if there is no such file. GuestUnsupported: it is longer than ``bytes_max``."""
        place = self.find(path)
        if place is None:
            return None
        volume, node = place.step.spot
        stat = self.guest.stat(volume, node)
        if stat.kind is not Kind.FILE:
            return None
        size = stat.size_bytes
        if size > bytes_max:
            raise GuestUnsupported(f"it has {size} bytes; more than {bytes_max} are not read")
        pieces = range(0, size, READ_BYTES_MAX)
        return b"".join(self.guest.read(volume, node, at, min(READ_BYTES_MAX, size - at)) for at in pieces)


def entries(guest: Guest, spot: Spot, count_max: int) -> Iterator[Listed]:
    """The first ``count_max`` entries of a directory."""
    cookie = 0
    while count_max > 0:
        page = guest.list(*spot, cookie)
        yield from page.entries[:count_max]
        count_max -= len(page.entries)
        if page.is_last or not page.entries:
            return
        cookie = page.entries[-1].entry.cookie


def kind_of(listed: Listed) -> Kind:
    """The kind of an entry, from its metadata where the directory does not tell."""
    if listed.entry.kind is Kind.UNKNOWN and listed.stat is not None:
        return listed.stat.kind
    return listed.entry.kind


def words(raw: bytes | str) -> str:
    """A name of a guest as part of a sentence: one line, no control characters, not too long."""
    text = raw.decode("utf-8", "backslashreplace") if isinstance(raw, bytes) else raw
    shown = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text[:_WORDS_MAX])
    return shown if len(text) <= _WORDS_MAX else shown + "…"


def passable(error: XbfsError) -> str:
    """The error in words, unless trying again may help: then it is no property of the guest, and raised."""
    if error.retryable:
        raise error
    return words(error.message)
