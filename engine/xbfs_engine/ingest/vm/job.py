"""From names of VMs to restore points: the sweep, the choice, the run. What the command line calls.

The sweep comes before the run has a ledger of its own, and asks which bases the repository's points name: so it knows
for certain what a run that died around its commit has left.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from xbfs_engine.ingest.vm.base import known_bases
from xbfs_engine.ingest.vm.cycle import Origin
from xbfs_engine.ingest.vm.places import Places
from xbfs_engine.ingest.vm.run import VmRun, WantedVm
from xbfs_engine.source.xapi.inventory import take_inventory
from xbfs_engine.source.xapi.patience import Patience
from xbfs_engine.source.xapi.selection import select_vms
from xbfs_engine.source.xapi.sweep import sweep

if TYPE_CHECKING:
    from collections.abc import Sequence

    from xbfs_engine.core.runtime import RandomSource
    from xbfs_engine.ingest.vm.cycle import Target
    from xbfs_engine.ingest.vm.ports import Listener, Recorder
    from xbfs_engine.ingest.vm.reading import DiskAccess
    from xbfs_engine.ingest.vm.run import Outcome, RunWishes
    from xbfs_engine.source.xapi.ledger import Ledgers
    from xbfs_engine.source.xapi.selection import Skipped
    from xbfs_engine.source.xapi.session import Xapi
    from xbfs_engine.source.xapi.sweep import SweepReport


class PoolSide(NamedTuple):
    """A pool that is logged in, and what one needs to read from it."""

    xapi: Xapi
    access: DiskAccess
    recorder: Recorder
    ledgers: Ledgers
    random: RandomSource


class JobReport(NamedTuple):
    """``skipped``: VMs that were meant but must not be backed up. ``swept``: what dead runs had left."""

    outcome: Outcome
    skipped: Sequence[Skipped]
    swept: SweepReport


async def back_up_vms(
    pool: PoolSide, target: Target, patterns: Sequence[str], wishes: RunWishes, listener: Listener
) -> JobReport:
    """Back up the VMs that ``patterns`` mean (``selection``), and sweep before.

    Raises ObjectNotFound for a pattern that means nothing, PoolError when the pool is out of reach, StorageError and
    RepositoryError. What keeps a single VM from having a point is in the report.
    """
    inventory = await take_inventory(pool.xapi)
    selection = select_vms(inventory, patterns)
    bases = known_bases(target.catalog, target.repository.id)
    swept = await sweep(pool.xapi, pool.ledgers, node=target.node, dry_run=False, bases=bases)
    async with pool.ledgers.begin(target.node) as ledger:
        origin = Origin(
            xapi=pool.xapi,
            pool_uuid=inventory.pool_uuid,
            access=pool.access,
            recorder=pool.recorder,
            ledger=ledger,
            live={state.record.run for state in await pool.ledgers.runs() if state.live},
            patience=Patience(pool.random),
            places=Places(),
            turn=pool.ledgers.turn,
        )
        outcome = await VmRun(origin, target, wishes, listener).run(
            [WantedVm(vm.uuid, vm.name) for vm in selection.vms]
        )
    return JobReport(outcome, selection.skipped, swept)
