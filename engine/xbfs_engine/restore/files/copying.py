"""What becomes of each file of a restore: it is read in this thread and written in the `Feed`'s.

Memory: what waits in the feed, one file of up to SMALL_BYTES, and LINKS_MAX files whose other names were not met yet.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Final

from xbfs_engine.core.errors import TargetExists, XbfsError
from xbfs_engine.core.limits import MIB
from xbfs_engine.guestfs.base import FileExtent, Kind
from xbfs_engine.restore.files.feed import Feed
from xbfs_engine.restore.files.paths import UNREADABLE
from xbfs_engine.restore.files.records import Place

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from xbfs_engine.guestfs.base import NodeStat
    from xbfs_engine.restore.files.reading import Reader
    from xbfs_engine.restore.files.records import Account, Made, Meta, Target, Writing
    from xbfs_engine.restore.files.view import Item

SMALL_BYTES: Final = 1 * MIB
"""Files up to this are read as a whole before anything of them is written."""
LINKS_MAX: Final = 250_000
"""Files that have names which were not met yet, at some 300 bytes each. Beyond them hardlinks become files."""
EXTENTS_MAX: Final = 65_536
"""Of one file, where they are needed all at once; a file that has more is written with zeros for its holes."""


@dataclass(slots=True)
class Linked:
    """A file with several names. ``made`` is set by the thread that writes."""

    is_first: bool
    left: int
    made: Made | None = None


class Links:
    """The files with several names of one guest, until all of them were met."""

    def __init__(self, account: Account) -> None:
        self._account = account
        self._links: dict[tuple[str, bytes], Linked] = {}

    def meet(self, item: Item, stat: NodeStat) -> Linked | None:
        """The file under one of its names; None if it has only this one."""
        if stat.nlink < 2:
            return None
        linked = self._links.get(item.spot)
        if linked is None:
            if len(self._links) >= LINKS_MAX:
                self._account.lose(f"hardlinks of more than {LINKS_MAX} files at once, now separate files", item.path)
                return None
            linked = self._links[item.spot] = Linked(True, stat.nlink)
        else:
            linked.is_first = False
        linked.left -= 1
        if linked.left <= 0:
            del self._links[item.spot]
        return linked


class Copy:
    """A restore in progress. ``stop`` must be called at its end, however it ends."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self._account = target.account
        self._feed = Feed(self._account, target.fatal)
        self._transfer: _Transfer | None = None
        self._open: set[Place] = set()
        self.place = target.top

    def enter(self, item: Item, reader: Reader) -> None:
        """A directory: what comes next is in it, unless its place is refused."""
        place = Place(self.place.of(item.name), self.place)
        place.refused = self.place.refused
        self.place = place
        if place.refused:
            return
        try:
            item, stat = reader.known(item)
            place.meta = reader.meta(item, stat)
        except UNREADABLE as exc:
            self._account.fail(item.path, exc)
            place.refused = True
        else:
            self._feed.put(item.path, partial(self._do_enter, place))

    def leave(self) -> None:
        """The end of the directory that was entered last."""
        place = self.place
        assert place.above is not None
        self.place = place.above
        if place.meta is not None:
            self._feed.put(place.meta.path, partial(self._do_leave, place))

    def one(self, item: Item, reader: Reader, links: Links) -> None:
        """Anything else."""
        try:
            item, stat = reader.known(item)
            if stat.kind is Kind.SOCKET:
                self._account.totals.sockets_skipped += 1
                return
            linked = links.meet(item, stat)
            if linked is not None and not linked.is_first and self._is_linked(item, stat, reader, linked):
                return
            meta = reader.meta(item, stat)
            if stat.kind is Kind.FILE:
                self._file(item, stat, reader, _Transfer(self._target, self.place, item, meta, linked))
            else:
                target = reader.target(item) if stat.kind is Kind.SYMLINK else b""
                self._feed.put(item.path, partial(self._do_node, self.place, item.name, meta, target, linked))
        except UNREADABLE as exc:
            self._account.fail(item.path, exc)

    def finish(self) -> None:
        """Wait until all is written. Raises what ended it."""
        self._feed.put(b"/", self._target.finish)
        self._feed.drain()

    def stop(self) -> None:
        """End the thread, and leave nothing open. Never raises."""
        if not self._feed.close():
            return
        if self._transfer is not None:
            with suppress(XbfsError):
                self._transfer.give_up()
        for place in self._open:
            place.close()

    def _file(self, item: Item, stat: NodeStat, reader: Reader, transfer: _Transfer) -> None:
        extents: Iterator[FileExtent] = reader.extents(item, stat)
        if stat.size_bytes <= SMALL_BYTES:
            known = list(extents)
            pieces = [piece for extent in known if extent.is_data for piece in reader.pieces(item, extent)]
            self._feed.put(item.path, partial(transfer.whole, known, pieces), sum(len(data) for _, data in pieces))
            return
        listed: list[FileExtent] = []
        if self._target.wants_extents:
            listed = list(islice(extents, EXTENTS_MAX + 1))
            if len(listed) > EXTENTS_MAX:
                self._account.lose(f"holes of files with more than {EXTENTS_MAX} extents, now zeros", item.path)
                listed = [FileExtent(0, stat.size_bytes, is_data=True)]
            extents = iter(listed)
        self._transfer = transfer
        self._feed.put(item.path, partial(transfer.begin, listed))
        try:
            for extent in extents:
                for offset, data in reader.pieces(item, extent) if extent.is_data else ():
                    if transfer.failed:
                        return
                    self._feed.put(item.path, partial(transfer.write, offset, data), len(data))
        except UNREADABLE as exc:
            self._account.fail(item.path, exc)
            self._feed.put(item.path, transfer.give_up)
        else:
            self._feed.put(item.path, transfer.finish)

    def _is_linked(self, item: Item, stat: NodeStat, reader: Reader, linked: Linked) -> bool:
        """Make one more name of what was restored before; False if nothing was, or the target can not do it."""
        self._feed.drain()
        first = linked.made
        if first is None:
            return False
        meta = reader.meta(item, stat, with_xattrs=False)
        done: list[bool] = []
        self._feed.put(item.path, partial(self._do_link, self.place, item.name, meta, first, done))
        self._feed.drain()
        if not done:
            self._account.lose("hardlinks, which the target refuses: now separate files", item.path)
            linked.made = None
        return bool(done)

    def _do_enter(self, place: Place) -> None:
        assert place.above is not None
        # The thread that reads looks at ``refused`` at any time: it must not be true for a moment.
        if place.above.refused:
            place.refused = True
            return
        try:
            self._open.add(place)
            self._target.enter(place)
        except BaseException:
            place.refused = True
            raise

    def _do_leave(self, place: Place) -> None:
        if not place.refused:
            try:
                self._target.leave(place)
            finally:
                place.close()
                self._open.discard(place)
            self._account.totals.directories += 1

    def _do_link(self, above: Place, name: bytes, meta: Meta, first: Made, done: list[bool]) -> None:
        try:
            if not above.refused:
                self._target.link(above, name, meta, first)
                self._account.totals.hardlinks += 1
            done.append(True)
        except TargetExists:
            done.append(True)
            raise
        except XbfsError as exc:
            if isinstance(exc, self._target.fatal):
                raise

    def _do_node(self, above: Place, name: bytes, meta: Meta, target: bytes, linked: Linked | None) -> None:
        made = None if above.refused else self._target.node(above, name, meta, target)
        if made is None:
            return
        if linked is not None:
            linked.made = made
        if meta.kind is Kind.SYMLINK:
            self._account.totals.symlinks += 1
        else:
            self._account.totals.specials += 1


class _Transfer:
    """A file on its way. All but ``failed`` is for the thread that writes."""

    def __init__(self, target: Target, above: Place, item: Item, meta: Meta, linked: Linked | None) -> None:
        self._target = target
        self._totals = target.account.totals
        self._above = above
        self._name = item.name
        self._meta = meta
        self._linked = linked
        self._writing: Writing | None = None
        self.failed = False

    def whole(self, extents: Sequence[FileExtent], pieces: Sequence[tuple[int, bytes]]) -> None:
        """All of a small file."""
        self.begin(extents)
        for offset, data in pieces:
            self.write(offset, data)
        self.finish()

    def begin(self, extents: Sequence[FileExtent]) -> None:
        """``extents``: all, or none."""
        if self._above.refused:
            self.failed = True
            return
        has_holes = any(not extent.is_data for extent in extents)
        try:
            self._writing = self._target.create(self._above, self._name, self._meta, extents if has_holes else None)
        except BaseException:
            self.failed = True
            raise

    def write(self, offset: int, data: bytes) -> None:
        """The next piece."""
        if self._writing is not None:
            try:
                self._writing.write(offset, data)
            except BaseException:
                with suppress(XbfsError):
                    self.give_up()
                raise
            self._totals.content_bytes += len(data)

    def finish(self) -> None:
        """It is complete."""
        if self._writing is None:
            return
        try:
            made = self._writing.commit()
        except BaseException:
            with suppress(XbfsError):
                self.give_up()
            raise
        self._writing = None
        if self._linked is not None:
            self._linked.made = made
        self._totals.files += 1
        self._totals.size_bytes += self._meta.size_bytes

    def give_up(self) -> None:
        """It can not be completed."""
        self.failed = True
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.abandon()
