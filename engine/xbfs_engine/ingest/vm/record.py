"""The record of a VM that goes into its restore point. Owns where it is taken from, not what is in it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from xbfs_engine.source.xapi.http import export_metadata

if TYPE_CHECKING:
    from xbfs_engine.codec.wire import Value
    from xbfs_engine.source.xapi.session import Pool
    from xbfs_engine.source.xapi.values import Ref


class PoolRecorder:
    """Takes it from the pool: see ``ports.Recorder``."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    async def capture(self, vm_ref: Ref, snapshot_ref: Ref) -> dict[str, Value]:
        """The snapshot's metadata archive. Raises PoolError."""
        del vm_ref
        return {"archive": await export_metadata(self._pool, snapshot_ref)}
