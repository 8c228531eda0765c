"""Where guests come from: the seam between this mount and the processes that read guests."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from xbfs_engine.guestfs.guest import Guest

if TYPE_CHECKING:
    from collections.abc import Sequence

    from xbfs_engine.guestfs.volumes.records import Disk, VolumeKey
    from xbfs_engine.guestfs.worker.confine import Confinement


class KeyedGuest(Guest, Protocol):
    """A guest that takes keys of encrypted volumes later on."""

    @property
    def confinement(self) -> Confinement | None:
        """What its reader is confined by; None before it was started."""
        ...

    def give_keys(self, keys: Sequence[VolumeKey]) -> None:
        """Replace the keys; what was found before is forgotten."""
        ...

    def close(self) -> None:
        """It is not asked any more."""
        ...


class Guests(Protocol):
    """Opens guests: ``xbfs_engine.guestfs.worker.client.GuestWorkers``."""

    def open(self, name: str, disks: Sequence[Disk], keys: Sequence[VolumeKey] = ()) -> KeyedGuest:
        """The guest on disks; ``name`` is for people. Starts and reads nothing yet."""
        ...

    def close(self) -> None:
        """End all of them."""
        ...

    @property
    def live(self) -> int:
        """Processes there are now."""
        ...
