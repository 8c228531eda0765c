"""An open file of a guest. Any thread may read.

Nothing is kept or read ahead here: the kernel does that with files, and the disk below is read ahead by itself.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from xbfs.view.base import joined
from xbfs_engine.core.errors import XbfsError
from xbfs_engine.guestfs.base import READ_BYTES_MAX

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from xbfs.vfs.guests.point import PointGuest, Spot
    from xbfs.vfs.pool import ReadPool
    from xbfs.view.base import Part


class GuestFile:
    """An open file: ``handles.OpenFile``."""

    __slots__ = ("_guest", "_pool", "_spot", "failed", "seek_waits", "timeout_s")

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
        size = self._guest.guest.stat(*self._spot).size_bytes
        if offset >= size:
            return None
        at = offset
        while at < size:
            page = self._guest.guest.extents(*self._spot, at)
            for extent in page.extents:
                end = extent.offset + extent.length
                if end > at and extent.is_data is data:
                    return max(at, extent.offset)
                at = max(at, end)
            if page.is_last or not page.extents:
                break
        return None if data else size
