"""Keeping a VM where it is while it is backed up: moving its storage would give its disks new VDIs.

Owns the two keys of VM.blocked_operations and nothing else; keys that somebody else set are left as they are.
"""

from __future__ import annotations

from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Final

import trio

from xbfs_engine.core.errors import PoolError, StorageError, XapiFailure
from xbfs_engine.core.log import Logger
from xbfs_engine.source.xapi.failures import Handling, handling_of
from xbfs_engine.source.xapi.ledger import Kind
from xbfs_engine.source.xapi.markers import BLOCKED_OPERATIONS, block_reason

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from xbfs_engine.source.xapi.ledger import RunLedger
    from xbfs_engine.source.xapi.patience import Patience
    from xbfs_engine.source.xapi.session import Ref, Xapi

_UNBLOCK_S: Final = 120.0
_TAKEN: Final = "MAP_DUPLICATE_KEY"

_log = Logger("xbfs.vm")


@asynccontextmanager
async def migration_blocked(
    xapi: Xapi, patience: Patience, ledger: RunLedger, *, vm_ref: Ref, vm_uuid: str
) -> AsyncIterator[None]:
    """Block migration of the VM, with a reason for whoever meets it.

    What can not be undone by a deadline is left to the sweep. Raises PoolError, StorageError.
    """
    reason = block_reason(ledger.run, ledger.node)
    item = await ledger.intend(Kind.BLOCK, vm_uuid=vm_uuid, uuid=vm_uuid)
    try:
        for operation in BLOCKED_OPERATIONS:
            await _block(xapi, patience, vm_ref, operation, reason)
        yield
    finally:
        with trio.move_on_after(_UNBLOCK_S, shield=True):
            try:
                await remove_own(xapi, patience, vm_ref, reason)
                await ledger.gone(item)
            except (PoolError, StorageError) as exc:
                _log.warning("migration is still blocked", vm=vm_uuid, error=exc.message)


async def remove_own(xapi: Xapi, patience: Patience, vm_ref: Ref, reason: str) -> None:
    """Remove the keys whose value is ``reason``; it is no error if the VM has gone. Raises PoolError."""
    try:
        blocked = await patience.get(
            lambda: xapi.call("VM.get_blocked_operations", vm_ref), "VM.get_blocked_operations", repeatable=True
        )
        for operation in BLOCKED_OPERATIONS:
            if isinstance(blocked, dict) and blocked.get(operation) == reason:
                await patience.get(
                    partial(xapi.call, "VM.remove_from_blocked_operations", vm_ref, operation),
                    "VM.remove_from_blocked_operations",
                    repeatable=True,
                )
    except XapiFailure as exc:
        if handling_of(exc) != Handling.GONE:
            raise


async def _block(xapi: Xapi, patience: Patience, vm_ref: Ref, operation: str, reason: str) -> None:
    try:
        await patience.get(
            lambda: xapi.call("VM.add_to_blocked_operations", vm_ref, operation, reason),
            "VM.add_to_blocked_operations",
            repeatable=True,
        )
    except XapiFailure as exc:
        # Blocked by somebody already, or by our first try whose answer was lost.
        if exc.code != _TAKEN:
            raise
