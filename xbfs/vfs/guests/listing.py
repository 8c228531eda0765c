"""Open directories of guests, listed as far as the kernel reads on. For the event loop's thread.

The offset behind an entry is the reader's own cookie, so a listing goes on anywhere, at any opening, from the offset
alone. One page is kept, and the next one is fetched while the kernel takes this one: the reader is another process.
"""

from __future__ import annotations

from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol

import trio

from xbfs.vfs.guests.places import Top, View
from xbfs_engine.core.errors import XbfsError
from xbfs_engine.guestfs.base import Kind

if TYPE_CHECKING:
    from collections.abc import Iterator

    from xbfs.vfs.guests.attributes import GuestAttributes
    from xbfs.vfs.guests.places import Directory, Node, VolumeText
    from xbfs.vfs.guests.point import Seen
    from xbfs.vfs.guests.views import GuestViews

_MORE: Final = 1 << 62
"""Offsets of what no directory of a volume holds. Readers count entries or bytes: they do not get there."""


class Listed(NamedTuple):
    """A name in a directory, and the offset behind it."""

    name: bytes
    place: VolumeText | Node
    attributes: GuestAttributes
    next_offset: int


class Listing(Protocol):
    """An open directory."""

    async def after(self, offset: int) -> Iterator[Listed]:
        """Some entries behind an offset, none at the end. Raises what the guest raises."""
        ...


class FilesListing:
    """`files/`."""

    def __init__(self, views: GuestViews, top: Top) -> None:
        self._views = views
        self._top = top

    async def after(self, offset: int) -> Iterator[Listed]:
        """Volumes, then their texts. Opens none of them: their attributes are asked for one by one."""
        guest = self._top.guest
        names = await self._views.ask(self._top, guest.names)
        rows = [(name, row, False) for name, row in names.directories.items()]
        rows += [(name, row, True) for name, row in names.texts.items()]

        def listed() -> Iterator[Listed]:
            for number, (name, row, is_text) in enumerate(rows[offset:], offset + 1):
                place = self._views.in_files(guest, row.name, name, self._top, is_text=is_text)
                yield Listed(name, place, self._views.guess(place), number)

        return listed()


class _Page(NamedTuple):
    """Entries behind an offset."""

    offset: int
    seen: list[Seen]
    is_last: bool


class _Ahead:
    """A page that is being fetched; still None when it is ``there``: it could not be."""

    def __init__(self, offset: int) -> None:
        self.offset = offset
        self.asked = trio.Event()
        self.there = trio.Event()
        self.page: _Page | None = None


class GuestListing:
    """A directory of a volume, or `root/`."""

    def __init__(self, views: GuestViews, directory: Directory) -> None:
        self._views = views
        self._directory = directory
        self._above = views.above(directory)
        self._page = _Page(-1, [], is_last=False)
        self._numbers: dict[int, int] = {}
        self._ahead: _Ahead | None = None

    async def after(self, offset: int) -> Iterator[Listed]:
        """Entries of one page."""
        number = self._numbers.get(offset)
        if number is None or (number == len(self._page.seen) and not self._page.is_last):
            number = 0
            page = self._page = await self._taken(offset) or await self._fetched(offset)
            self._numbers = {seen.cookie: count for count, seen in enumerate(page.seen, 1)} | {offset: 0}
            if page.seen and not page.is_last:
                ahead = self._ahead = _Ahead(page.seen[-1].cookie)
                trio.lowlevel.spawn_system_task(self._fetch_ahead, ahead)
                await ahead.asked.wait()  # else it would be asked when the kernel has taken this page
        return self._listed(number)

    async def _taken(self, offset: int) -> _Page | None:
        """The page that was fetched ahead, if it is this one and there was no problem."""
        ahead, self._ahead = self._ahead, None
        if ahead is None or ahead.offset != offset:
            return None
        await ahead.there.wait()
        return ahead.page

    async def _fetch_ahead(self, ahead: _Ahead) -> None:
        ahead.asked.set()  # wakes whoever waits when this task waits itself: for the answer
        # Whoever reads on asks again, and is told what is wrong.
        with suppress(XbfsError):
            ahead.page = await self._fetched(ahead.offset)
        ahead.there.set()

    async def _fetched(self, offset: int) -> _Page:
        return await self._views.ask(self._directory, partial(self._fetch, offset))

    def _listed(self, number: int) -> Iterator[Listed]:
        for seen in self._page.seen[number:]:
            if seen.kind is Kind.DIRECTORY and (seen.volume, seen.node) in self._above:
                seen = seen._replace(stat=None)  # it lies in itself: whoever looks closer is told
            place, attributes = self._views.seen(self._directory, seen)
            yield Listed(seen.name, place, attributes, seen.cookie)

    def _fetch(self, offset: int) -> _Page:
        directory = self._directory
        guest = directory.guest
        view = directory.view if isinstance(directory, Top) else directory.volume.view
        here = guest.here(directory) if offset < _MORE else None
        page: list[Seen] = []
        is_last = True
        if here is not None:
            page, is_last = guest.page(view, here, offset)
        if is_last and isinstance(directory, Top) and view is View.ROOT:
            first = max(offset - _MORE, 0)
            page += [seen._replace(cookie=_MORE + n) for n, seen in enumerate(guest.more()[first:], first + 1)]
        return _Page(offset, page, is_last)
