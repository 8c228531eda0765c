"""An open file of a guest. Any thread may read.

No content is kept or read ahead here: the kernel does that with files, and the disk below is read ahead by itself.
One page of the map of data and holes is kept, as copies ask for one place after the other.
"""

from __future__ import annotations

from bisect import bisect_right
from functools import partial
from operator import itemgetter
from typing import TYPE_CHECKING, Final

from xbfs.view.base import joined
from xbfs_engine.core.errors import GuestDamaged, XbfsError
from xbfs_engine.guestfs.base import READ_BYTES_MAX
from xbfs_engine.guestfs.guest import ExtentPage

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from xbfs.vfs.guests.point import PointGuest, Spot
    from xbfs.vfs.pool import ReadPool
    from xbfs.view.base import Part

_START: Final = itemgetter(0)


class GuestFile:
    """An open file: ``handles.OpenFile``."""

    __slots__ = ("_guest", "_page", "_pool", "_spot", "failed", "seek_waits", "timeout_s")

    def __init__(
        self,
        guest: PointGuest,
        spot: Spot,
        pool: ReadPool,
        *,
        timeout_s: float,
        failed: Callable[[int, int, XbfsError], None],
    ) -> None:
        self._guest = guest
        self._spot = spot
        self._pool = pool
        # Replaced as a whole: threads may seek at once.
        self._page = ExtentPage((), is_last=False)
        self.timeout_s = timeout_s
        self.failed = failed
        self.seek_waits = True

    def read_cached(self, offset: int, size: int) -> bytes | None:
        """Nothing: this process has none of it."""
        return None

    def parts_cached(self, offset: int, size: int) -> Sequence[Part] | None:
        """Nothing: this process has none of it."""
        return None

    def parts_now(self, offset: int, size: int) -> Sequence[Part]:
        """The bytes of [offset, offset+size), clipped at the end. Blocks. Raises what the guest raises, Parked."""
        return self._guest.door.through(partial(self._parts, offset, size))

    def seek(self, offset: int, *, data: bool) -> int | None:
        """Where data, or else a hole, begins at or behind ``offset``; None at the end or where no more data is.

        Blocks. Raises what the guest raises, Parked.
        """
        return self._guest.door.through(partial(self._sought, offset, data=data))

    async def read(self, offset: int, size: int) -> bytes:
        """``parts_now`` from a thread."""
        try:
            return joined(await self._pool.run(partial(self.parts_now, offset, size), self.timeout_s) or [b""])
        except XbfsError as exc:
            self.failed(offset, size, exc)
            raise

    def _parts(self, offset: int, size: int) -> list[bytes]:
        parts: list[bytes] = []
        while size > 0:
            wanted = min(size, READ_BYTES_MAX)
            part = self._guest.guest.read(*self._spot, offset, wanted)
            parts.append(part)
            if len(part) < wanted:
                break
            offset += wanted
            size -= wanted
        return parts

    def _sought(self, offset: int, *, data: bool) -> int | None:
        at = offset
        while True:
            page = self._page_at(at)
            for extent in page.extents[max(bisect_right(page.extents, at, key=_START) - 1, 0) :]:
                end = extent.offset + extent.length
                if end > at and extent.is_data is data:
                    return max(at, extent.offset)
                at = max(at, end)
            if page.is_last:
                # The end of the file counts as a hole, for whoever asks from within the file.
                return None if data or offset >= at else at

    def _page_at(self, offset: int) -> ExtentPage:
        """The part of the map that has ``offset``, or the last one if that is beyond the end."""
        page = self._page
        if page.extents and page.extents[0].offset <= offset:
            last = page.extents[-1]
            if page.is_last or offset < last.offset + last.length:
                return page
        page = self._guest.guest.extents(*self._spot, offset)
        if page.extents or offset == 0:
            self._page = page
        if not page.extents and not page.is_last:
            raise GuestDamaged("the map of the file ends before the file does")
        return page
