"""Several VMs of one pool in one run: one sweep before, then a cycle each, two at a time, the failures at the end.

What is wrong with a VM or its pool fails that VM; what is wrong with the repository ends the run. Waits while an SR
coalesces what it has of a VM's chains (``source.xapi.fitness`` has the rule).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NamedTuple, NoReturn

import trio

from xbfs_engine.core.errors import NoBasePoint, ObjectNotFound, PoolError, SourceError, VmNotReady
from xbfs_engine.core.log import Logger
from xbfs_engine.ingest.vm.choosing import choose
from xbfs_engine.ingest.vm.cycle import VmCycle
from xbfs_engine.source.xapi.inventory import take_inventory

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from xbfs_engine.core.errors import XbfsError
    from xbfs_engine.ingest.vm.cycle import Origin, Target, VmReport, Wishes
    from xbfs_engine.ingest.vm.disks import ChosenVm
    from xbfs_engine.ingest.vm.ports import Listener

COALESCE_WAIT_S: Final = 300.0
"""How long a VM's backlog may stay as it is while it is waited for; an SR's garbage collector starts after minutes."""

_LOOK_AGAIN_S: Final = 15.0
_OF_THE_VM: Final = (SourceError, PoolError, NoBasePoint)

_log = Logger("xbfs.vm")


class WantedVm(NamedTuple):
    """A VM to back up."""

    uuid: str
    name: str


@dataclass(frozen=True, slots=True)
class RunWishes:
    """``exclude``: numbers of disks not wanted, of every VM. ``coalesce_wait_s``: patience with SRs that do nothing."""

    cycle: Wishes
    exclude: Collection[int] = ()
    coalesce_wait_s: float = COALESCE_WAIT_S


class Outcome(NamedTuple):
    """What became of each VM, by uuid: each is in one of them."""

    reports: Mapping[str, VmReport]
    failures: Mapping[str, XbfsError]


class VmRun:
    """Backs up VMs. Used once."""

    def __init__(self, origin: Origin, target: Target, wishes: RunWishes, listener: Listener) -> None:
        self._origin = origin
        self._target = target
        self._wishes = wishes
        self._listener = listener
        self._reports: dict[str, VmReport] = {}
        self._failures: dict[str, XbfsError] = {}
        self._fatal: Exception | None = None

    async def run(self, vms: Sequence[WantedVm]) -> Outcome:
        """Back up all of them. Raises StorageError, RepositoryError, IntegrityError: then no further VM is begun."""
        async with trio.open_nursery() as nursery:
            for vm in vms:
                # Here and not in the task: VMs are begun in the order in which they were asked for.
                await self._origin.places.wait_for_turn()
                nursery.start_soon(self._one, vm, nursery.cancel_scope)
        if self._fatal is not None:
            raise self._fatal
        return Outcome(self._reports, self._failures)

    async def _one(self, vm: WantedVm, run: trio.CancelScope) -> None:
        try:
            async with self._origin.turn(vm.uuid) as is_ours:
                if not is_ours:
                    self._refuse(vm)
                chosen = await self._fit(vm)
                cycle = VmCycle(self._origin, self._target, chosen, self._wishes.cycle, self._listener)
                self._reports[vm.uuid] = await cycle.run()
        except _OF_THE_VM as exc:
            _log.info("vm not backed up", vm=vm.uuid, error=exc.message)
            self._failures[vm.uuid] = exc
            self._listener.failed(vm.name, exc)
        except Exception as exc:  # noqa: BLE001 - raised by run: a nursery would wrap it in a group
            self._fatal = self._fatal or exc
            run.cancel()
        finally:
            self._origin.places.end_turn()

    def _refuse(self, vm: WantedVm) -> NoReturn:
        raise VmNotReady(
            f"{vm.name!r}: another run on this node backs it up now",
            hint="wait until that one has ended, then run again",
        )

    async def _fit(self, vm: WantedVm) -> ChosenVm:
        """The VM as it is now, as soon as it can be snapshotted. Raises VmNotReady, ObjectNotFound."""
        least: int | None = None
        give_up_at = 0.0
        while True:
            inventory = await take_inventory(self._origin.xapi)
            found = inventory.vm_by_uuid(vm.uuid)
            if found is None:
                raise ObjectNotFound(f"VM {vm.name!r} is no longer on the pool")
            chosen = choose(inventory, found, self._wishes.exclude)
            backlog = chosen.backlog
            if not backlog.vhds:
                break
            if least is None or backlog.vhds < least:
                least, give_up_at = backlog.vhds, trio.current_time() + self._wishes.coalesce_wait_s
            if trio.current_time() + _LOOK_AGAIN_S > give_up_at:
                raise VmNotReady(
                    f"{vm.name!r}: its SR does not coalesce old snapshots ({backlog.told})",
                    hint="run it again later; if it stays so, look at the SR's garbage collector (/var/log/SMlog)",
                )
            self._listener.step(vm.name, f"waiting for the SR: {backlog.told}")
            await trio.sleep(_LOOK_AGAIN_S)
        if chosen.obstacles:
            raise VmNotReady(
                f"{vm.name!r} can not be snapshotted: {'; '.join(chosen.obstacles)}",
                hint="delete snapshots of the VM and let the SR coalesce them, or free space on the SR",
            )
        return chosen
