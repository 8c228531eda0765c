"""What a cycle needs of its surroundings: the record of a VM, and somebody who listens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from xbfs_engine.codec.wire import Value
    from xbfs_engine.core.errors import XbfsError
    from xbfs_engine.ingest.statistics import Progress
    from xbfs_engine.source.xapi.values import Ref


class Recorder(Protocol):
    """Captures what one needs to make the VM again."""

    async def capture(self, vm_ref: Ref, snapshot_ref: Ref) -> dict[str, Value]:
        """The record of a VM as its snapshot holds it. Raises PoolError."""
        ...


class Listener(Protocol):
    """Hears how a run goes. Called in the event loop; must not block."""

    def step(self, vm_name: str, what: str) -> None:
        """The VM's next step, in words."""
        ...

    def progress(self, vm_name: str, now: Progress) -> None:
        """About five times a second while disks are read."""
        ...

    def failed(self, vm_name: str, error: XbfsError) -> None:
        """The VM has no new point; others go on."""
        ...
