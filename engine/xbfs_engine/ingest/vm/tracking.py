"""Switching changed-block tracking on, where that can be; never a reason to leave a disk out of a backup.

enable_cbt pauses the guest's disk for a moment and is licensed, list_changed_blocks is neither (xen-api, SM cbt_util).
It stays on after a failed run: it is what the next one needs, and it costs 4 MiB per disk at most.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from xbfs_engine.core.errors import VmNotReady, XapiFailure
from xbfs_engine.core.log import Logger
from xbfs_engine.source.xapi.failures import meaning_of

if TYPE_CHECKING:
    from xbfs_engine.ingest.vm.disks import VmDisk
    from xbfs_engine.source.xapi.patience import Patience
    from xbfs_engine.source.xapi.session import Xapi

_ENABLE_TIMEOUT_S: Final = 300.0
UPGRADE: Final = "NOT_SUPPORTED_DURING_UPGRADE"

_log = Logger("xbfs.vm")


async def track(xapi: Xapi, patience: Patience, disk: VmDisk) -> str | None:
    """Have changes of ``disk`` recorded from now on; None, or why that can not be.

    Raises VmNotReady while the pool is being upgraded, and PoolError when it is out of reach.
    """
    if disk.untrackable is not None:
        return disk.untrackable
    if disk.tracked:
        return None
    try:
        await patience.get(
            lambda: xapi.call("VDI.enable_cbt", disk.vdi_ref, timeout_s=_ENABLE_TIMEOUT_S),
            "VDI.enable_cbt",
            repeatable=True,
        )
    except XapiFailure as exc:
        if exc.code == UPGRADE:
            raise VmNotReady(
                "the pool is being upgraded: changed-block tracking is not available", hint=exc.hint
            ) from exc
        _log.info("cbt not enabled", vdi=disk.vdi_uuid, code=exc.code)
        return f"changed-block tracking can not be switched on: {meaning_of(exc.code).text} ({exc.code})"
    return None
