"""Guests read in this process, for tests of what is around them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from xbfs_engine.guestfs.reading import GuestReading

if TYPE_CHECKING:
    from collections.abc import Sequence

    from xbfs_engine.guestfs.volumes.records import Disk, VolumeKey


class GuestHere(GuestReading):
    def __init__(self, disks: Sequence[Disk], keys: Sequence[VolumeKey] = ()) -> None:
        super().__init__(disks, keys)
        self.closed = False
        self.confinement = None

    def give_keys(self, keys: Sequence[VolumeKey]) -> None:
        with self._lock:
            self._keys = keys
            self._rows = self._tree = None
            self._opened.clear()

    def close(self) -> None:
        self.closed = True


class GuestsHere:
    def __init__(self) -> None:
        self.opened: list[GuestHere] = []

    def open(self, name: str, disks: Sequence[Disk], keys: Sequence[VolumeKey] = ()) -> GuestHere:
        self.opened.append(GuestHere(disks, keys))
        return self.opened[-1]

    def close(self) -> None:
        pass

    @property
    def live(self) -> int:
        return 0
