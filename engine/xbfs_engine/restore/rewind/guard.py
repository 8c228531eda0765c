"""Keeping a VM still while its disks are rewound, and half-written disks from being used, whatever becomes of us.

Owns the keys of VM.blocked_operations whose reason is ours, and nothing else. There are two reasons. The ordinary one
of a run (``markers.block_reason``) holds until the first write: a sweep takes it away once the run has died. The other
one says from which point to which the disks are on their way: no sweep takes it for a run's (its node reads otherwise),
so it stays on the pool, seen by everybody, until a rewind has ended well or somebody gives the disks up. It is put on
and taken off in one call for all operations; what others put there in the same moment may be lost.
"""

from __future__ import annotations

import re
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Final, NamedTuple

import trio

from xbfs_engine.core.errors import PoolError, StorageError, VmNotReady, XapiFailure
from xbfs_engine.core.log import Logger
from xbfs_engine.restore.rewind.power import HALTED
from xbfs_engine.source.xapi.ledger import Kind
from xbfs_engine.source.xapi.markers import block_reason

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Mapping
    from collections.abc import Set as AbstractSet

    from xbfs_engine.source.xapi.ledger import Item, RunLedger
    from xbfs_engine.source.xapi.patience import Patience
    from xbfs_engine.source.xapi.session import Ref, Xapi

STILL: Final = ("start", "start_on", "pool_migrate", "migrate_send")
"""What would use or move the disks of a halted VM (xen-api, vm_operations)."""

HALF_WRITTEN: Final = (*STILL, "snapshot")
"""And nobody shall take a mixture for a state of the VM."""

_ID_DIGITS: Final = 16
_RELEASE_S: Final = 120.0
_TAKEN: Final = "MAP_DUPLICATE_KEY"
_NONE: Final = "none"
_REASON: Final = re.compile(
    r"xbfs run ([0-9a-f]{16}) of node (.{1,255}), rewinding to restore point ([0-9a-f]{16})"
    r" \(safety point ([0-9a-f]{16}|none)\), is at work on this VM",
    re.DOTALL,
)

_log = Logger("xbfs.rewind")


class HalfWritten(NamedTuple):
    """What a rewind that did not end left. ``point`` and ``safety``: first digits of ids; ``safety`` may be empty."""

    run: str
    node: str
    point: str
    safety: str


def half_written(blocked: Mapping[str, str]) -> HalfWritten | None:
    """What the blocked operations of a VM tell of a rewind that has not ended."""
    found = [match for reason in blocked.values() if (match := _REASON.match(reason))]
    if not found:
        return None
    run, node, point, safety = found[0].groups()
    return HalfWritten(run, node, point, "" if safety == _NONE else safety)


def half_written_reason(run: str, node: str, point: str, safety: str) -> str:
    """The reason that tells it; ids may be whole, ``safety`` empty."""
    return (
        f"xbfs run {run} of node {node}, rewinding to restore point {point[:_ID_DIGITS]}"
        f" (safety point {safety[:_ID_DIGITS] or _NONE}), is at work on this VM; if that run has ended, disks are"
        " half-written: run `xbfs rewind` again to finish, or with --abandon to use them as they are"
    )


class Guard:
    """Blocks operations of one VM. Made by ``kept_still``."""

    def __init__(self, xapi: Xapi, patience: Patience, ledger: RunLedger, vm_ref: Ref, vm_uuid: str) -> None:
        self._xapi = xapi
        self._patience = patience
        self._ledger = ledger
        self._vm = vm_ref
        self._vm_uuid = vm_uuid
        self._plain = block_reason(ledger.run, ledger.node)
        self._half = ""
        self._was_half = False
        self._items: list[Item] = []
        self.writing = False
        """Whether disks may be half-written by us now."""

    async def keep_still(self) -> None:
        """Before anything else: nobody starts or moves the VM. Raises PoolError, StorageError."""
        self._items.append(await self._ledger.intend(Kind.BLOCK, vm_uuid=self._vm_uuid, uuid=self._vm_uuid))
        blocked = await blocked_operations(self._xapi, self._patience, self._vm)
        self._was_half = half_written(blocked) is not None
        for operation in STILL:
            if operation not in blocked:
                await self._add(operation, self._plain)

    async def begin_writing(self, point: str, safety: str) -> None:
        """Before the first write: say on the VM, and in the ledger, what the disks will be a mixture of.

        Raises VmNotReady where that can not be said, PoolError, StorageError.
        """
        about = {"rewind": point, "safety": safety}
        self._items.append(await self._ledger.intend(Kind.BLOCK, vm_uuid=self._vm_uuid, uuid=self._vm_uuid, **about))
        self._half = half_written_reason(self._ledger.run, self._ledger.node, point, safety)
        blocked = await blocked_operations(self._xapi, self._patience, self._vm)
        noted = {op: self._half for op in HALF_WRITTEN if op not in blocked or self._is_ours(blocked[op])}
        # Disks that a rewind before this one left half-written are at no moment without their mark.
        await _block_these(self._xapi, self._patience, self._vm, {**blocked, **noted})
        blocked = await blocked_operations(self._xapi, self._patience, self._vm)
        if self._half not in blocked.values():
            raise VmNotReady(
                "all operations of this VM are blocked by somebody else",
                hint="take them off its blocked_operations: what a rewind is doing must be noted there",
            )
        # The first of all calls was perhaps too late for a start that was under way.
        state = await self._patience.get(
            lambda: self._xapi.call("VM.get_power_state", self._vm), "VM.get_power_state", repeatable=True
        )
        if state != HALTED:
            raise VmNotReady(f"the VM was started meanwhile: it is {str(state).lower()}")
        # The second note says all that the first did.
        await self._ledger.gone(self._items.pop(0))
        self.writing = True

    async def release(self) -> None:
        """Allow what we forbade, and what a rewind that had not ended did. Raises PoolError, StorageError."""
        await self._take_off(self._is_ours)
        self.writing = False

    async def undo(self) -> None:
        """Nothing was written: leave the VM as it was found. Raises PoolError, StorageError."""
        mine = {self._plain} if self._was_half else {self._plain, self._half}
        await self._take_off(lambda reason: reason in mine)

    async def _take_off(self, is_wanted: Callable[[str], bool]) -> None:
        blocked = await blocked_operations(self._xapi, self._patience, self._vm)
        staying = {operation: reason for operation, reason in blocked.items() if not is_wanted(reason)}
        if staying != blocked:
            await _block_these(self._xapi, self._patience, self._vm, staying)
        for item in self._items:
            await self._ledger.gone(item)
        self._items.clear()

    def _is_ours(self, reason: str) -> bool:
        return reason == self._plain or _REASON.match(reason) is not None

    async def _add(self, operation: str, reason: str) -> None:
        try:
            await self._patience.get(
                lambda: self._xapi.call("VM.add_to_blocked_operations", self._vm, operation, reason),
                "VM.add_to_blocked_operations",
                repeatable=True,
            )
        except XapiFailure as exc:
            # By our first try whose answer was lost, or by somebody just now.
            if exc.code != _TAKEN:
                raise


@asynccontextmanager
async def kept_still(
    xapi: Xapi, patience: Patience, ledger: RunLedger, *, vm_ref: Ref, vm_uuid: str
) -> AsyncIterator[Guard]:
    """A VM that nobody starts. What was blocked is allowed again on leaving, unless disks may be half-written then.

    Raises PoolError, StorageError.
    """
    guard = Guard(xapi, patience, ledger, vm_ref, vm_uuid)
    try:
        await guard.keep_still()
        yield guard
    finally:
        if not guard.writing:
            with trio.move_on_after(_RELEASE_S, shield=True):
                try:
                    await guard.undo()
                except (PoolError, StorageError) as exc:
                    _log.warning("operations are still blocked", vm=vm_uuid, error=exc.message)


async def abandon(xapi: Xapi, patience: Patience, *, vm_ref: Ref, live: AbstractSet[str]) -> HalfWritten | None:
    """Let half-written disks be used as they are. ``live``: this node's runs that are at work.

    Raises VmNotReady while the rewind that writes them is at work, PoolError.
    """
    blocked = await blocked_operations(xapi, patience, vm_ref)
    left = half_written(blocked)
    if left is not None:
        check_dead(left, live)
        staying = {operation: reason for operation, reason in blocked.items() if not _REASON.match(reason)}
        await _block_these(xapi, patience, vm_ref, staying)
    return left


def check_dead(left: HalfWritten, live: AbstractSet[str]) -> None:
    """Raise VmNotReady if the rewind is one of this node's runs at work; of other nodes' nothing is known."""
    if left.run in live:
        raise VmNotReady("this VM is being rewound right now", hint="wait until that ends")


async def blocked_operations(xapi: Xapi, patience: Patience, vm_ref: Ref) -> dict[str, str]:
    """VM.blocked_operations. Raises PoolError."""
    found = await patience.get(
        lambda: xapi.call("VM.get_blocked_operations", vm_ref), "VM.get_blocked_operations", repeatable=True
    )
    if not isinstance(found, dict):
        raise PoolError("VM.get_blocked_operations: the answer is no map", hint="is it really a XenServer host?")
    return {operation: str(reason) for operation, reason in found.items()}


async def _block_these(xapi: Xapi, patience: Patience, vm_ref: Ref, blocked: Mapping[str, str]) -> None:
    """All of VM.blocked_operations, in one call: a mark is there as a whole or not at all. Raises PoolError."""
    await patience.get(
        lambda: xapi.call("VM.set_blocked_operations", vm_ref, dict(blocked)),
        "VM.set_blocked_operations",
        repeatable=True,
    )
