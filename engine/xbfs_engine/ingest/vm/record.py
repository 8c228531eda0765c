"""The record of a VM that goes into its restore point. Owns where it is taken from; what it is: ``vm_record``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from xbfs_engine.source.xapi.http import export_metadata
from xbfs_engine.source.xapi.vm_record import capture_vm

if TYPE_CHECKING:
    from xbfs_engine.codec.wire import Value
    from xbfs_engine.source.xapi.session import Pool
    from xbfs_engine.source.xapi.values import Ref


class PoolRecorder:
    """Takes it from the pool: see ``ports.Recorder``."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    async def capture(self, vm_ref: Ref, snapshot_ref: Ref) -> dict[str, Value]:
        """Records of the VM, which has its own disks, and the archive of its snapshot. Raises PoolError."""
        archive = await export_metadata(self._pool, snapshot_ref)
        return (await capture_vm(self._pool, vm_ref, archive)).to_fields()
